/* ring.c - see ring.h for the picture and the fences. */
#include "ring.h"

#include <errno.h>
#include <string.h>

void ring_producer_init(struct ring_producer *ring, struct segment_shm *own,
                        const struct segment_shm *peer, uint64_t bytes)
{
    *ring = (struct ring_producer){.own = own, .peer = peer, .bytes = bytes};
}

void ring_consumer_init(struct ring_consumer *ring, struct segment_shm *own,
                        const struct segment_shm *peer, uint64_t bytes)
{
    *ring = (struct ring_consumer){.own = own, .peer = peer, .bytes = bytes};
}

static uint64_t copy_in(struct ring_producer *ring, uint64_t position, const void *source,
                        uint64_t count)
{
    uint64_t offset = position & (ring->bytes - 1);
    uint64_t first = ring->bytes - offset < count ? ring->bytes - offset : count;

    if (count != 0)
        memcpy(ring->own->ring + offset, source, first);
    if (first != count)
        memcpy(ring->own->ring, (const uint8_t *)source + first, count - first);
    return position + count;
}

/* Load the peer's head once and believe it only if it lies between the last one and our tail. */
static int refresh_head(struct ring_producer *ring)
{
    uint64_t head = load_acquire(&ring->peer->head); /* fence A, pairs with D */

    if (head - ring->head > ring->tail - ring->head)
        return -EPROTO;
    ring->head = head;
    return 0;
}

/* Whether a frame of `length` payload bytes fits now: 1, 0 or -EPROTO. */
static int ring_fits(struct ring_producer *ring, uint32_t length)
{
    uint64_t span = frame_span(length);

    if (ring->bytes - (ring->tail - ring->head) >= span)
        return 1;
    int status = refresh_head(ring);
    if (status < 0)
        return status;
    return ring->bytes - (ring->tail - ring->head) >= span;
}

int ring_push(struct ring_producer *ring, const struct frame_header *header,
              const struct iovec *parts, int part_count)
{
    int fits = ring_fits(ring, header->length);

    if (fits <= 0)
        return fits < 0 ? fits : -EAGAIN;
    uint64_t position = copy_in(ring, ring->tail, header, FRAME_HEADER_BYTES);
    for (int i = 0; i < part_count; i++)
        position = copy_in(ring, position, parts[i].iov_base, parts[i].iov_len);
    ring->tail += frame_span(header->length);
    if (!ring->holds)
        ring_publish(ring);
    return 0;
}

void ring_publish(struct ring_producer *ring)
{
    store_release(&ring->own->tail, ring->tail); /* fence B, pairs with C */
}

/* The peer can change these bytes at any time: each word is loaded exactly once. */
static void load_header(const struct ring_consumer *ring, struct frame_header *header)
{
    uint64_t words[FRAME_HEADER_BYTES / 8];

    for (unsigned i = 0; i < FRAME_HEADER_BYTES / 8; i++) {
        uint64_t offset = (ring->head + 8 * i) & (ring->bytes - 1);
        words[i] = *(const volatile uint64_t *)(const void *)(ring->peer->ring + offset);
    }
    memcpy(header, words, FRAME_HEADER_BYTES);
}

int ring_peek(struct ring_consumer *ring, struct frame_header *header)
{
    if (ring->tail == ring->head) {
        uint64_t tail = load_acquire(&ring->peer->tail); /* fence C, pairs with B */
        uint64_t used = tail - ring->head;

        if (used == 0)
            return 0;
        if (used > ring->bytes || used % LAYOUT_FRAME_ALIGN != 0)
            return -EPROTO;
        ring->tail = tail;
    }
    uint64_t used = ring->tail - ring->head;
    if (used < FRAME_HEADER_BYTES)
        return -EPROTO;
    load_header(ring, header);
    if (header->length > ring_frame_max(ring->bytes) || frame_span(header->length) > used)
        return -EPROTO;
    return 1;
}

void ring_read(const struct ring_consumer *ring, uint64_t offset, void *destination, uint64_t count)
{
    uint64_t start = (ring->head + FRAME_HEADER_BYTES + offset) & (ring->bytes - 1);
    uint64_t first = ring->bytes - start < count ? ring->bytes - start : count;

    if (count != 0)
        memcpy(destination, ring->peer->ring + start, first);
    if (first != count)
        memcpy((uint8_t *)destination + first, ring->peer->ring, count - first);
    fetched(destination);
}

void ring_release(struct ring_consumer *ring, uint32_t length)
{
    ring->head += frame_span(length);
    store_release(&ring->own->head, ring->head); /* fence D, pairs with A */
}
