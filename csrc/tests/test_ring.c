/* test_ring.c - the ring against a plain queue, at every place of wrap-around, and against a peer
 * that writes anything at all into its words. Segments lie between pages without access. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "support.h"

struct rings {
    struct segment_shm *sender, *receiver;
    struct ring_producer producer;
    struct ring_consumer consumer;
    uint32_t bytes;
};

static struct segment_shm *map_segment(uint32_t bytes)
{
    void *memory = guarded_mmap(NULL, LAYOUT_HEADER_BYTES + bytes, PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    REQUIRE(memory != MAP_FAILED);
    return memory;
}

/* As if `start` bytes had gone through already. */
static void rings_open(struct rings *rings, uint32_t bytes, uint64_t start)
{
    rings->bytes = bytes;
    rings->sender = map_segment(bytes);
    rings->receiver = map_segment(bytes);
    ring_producer_init(&rings->producer, rings->sender, rings->receiver, bytes);
    ring_consumer_init(&rings->consumer, rings->receiver, rings->sender, bytes);
    rings->producer.tail = rings->producer.head = start;
    rings->consumer.tail = rings->consumer.head = start;
    store_relaxed(&rings->sender->tail, start);
    store_relaxed(&rings->receiver->head, start);
}

static void rings_close(struct rings *rings)
{
    guarded_munmap(rings->sender, LAYOUT_HEADER_BYTES + rings->bytes);
    guarded_munmap(rings->receiver, LAYOUT_HEADER_BYTES + rings->bytes);
}

static int push(struct rings *rings, const uint8_t *payload, uint32_t length, uint64_t call_id)
{
    struct frame_header header = {.length = length, .kind = 1, .call_id = call_id};
    /* In three parts, one of which may be empty. */
    uint32_t first = length / 3, second = length / 5;
    struct iovec parts[3] = {
        {(void *)(uintptr_t)payload, first},
        {(void *)(uintptr_t)(payload + first), second},
        {(void *)(uintptr_t)(payload + first + second), length - first - second},
    };

    return ring_push(&rings->producer, &header, parts, 3);
}

/* Take a frame and check what it holds; the copy is exactly as long as the payload. */
static void take(struct rings *rings, uint32_t length, uint64_t call_id)
{
    struct frame_header header;

    REQUIRE(ring_peek(&rings->consumer, &header) == 1);
    CHECK_EQUAL(header.length, length);
    CHECK(header.call_id == call_id);
    uint8_t *copy = malloc(length + 1u);
    REQUIRE(copy != NULL);
    ring_read(&rings->consumer, 0, copy, length);
    CHECK(filled(copy, length, call_id));
    ring_read(&rings->consumer, length / 2, copy, length - length / 2); /* and from the middle */
    CHECK(filled(copy, length - length / 2, call_id + length / 2) || length > 256);
    free(copy);
    ring_release(&rings->consumer, length);
}

static void push_filled(struct rings *rings, uint32_t length, uint64_t call_id)
{
    uint8_t *payload = malloc(length + 1u);

    REQUIRE(payload != NULL);
    fill(payload, length, call_id);
    CHECK_EQUAL(push(rings, payload, length, call_id), 0);
    free(payload);
}

TEST(empty_then_full_then_empty)
{
    struct rings rings;
    struct frame_header header;
    uint8_t payload[32] = {0};

    rings_open(&rings, 4096, 0);
    CHECK_EQUAL(ring_peek(&rings.consumer, &header), 0);
    for (uint64_t id = 0; id < 4096 / 64; id++) {
        fill(payload, 32, id);
        CHECK_EQUAL(push(&rings, payload, 32, id), 0);
    }
    CHECK_EQUAL(push(&rings, payload, 0, 99), -EAGAIN); /* full to the last byte */
    CHECK_EQUAL(push(&rings, payload, 32, 99), -EAGAIN);
    take(&rings, 32, 0);
    CHECK_EQUAL(push(&rings, payload, 33, 99), -EAGAIN); /* one byte more than there is */
    push_filled(&rings, 32, 64);
    for (uint64_t id = 1; id <= 4096 / 64; id++)
        take(&rings, 32, id);
    CHECK_EQUAL(ring_peek(&rings.consumer, &header), 0);
    rings_close(&rings);
}

