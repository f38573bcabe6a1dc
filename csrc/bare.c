/* bare.c - two rings and nothing else: what an RPC over them can't be faster than.
 *
 * Used by benchmarks and by tests that want a ring without a connection. It spins for ever.
 */
#include <errno.h>
#include <stdlib.h>

#include "ring.h"
#include "shmrpc.h"
#include "wake.h"

struct shmrpc_bare {
    struct ring_producer producer;
    struct ring_consumer consumer;
    struct spin_policy policy; /* of which only the patience is used */
};

size_t shmrpc_bare_bytes(uint32_t ring_bytes)
{
    return 2 * ((size_t)LAYOUT_HEADER_BYTES + ring_bytes);
}

shmrpc_bare *shmrpc_bare_new(void *memory, uint32_t ring_bytes, int side)
{
    struct shmrpc_bare *bare = calloc(1, sizeof *bare);
    struct segment_shm *first = memory;
    struct segment_shm *second =
        (void *)((uint8_t *)memory + LAYOUT_HEADER_BYTES + ring_bytes);

    if (bare == NULL)
        return NULL;
    ring_producer_init(&bare->producer, side == 0 ? first : second, side == 0 ? second : first,
                       ring_bytes);
    ring_consumer_init(&bare->consumer, side == 0 ? first : second, side == 0 ? second : first,
                       ring_bytes);
    return bare;
}

void shmrpc_bare_free(shmrpc_bare *bare)
{
    free(bare);
}

int shmrpc_bare_send(shmrpc_bare *bare, const char *body, size_t body_bytes)
{
    struct frame_header header = {.length = (uint32_t)body_bytes};
    struct iovec part = {(void *)(uintptr_t)body, body_bytes};

    return ring_push(&bare->producer, &header, &part, 1);
}

int64_t shmrpc_bare_receive(shmrpc_bare *bare, uint8_t *body, size_t capacity)
{
    struct frame_header header;
    uint32_t patience = spin_policy_patience(&bare->policy);
    bool yielded = false;
    int status;

    for (uint32_t step = 0; (status = ring_peek(&bare->consumer, &header)) == 0; step++) {
        if (spin_step(step, patience) == 0)
            continue;
        yielded = true;
        lock_release(); /* there may never be an answer */
    }
    spin_policy_hit(&bare->policy, yielded, 0);
    if (status < 0 || header.length > capacity)
        return status < 0 ? status : -EMSGSIZE;
    ring_read(&bare->consumer, 0, body, header.length);
    ring_release(&bare->consumer, header.length);
    return header.length;
}
