/* fences.c - the fences of csrc in the two shapes that they are for: see test_fences.py.
 *
 *   fences ring ROUNDS            A to D: frames between two threads; ThreadSanitizer looks on
 *   fences data ROUNDS SECONDS    E, F: one publishes while the other arms
 *   fences space ROUNDS SECONDS   G, H: one frees while the other asks for space
 *
 * With SECONDS they end after that time, if it comes first.
 *
 * The last two count the rounds in which neither saw what the other did, that is, lost wake-ups,
 * and end with status 1 at the first.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ring.h"
#include "wake.h"

enum { RING_BYTES = 4096, LONGEST = RING_BYTES / 4 - FRAME_HEADER_BYTES, JITTER = 512 };

static struct segment_shm *segments[2]; /* of the producer, of the consumer */
static struct ring_producer producer;
static struct ring_consumer consumer;
static struct wake wakes[2];
static atomic_u64 arrived[2];
static uint64_t rounds, until_ns;
static atomic_u64 late;
static uint32_t length = LONGEST;
static const char *shape;
static int saw[2];

/* Both threads leave it at nearly the same moment. */
static void meet(int side, uint64_t step)
{
    store_release(&arrived[side], step);
    for (uint32_t i = 0; load_acquire(&arrived[1 - side]) < step; i++)
        if (i % 1024 == 1023)
            spin_step(0, 0);
}

/* Vary who comes first, by steps of about a nanosecond. */
static void stagger(int side, uint64_t round)
{
    uint32_t steps = side == 1 ? JITTER / 2 : (uint32_t)(round * 2654435761u >> 8) % JITTER;

    for (volatile uint32_t i = 0; i < steps; i++)
        ;
}

static int push(uint8_t fill)
{
    static uint8_t payload[LONGEST];
    struct frame_header header = {.length = length, .kind = fill};
    struct iovec part = {payload, length};

    if (payload[0] != fill) /* not each time: it would give the stores before it time to drain */
        memset(payload, fill, length);
    return ring_push(&producer, &header, &part, 1) == 0;
}

static void pop(void)
{
    struct frame_header header;
    uint8_t payload[LONGEST];

    while (ring_peek(&consumer, &header) == 0)
        spin_step(0, 0);
    ring_read(&consumer, 0, payload, length);
    if (payload[0] != header.kind || payload[length - 1] != header.kind)
        abort();
    ring_release(&consumer, length);
}

static void pass(int side)
{
    for (uint64_t round = 0; round < rounds; round++) {
        if (side == 1)
            pop();
        else
            while (!push((uint8_t)round))
                spin_step(0, 0);
    }
}

static void data_round(int side)
{
    struct frame_header header;

    if (side == 0) {
        push(1);
        saw[0] = wake_peer_for_data(&wakes[0]);
    } else {
        wake_arm(&wakes[1]);
        wake_arm_fence();
        saw[1] = ring_peek(&consumer, &header) == 1;
    }
}

static void space_round(int side)
{
    if (side == 0) {
        wake_want_space(&wakes[0], producer.head + RING_BYTES / 4);
        saw[0] = push(1);
    } else {
        ring_release(&consumer, length);
        saw[1] = wake_peer_for_space(&wakes[1], consumer.head, 0);
    }
}

/* Before and after each round: the ring is empty (data), or full and the sender armed (space). */
static void prepare(int side, bool data)
{
    struct frame_header header;

    if (data) {
        if (side == 1 && ring_peek(&consumer, &header) == 1)
            pop();
        wake_disarm(&wakes[1]);
        return;
    }
    if (side == 1) {
        ring_peek(&consumer, &header);
        return;
    }
    while (push(1))
        ;
    wake_got_space(&wakes[0]);
    wake_arm(&wakes[0]);
    wake_arm_fence();
}

static void clash(int side, bool data)
{
    uint64_t step = 0;

    for (uint64_t round = 0; round < rounds; round++) {
        if (!data || side == 1)
            prepare(side, data);
        meet(side, ++step);
        stagger(side, round);
        if (data)
            data_round(side);
        else
            space_round(side);
        meet(side, ++step);
        if (side == 0 && !saw[0] && !saw[1]) {
            printf("lost in round %llu\n", (unsigned long long)round);
            exit(1);
        }
        if (side == 0 && round % 256 == 0 && clock_now_ns() > until_ns)
            store_relaxed(&late, 1);
        meet(side, ++step);
        if (load_relaxed(&late) != 0)
            return;
    }
}

static void *run(void *argument)
{
    int side = argument != NULL;

    if (strcmp(shape, "ring") == 0)
        pass(side);
    else
        clash(side, strcmp(shape, "data") == 0);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread;

    if (argc < 3)
        return 2;
    shape = argv[1];
    rounds = strtoull(argv[2], NULL, 10);
    until_ns = clock_now_ns() + (argc > 3 ? strtoull(argv[3], NULL, 10) : 3600) * 1000000000u;
    if (strcmp(shape, "data") == 0)
        length = 8; /* nothing but the words in the way */
    for (int i = 0; i < 2; i++)
        if ((segments[i] = aligned_alloc(4096, LAYOUT_HEADER_BYTES + RING_BYTES)) == NULL)
            return 2;
        else
            memset(segments[i], 0, LAYOUT_HEADER_BYTES + RING_BYTES);
    for (int i = 0; i < 2; i++)
        wakes[i] = (struct wake){.own = segments[i], .peer = segments[1 - i], .peer_bell = -1};
    ring_producer_init(&producer, segments[0], segments[1], RING_BYTES);
    ring_consumer_init(&consumer, segments[1], segments[0], RING_BYTES);
    if (pthread_create(&thread, NULL, run, segments) != 0)
        return 2;
    run(NULL);
    pthread_join(thread, NULL);
    printf("%llu rounds\n", (unsigned long long)rounds);
    return 0;
}
