/* copy.h - copying a large buffer to where another CPU is going to read it.
 *
 * A block that is used again lies in the caches of the CPU that read it last. Ordinary stores have
 * to take each of its lines away from there, one after the other; streaming stores, which go around
 * the caches and replace whole lines, do not. The reader pays a part of that back, because it finds
 * the bytes in memory and not in our cache. Microseconds for copying and reading a block by turns
 * (Zen 4, two CPUs of a virtual machine; in brackets on CPUs without a common cache):
 *
 *   bytes       ordinary             streaming
 *     4 K       0.1 + 0.1            0.2 + 0.6
 *    16 K       2.5 + 0.4            0.9 + 0.8
 *    64 K       9.6 + 1.0  (38 + 3)  3.5 + 2.4  (4 + 3)
 *     1 M       140 + 12  (123 + 13)  39 + 33  (39 + 40)
 *
 * A sender that is ahead of its reader is another matter. Its blocks take turns, and before one has
 * its next turn the reader's cache has lost it to the others: nobody needs to be asked for the lines.
 * A stream of 1 M through four blocks takes 26 + 14 with ordinary stores, 40 + 51 with the others. But
 * that goes for CPUs with a common cache. Without one the lines are asked for all the same, and a
 * stream takes 400 to 1500 + 50, or 39 + 35 with the others. Where the two processes run, and in a
 * virtual machine where its CPUs do, may change at any time. So ordinary stores are measured.
 */
#ifndef SHMRPC_COPY_H
#define SHMRPC_COPY_H

#include <stdbool.h>
#include <stdint.h>

#include "atomics.h"

enum {
    COPY_STREAM_MIN = 8 << 10,
    COPY_LENT_MAX = 1 << 20, /* with so much under way: about what a CPU's own cache holds */
    COPY_PIECE = 64 << 10,   /* so much by ordinary stores between two looks at the clock */
    /* A piece that takes so many times what streaming stores took has to ask for its lines. Memory
     * that is in no cache takes twice as long at most. */
    COPY_SLOW = 4,
    /* After two in a row, because one may be of a thread that lost its CPU meanwhile, so many bytes are
     * streamed before the next trial: twice as many each time. */
    COPY_PAUSE_MIN = 4 << 20,
    COPY_PAUSE_MAX = 256 << 20,
};

/* What copies of one conn have shown: hints, any thread's. All zero at the beginning. */
struct copier {
    atomic_u64 streamed_ns; /* what streaming stores took for a piece; 0: not known */
    atomic_u64 slow;        /* whether the last ordinary piece was */
    atomic_u64 pause;       /* so many bytes are streamed after two of them, */
    atomic_u64 left;        /* so many of them yet */
};

/* As memcpy, for a sender that is ahead of its reader or not; from COPY_STREAM_MIN bytes on around the
 * caches, where that is better. What was written is visible to whoever sees a later store of ours, as
 * after memcpy. */
void copy_out(struct copier *copier, void *to, const void *from, uint64_t bytes, bool ahead);

#endif
