/* ring.h - a single-producer single-consumer ring of frames. No system calls, no malloc.
 *
 *   producer (our segment)                       consumer (the peer's segment)
 *
 *   free = bytes - (tail - head)   load head  A
 *   write header and payload
 *   store tail                     B             load tail                        C
 *                                                read header and payload
 *                                                store head (in its own segment)  D
 *
 * fence A pairs with D: the consumer's last reads of a span come before we write there again.
 *         Without it a frame could be overwritten while it is still being read.
 * fence B pairs with C: the frame's bytes come before the tail that announces them.
 *         Without it the consumer could read bytes of an older lap.
 *
 * Each side keeps its own index in private memory and only publishes it; the other side's index is
 * cached and loaded again only when the cached one says "full" or "empty".
 */
#ifndef SHMRPC_RING_H
#define SHMRPC_RING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "layout.h"

#define RING_BYTES_MIN 4096u
#define RING_BYTES_MAX (64u << 20)

struct ring_producer {
    struct segment_shm *own;        /* its tail and ring are written */
    const struct segment_shm *peer; /* its head is read */
    uint64_t bytes;                 /* ring size, a power of two */
    uint64_t tail;                  /* published when ring_push returns */
    uint64_t head;                  /* cached copy of the peer's head */
    bool holds;    /* what is pushed is not published before ring_publish */
};

struct ring_consumer {
    struct segment_shm *own;        /* its head is written */
    const struct segment_shm *peer; /* its tail and ring are read */
    uint64_t bytes;
    uint64_t head; /* published by ring_release */
    uint64_t tail; /* cached copy of the peer's tail */
};

void ring_producer_init(struct ring_producer *ring, struct segment_shm *own,
                        const struct segment_shm *peer, uint64_t bytes);
void ring_consumer_init(struct ring_consumer *ring, struct segment_shm *own,
                        const struct segment_shm *peer, uint64_t bytes);

/* Longest payload of one frame: a quarter of the ring, so that writing overlaps with reading. */
static inline uint32_t ring_frame_max(uint64_t ring_bytes)
{
    return (uint32_t)(ring_bytes / 4 - FRAME_HEADER_BYTES);
}

/* Append one frame whose payload is the `parts` joined; header->length must be their total.
 * 0; -EAGAIN if it does not fit now; -EPROTO if the peer's head is impossible. */
int ring_push(struct ring_producer *ring, const struct frame_header *header,
              const struct iovec *parts, int part_count);
/* Let the peer see all that was pushed. */
void ring_publish(struct ring_producer *ring);

/* Copy the header of the next frame into *header. 1 if there is one, 0 if the ring is empty,
 * -EPROTO if tail or length are impossible. Nothing is consumed. */
int ring_peek(struct ring_consumer *ring, struct frame_header *header);

/* Whether ring_peek would find anything, a frame or a violation: all that a spin loop asks. */
static inline bool ring_empty(const struct ring_consumer *ring)
{
    return ring->tail == ring->head && load_relaxed(&ring->peer->tail) == ring->head;
}

/* Copy payload bytes [offset, offset + count) of the frame just peeked, which has them. */
void ring_read(const struct ring_consumer *ring, uint64_t offset, void *destination,
               uint64_t count);

/* Consume the frame just peeked, whose checked payload length is `length`. */
void ring_release(struct ring_consumer *ring, uint32_t length);

#endif
