/* support.h - connections with both ends in one process, and peers made by hand. */
#ifndef SHMRPC_TESTS_SUPPORT_H
#define SHMRPC_TESTS_SUPPORT_H

#include <stddef.h>
#include <stdint.h>

#include "harness.h"
#include "ring.h"
#include "shmrpc.h"

enum transport { SHM, SHM_SOCKET_BELLS, STREAM, TRANSPORTS };

/* Two ends of a connection. What an end's options own is closed by pair_close unless `given`. */
struct pair {
    enum transport transport;
    shmrpc_conn_options options[2];
    int given[2]; /* belongs to a poller or conn now */
};

void pair_open(struct pair *pair, enum transport transport, uint32_t ring0, uint32_t ring1);
/* Add one end to a poller; returns the conn's id. */
uint64_t pair_give(struct pair *pair, int side, shmrpc_poller *poller);
void pair_close(struct pair *pair);

/* Side 1 of a shm pair as the bare rings, for a peer made by hand. */
struct hand {
    struct segment_shm *own;        /* its segment */
    const struct segment_shm *peer; /* the poller's */
    struct ring_producer producer;
    struct ring_consumer consumer;
    int control_fd, bell_fd; /* bell_fd rings the poller */
};

void hand_open(struct hand *hand, struct pair *pair);
void hand_ring(const struct hand *hand);
/* Push a frame and ring: as ring_push. */
int hand_send(struct hand *hand, const struct frame_header *header, const void *payload);
/* Take the next frame if there is one: 1 with its header and payload (up to `capacity`), 0. */
int hand_receive(struct hand *hand, struct frame_header *header, void *payload, size_t capacity);

/* A memfd of this size. */
int memory_fd(uint64_t bytes);
/* Fill with bytes that depend on seed and position, and check them. */
void fill(uint8_t *bytes, size_t count, uint64_t seed);
bool filled(const uint8_t *bytes, size_t count, uint64_t seed);
shmrpc_name name_of(const char *text);
void sleep_us(uint64_t microseconds);

/* mmap and munmap of the library under test: each mapping between two pages without access. */
void *guarded_mmap(void *address, size_t bytes, int protection, int flags, int fd, int64_t offset);
int guarded_munmap(void *address, size_t bytes);

#endif
