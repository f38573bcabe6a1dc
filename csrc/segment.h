/* segment.h - mapping our own segment and the peer's, and checking what the peer handed over. */
#ifndef SHMRPC_SEGMENT_H
#define SHMRPC_SEGMENT_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* Size of a segment with this ring, a multiple of the page size. */
uint64_t segment_bytes(uint64_t ring_bytes);

/* Map our own segment read-write: its size must be segment_bytes(); writes its magic and leaves it
 * armed, so that the peer rings for its first message. */
int segment_map_own(int fd, uint64_t ring_bytes, struct segment_shm **segment);

/* Map the peer's segment read-only. -EPROTO if it is no memory of that size, -EACCES if the peer
 * is not trusted (another uid) and could still change its size, that is, it is not sealed. */
int segment_map_peer(int fd, uint64_t ring_bytes, bool trusted,
                     const struct segment_shm **segment);

/* A mapping of a segment of blocks, which lives as long as anything points into it. */
struct memory {
    atomic_u64 references;
    uint8_t *base;
    uint64_t bytes;
};

enum { MEMORY_PAGE = 4096 };

/* Map our own, read-write, or the peer's, read-only and with the checks of segment_map_peer; with
 * one reference. `bytes` has to be the file's size. */
int memory_map_own(int fd, uint64_t bytes, struct memory **memory);
int memory_map_peer(int fd, uint64_t bytes, bool trusted, struct memory **memory);
void memory_ref(struct memory *memory);
/* The last one unmaps it, in a thread of its own if that takes long. */
void memory_unref(struct memory *memory);

void segment_unmap(const struct segment_shm *segment, uint64_t ring_bytes);

#endif