TEST(every_length_up_to_the_longest)
{
    struct rings rings;

    rings_open(&rings, 4096, 0);
    for (uint32_t length = 0; length <= ring_frame_max(4096); length++) {
        push_filled(&rings, length, length);
        take(&rings, length, length);
    }
    rings_close(&rings);
}

TEST(header_and_payload_wrap_at_every_offset)
{
    static const uint32_t lengths[] = {0, 1, 7, 8, 9, 100, 4096 / 4 - FRAME_HEADER_BYTES};

    for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (uint64_t back = 0; back <= 4096 / 4; back += LAYOUT_FRAME_ALIGN) {
            struct rings rings;
            rings_open(&rings, 4096, 3 * 4096 - back);
            push_filled(&rings, lengths[i], back);
            push_filled(&rings, 5, back + 1);
            take(&rings, lengths[i], back);
            take(&rings, 5, back + 1);
            rings_close(&rings);
        }
    }
}

TEST(indices_near_powers_of_two)
{
    static const uint64_t starts[] = {
        (1ull << 31) - 1024, (1ull << 32) - 1024, (1ull << 63) - 1024, 0ull - 1024, 0ull - 8,
    };

    for (unsigned i = 0; i < sizeof starts / sizeof *starts; i++) {
        struct rings rings;
        uint8_t payload[200];
        uint64_t first = 0, last = 0;

        rings_open(&rings, 4096, starts[i]);
        for (int round = 0; round < 200; round++) {
            for (;;) {
                fill(payload, sizeof payload, last);
                int status = push(&rings, payload, sizeof payload, last);
                if (status != 0) {
                    CHECK_EQUAL(status, -EAGAIN);
                    break;
                }
                last++;
            }
            CHECK_EQUAL(last - first, 4096 / 232);
            while (first != last)
                take(&rings, sizeof payload, first++);
        }
        rings_close(&rings);
    }
}

/* The model: a queue of lengths, and the bytes that they take. */
static void run_model(struct random *random, uint32_t bytes, uint64_t start, int steps)
{
    enum { MODEL_MAX = 8192 };
    static uint32_t lengths[MODEL_MAX];
    struct rings rings;
    uint64_t first = 0, last = 0, used = 0;
    uint8_t *payload = malloc(ring_frame_max(bytes) + 1u);
    struct frame_header header;

    REQUIRE(payload != NULL);
    rings_open(&rings, bytes, start);
    for (int step = 0; step < steps; step++) {
        if (random_below(random, 2) == 0) {
            uint32_t most = ring_frame_max(bytes);
            if (random_below(random, 2) == 0)
                most = 64;
            uint32_t length = (uint32_t)random_below(random, most + 1u);
            fill(payload, length, last);
            bool fits = used + frame_span(length) <= bytes;
            CHECK_EQUAL(push(&rings, payload, length, last), fits ? 0 : -EAGAIN);
            if (fits) {
                used += frame_span(length);
                lengths[last++ % MODEL_MAX] = length;
            }
        } else if (first != last) {
            take(&rings, lengths[first % MODEL_MAX], first);
            used -= frame_span(lengths[first++ % MODEL_MAX]);
        } else {
            CHECK_EQUAL(ring_peek(&rings.consumer, &header), 0);
        }
        CHECK(load_relaxed(&rings.sender->tail) - load_relaxed(&rings.receiver->head) == used);
    }
    rings_close(&rings);
    free(payload);
}

TEST(random_sequences_match_a_queue)
{
    struct random random = {harness_seed()};

    for (int run = 0; run < 300; run++) {
        uint32_t bytes = 4096u << random_below(&random, 5);
        uint64_t start = random_next(&random) & ~7ull;
        run_model(&random, bytes, start, 300);
    }
}

static uint64_t garbage(struct random *random)
{
    static const uint64_t bases[] = {0, 1ull << 31, 1ull << 32, 1ull << 63, UINT64_MAX, 4096, 8192};
    uint64_t choice = random_below(random, 4);

    if (choice == 0)
        return random_next(random);
    uint64_t base = bases[random_below(random, sizeof bases / sizeof *bases)];
    return base + random_below(random, 64) - 32;
}

