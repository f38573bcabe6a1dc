/* arena.h - where the blocks of large values lie in our own segments: a two-level segregated fit.
 *
 *   segment 0   | used |  free   | used | used |        free         |
 *   segment 1   |              free              | used |     free     |
 *
 * Extents of each segment are linked in the order of their addresses, and a freed one joins free
 * neighbours at once, so that no two free extents touch. Free ones hang in lists by size: each
 * power of two is split into 16 classes, a bitmap says which lists have any, so allocating and
 * freeing take the same time however much there is. A block is cut from the front of the extent
 * that fits best: who allocates and frees the same size over and over gets the same, warm memory.
 *
 * All of this is in private memory: what the peer can read is the blocks' contents alone. A block
 * is named by index and generation; an index whose block is gone has another generation, so that a
 * peer that gives back the wrong block, or the same one twice, is found out.
 *
 * No locks (lending.c has one), no system calls, no pointers into the segments but for users.
 */
#ifndef SHMRPC_ARENA_H
#define SHMRPC_ARENA_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* Blocks start at multiples of it: four cache lines, so that two CPUs that use neighbours do not
 * share what is fetched together. */
#define ARENA_GRANULE 256u

enum {
    ARENA_SEGMENTS_MAX = 64,
    ARENA_BLOCKS_MAX = 1 << 20,
    ARENA_FINE_BITS = 4, /* classes in a power of two */
    ARENA_ROWS = 33 - ARENA_FINE_BITS,
};

#define ARENA_NONE UINT32_MAX

struct arena_extent {
    uint32_t segment;      /* place in arena->segments */
    uint32_t start, count; /* granules */
    uint32_t before, after; /* neighbours in the segment */
    uint32_t previous, next; /* in the free list; spare extents use next */
    uint32_t generation;
    uint32_t uses; /* 0: free. Of the owner, and one for each time that the peer has it */
    uint32_t lent; /* uses of the peer */
    bool loaned;   /* its owner may write to it at any time */
    uint64_t lent_ns; /* when the peer got it first */
};

struct arena_segment {
    uint8_t *base; /* null: no segment here */
    uint64_t bytes;
    uint32_t number; /* its name on the wire */
    uint32_t first;  /* extent at its start */
    uint32_t used;   /* granules */
    bool closed;     /* nothing is cut from it any more */
    uint64_t idle_ns; /* since when nothing of it is in use */
};

struct arena {
    struct arena_extent *extents;
    uint32_t extent_count, extent_capacity, spare;
    uint32_t rows, fine[ARENA_ROWS]; /* which lists have any */
    uint32_t lists[ARENA_ROWS][1 << ARENA_FINE_BITS];
    struct arena_segment segments[ARENA_SEGMENTS_MAX];
    uint64_t bytes, used_bytes, lent_bytes;
    uint32_t blocks, lent_blocks;
};

/* Where a block lies. */
struct arena_place {
    uint8_t *data;
    uint64_t offset, bytes; /* bytes: rounded up */
    uint32_t number, index, generation;
};

void arena_init(struct arena *arena);
/* Forget everything; the segments are their owner's. */
void arena_free(struct arena *arena);

/* Whether there may be one more segment. */
bool arena_has_place(const struct arena *arena);
/* Add memory, whose size is a multiple of the granule. Returns its place, -ENOMEM, or -ENOSPC if
 * there are as many segments as there may be. */
int arena_add(struct arena *arena, uint8_t *base, uint64_t bytes, uint32_t number, uint64_t now_ns);
/* The place of a segment of which nothing was in use for so long, or -ENOENT. */
int arena_find_idle(const struct arena *arena, uint64_t now_ns, uint64_t quiet_ns);
/* Whether the peer has a block, or a closed segment that it has not let go of yet. */
bool arena_is_lent(const struct arena *arena);
/* Cut nothing from it any more; nothing of it is in use. */
void arena_close(struct arena *arena, int segment);
/* Take a closed one out. */
void arena_remove(struct arena *arena, int segment);

/* Whether a block of this size could be had now. */
bool arena_fits(const struct arena *arena, uint64_t bytes);
/* A block with one use: 0, -ENOSPC or -ENOMEM. */
int arena_alloc(struct arena *arena, uint64_t bytes, struct arena_place *place);
/* One more use; -EOVERFLOW if there are too many. */
int arena_share(struct arena *arena, uint32_t index);
/* One use less; the last one frees the block. */
void arena_drop(struct arena *arena, uint32_t index, uint64_t now_ns);
/* A use becomes the peer's. */
void arena_lend(struct arena *arena, uint32_t index, uint64_t now_ns);
/* The peer gives one back, or says so, or never got it: 0, or -EPROTO if it has no such block. */
int arena_return(struct arena *arena, uint32_t index, uint32_t generation, uint64_t now_ns);
/* Where this part of a block lies that the peer has, or says so, in *data; whether the block is in a
 * loan in *loaned. One use more of it is ours. -EPROTO if the peer has no such block. */
int arena_reclaim(struct arena *arena, const struct block_entry *entry, uint8_t **data, bool *loaned);
/* When the peer got the one that it has had longest; 0 if it has none. */
uint64_t arena_oldest_ns(const struct arena *arena);

#endif