static void read_all(struct rings *rings, uint8_t *copy)
{
    struct frame_header header;
    int status;

    for (int i = 0; i < 64 && (status = ring_peek(&rings->consumer, &header)) != 0; i++) {
        if (status < 0) {
            CHECK_EQUAL(status, -EPROTO);
            return;
        }
        CHECK(header.length <= ring_frame_max(rings->bytes));
        ring_read(&rings->consumer, 0, copy, header.length);
        ring_release(&rings->consumer, header.length);
    }
}

/* Anything in the peer's tail, head and frames: -EPROTO or nothing, never out of bounds. */
TEST(hostile_words)
{
    struct random random = {harness_seed()};
    uint8_t *copy = malloc(ring_frame_max(4096));

    REQUIRE(copy != NULL);
    for (int run = 0; run < 20000; run++) {
        struct rings rings;
        uint64_t start = random_below(&random, 2) ? garbage(&random) & ~7ull : 0;
        rings_open(&rings, 4096, start);
        for (int step = 0; step < 4; step++) {
            uint64_t tail = random_below(&random, 2) ? garbage(&random)
                                                     : start + 8 * random_below(&random, 520);
            store_relaxed(&rings.sender->tail, tail);
            for (int i = 0; i < 16; i++)
                rings.sender->ring[random_below(&random, 4096)] = (uint8_t)random_next(&random);
            if (random_below(&random, 2)) {
                uint32_t length = (uint32_t)garbage(&random);
                uint64_t offset = rings.consumer.head & 4095;
                memcpy(rings.sender->ring + offset, &length, 4);
            }
            read_all(&rings, copy);
        }
        rings_close(&rings);
    }
    free(copy);
}

TEST(hostile_head)
{
    struct random random = {harness_seed() + 1};
    uint8_t payload[4096 / 4 - FRAME_HEADER_BYTES] = {0};

    for (int run = 0; run < 20000; run++) {
        struct rings rings;
        rings_open(&rings, 4096, random_next(&random) & ~7ull);
        for (int step = 0; step < 16; step++) {
            uint64_t near = rings.producer.tail - random_below(&random, 9000);
            bool wild = random_below(&random, 2) == 0;
            store_relaxed(&rings.receiver->head, wild ? garbage(&random) : near);
            int status = push(&rings, payload, (uint32_t)random_below(&random, sizeof payload), 1);
            CHECK(status == 0 || status == -EAGAIN || status == -EPROTO);
            uint64_t used = rings.producer.tail - rings.producer.head;
            CHECK(used <= 4096); /* never believes a head beyond its own tail */
        }
        rings_close(&rings);
    }
}

TEST(impossible_tails_and_heads)
{
    struct rings rings;
    struct frame_header header;
    uint8_t payload[992] = {0};
    static const uint64_t tails[] = {1, 7, 24, 4097, 4104, 1ull << 32, UINT64_MAX, 0ull - 8};

    for (unsigned i = 0; i < sizeof tails / sizeof *tails; i++) {
        rings_open(&rings, 4096, 0);
        store_relaxed(&rings.sender->tail, tails[i]);
        CHECK_EQUAL(ring_peek(&rings.consumer, &header), -EPROTO);
        rings_close(&rings);
    }
    rings_open(&rings, 4096, 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQUAL(push(&rings, payload, 992, 1), 0);
    store_relaxed(&rings.receiver->head, 4104); /* beyond our tail */
    CHECK_EQUAL(push(&rings, payload, 0, 1), -EPROTO);
    store_relaxed(&rings.receiver->head, 1024);
    CHECK_EQUAL(push(&rings, payload, 992, 1), 0);
    store_relaxed(&rings.receiver->head, 0); /* before the last one */
    CHECK_EQUAL(push(&rings, payload, 992, 1), -EPROTO);
    rings_close(&rings);
}

/* A frame that says it is longer than what was published. */
TEST(length_beyond_the_tail)
{
    struct rings rings;
    struct frame_header header;
    uint32_t length;

    rings_open(&rings, 4096, 0);
    push_filled(&rings, 64, 0);
    for (length = 65; length < 3000; length++) {
        memcpy(rings.sender->ring, &length, 4);
        int status = ring_peek(&rings.consumer, &header);
        CHECK_EQUAL(status, frame_span(length) <= 96 ? 1 : -EPROTO);
    }
    length = UINT32_MAX;
    memcpy(rings.sender->ring, &length, 4);
    CHECK_EQUAL(ring_peek(&rings.consumer, &header), -EPROTO);
    rings_close(&rings);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
