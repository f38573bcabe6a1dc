/* test_events.c - what Python takes: frames of streams, replies to futures, ends of conns. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "poller.h"
#include "segment.h"
#include "support.h"

enum { RING = 65536, PIECE = RING / 4 - FRAME_HEADER_BYTES };

/* A poller with one conn whose peer is made by hand. Everything happens in this thread. */
struct stage {
    shmrpc_poller *poller;
    shmrpc_slot *slot;   /* client: of the conn. server: a worker */
    shmrpc_slot *taker;
    const shmrpc_message *event; /* the one taken last */
    uint64_t conn;
    struct pair pair;
    struct hand hand;
};

static void stage_open(struct stage *stage, uint32_t workers, uint32_t max_concurrency)
{
    *stage = (struct stage){.poller = shmrpc_poller_new(workers, max_concurrency, 0, 0)};
    REQUIRE(stage->poller != NULL);
    CHECK_EQUAL(shmrpc_method_add(stage->poller, "m", 1, 0, 0), 0);
    pair_open(&stage->pair, SHM, RING, RING);
    hand_open(&stage->hand, &stage->pair);
    stage->conn = pair_give(&stage->pair, 0, stage->poller);
    stage->slot = workers != 0 ? shmrpc_worker_new(stage->poller)
                               : shmrpc_slot_new(stage->poller, stage->conn);
    stage->taker = shmrpc_slot_new(stage->poller, 0);
    REQUIRE(stage->slot != NULL && stage->taker != NULL);
    stage->event = shmrpc_slot_message(stage->taker);
}

static void stage_close(struct stage *stage)
{
    shmrpc_slot_free(stage->slot);
    shmrpc_slot_free(stage->taker);
    shmrpc_poller_free(stage->poller);
    segment_unmap(stage->hand.peer, RING);
    pair_close(&stage->pair);
}

/* A message in one piece or more: `head` is the method's name or the metadata. */
struct frame {
    uint8_t kind, flags;
    uint64_t call_id;
    const char *method, *metadata;
    const void *body;
    size_t bytes;
    uint64_t deadline_ns;
};

static void put(struct stage *stage, const struct frame *frame)
{
    size_t method = frame->method != NULL ? strlen(frame->method) : 0;
    size_t metadata = frame->metadata != NULL ? strlen(frame->metadata) : 0;
    size_t total = method + metadata + frame->bytes, offset = 0;
    uint8_t *payload = malloc(total + 1);

    memcpy(payload, frame->method != NULL ? frame->method : "", method);
    memcpy(payload + method, frame->metadata != NULL ? frame->metadata : "", metadata);
    if (frame->bytes != 0)
        memcpy(payload + method + metadata, frame->body, frame->bytes);
    do {
        size_t count = total - offset < PIECE ? total - offset : PIECE;
        struct frame_header header = {
            .length = (uint32_t)count,
            .kind = offset == 0 ? frame->kind : SHMRPC_CONTINUE,
            .flags = (uint8_t)(frame->flags | (offset + count < total ? SHMRPC_FLAG_MORE : 0)),
            .method_bytes = (uint16_t)method,
            .call_id = frame->call_id,
            .metadata_bytes = (uint32_t)metadata,
            .total_bytes = (uint32_t)total,
            .deadline_ns = frame->deadline_ns,
        };
        REQUIRE(hand_send(&stage->hand, &header, payload + offset) == 0);
        offset += count;
    } while (offset < total);
    free(payload);
}

static void put_item(struct stage *stage, uint64_t call_id, const void *body, size_t bytes)
{
    put(stage, &(struct frame){.kind = SHMRPC_ITEM, .call_id = call_id, .body = body,
                               .bytes = bytes});
}

/* Read what is there, and leave the events where they are. */
static void read_all(struct stage *stage)
{
    while (!ring_empty(&poller_find(stage->poller, stage->conn)->consumer) ||
           load_acquire(&stage->hand.peer->head) != load_relaxed(&stage->hand.own->tail))
        shmrpc_wait_events(stage->taker, 0);
}

/* Take the next event, and check what it is. */
static void expect(struct stage *stage, uint32_t kind, uint64_t call_id, uint64_t bytes)
{
    REQUIRE(shmrpc_take(stage->taker) == 1);
    CHECK_EQUAL(stage->event->kind, kind);
    CHECK_EQUAL(stage->event->call_id, call_id);
    CHECK_EQUAL(stage->event->body_bytes, bytes);
    CHECK_EQUAL(stage->event->conn_id, stage->conn);
}

static void expect_items(struct stage *stage, uint64_t call_id, uint32_t count, uint64_t bytes)
{
    expect(stage, SHMRPC_ITEM, call_id, bytes);
    CHECK_EQUAL(stage->event->item_count, count);
    CHECK_EQUAL(stage->event->ends != NULL, count > 1);
    if (count > 1)
        CHECK_EQUAL(stage->event->ends[count - 1], bytes);
}

/* ---- items that follow each other ---- */

TEST(items_of_a_stream_share_an_event)
{
    struct stage stage;
    uint8_t body[100];

    stage_open(&stage, 0, 0);
    for (uint32_t i = 0; i < 50; i++) {
        fill(body, i, i);
        put_item(&stage, 5, body, i);
    }
    read_all(&stage);
    expect_items(&stage, 5, 50, 50 * 49 / 2);
    uint32_t start = 0;
    for (uint32_t i = 0; i < 50; i++) {
        uint32_t end = stage.event->ends[i];
        CHECK_EQUAL(end - start, i);
        CHECK(filled(stage.event->body + start, i, i));
        start = end;
    }
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    stage_close(&stage);
}

TEST(event_that_was_taken_is_not_joined)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    for (int i = 0; i < 3; i++) {
        put_item(&stage, 5, "abc", 3);
        read_all(&stage);
        expect_items(&stage, 5, 1, 3);
    }
    stage_close(&stage);
}

TEST(items_in_an_event_are_limited)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    for (int i = 0; i < 1200; i++)
        put_item(&stage, 5, "x", 1);
    read_all(&stage);
    expect_items(&stage, 5, 1024, 1024);
    expect_items(&stage, 5, 176, 176);
    stage_close(&stage);
}

TEST(bytes_in_an_event_are_limited)
{
    struct stage stage;
    uint8_t body[6554];

    stage_open(&stage, 0, 0);
    for (uint64_t i = 0; i < 25; i++) {
        fill(body, sizeof body, i);
        put_item(&stage, 5, body, sizeof body);
        read_all(&stage);
    }
    for (uint64_t i = 0; i < 25; i += 9) {
        uint32_t count = i + 9 < 25 ? 9 : (uint32_t)(25 - i);
        expect_items(&stage, 5, count, count * sizeof body);
        for (uint64_t k = 0; k < count; k++)
            CHECK(filled(stage.event->body + k * sizeof body, sizeof body, i + k));
    }
    stage_close(&stage);
}

TEST(other_streams_flags_kinds_and_metadata_break_a_run)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    put_item(&stage, 5, "a", 1);
    put_item(&stage, 5, "b", 1);
    put_item(&stage, 6, "c", 1);
    put_item(&stage, 5, "d", 1);
    put(&stage, &(struct frame){.kind = SHMRPC_ITEM, .flags = SHMRPC_FLAG_CALLER, .call_id = 5,
                                .body = "e", .bytes = 1});
    put(&stage, &(struct frame){.kind = SHMRPC_ITEM, .call_id = 5, .metadata = "meta", .body = "fg",
                                .bytes = 2});
    put_item(&stage, 5, "h", 1);
    put(&stage, &(struct frame){.kind = SHMRPC_CREDIT, .call_id = 5, .body = "12345678",
                                .bytes = 8});
    put_item(&stage, 5, "i", 1);
    put(&stage, &(struct frame){.kind = SHMRPC_END, .call_id = 5});
    put(&stage, &(struct frame){.kind = SHMRPC_INITIAL, .call_id = 5, .metadata = "md"});
    read_all(&stage);
    expect_items(&stage, 5, 2, 2);
    CHECK(memcmp(stage.event->body, "ab", 2) == 0);
    expect_items(&stage, 6, 1, 1);
    expect_items(&stage, 5, 1, 1);
    CHECK_EQUAL(stage.event->flags, 0);
    expect_items(&stage, 5, 1, 1);
    CHECK_EQUAL(stage.event->flags, SHMRPC_FLAG_CALLER);
    expect_items(&stage, 5, 1, 2);
    CHECK_EQUAL(stage.event->metadata_bytes, 4);
    CHECK(memcmp(stage.event->head, "meta", 4) == 0 && memcmp(stage.event->body, "fg", 2) == 0);
    expect_items(&stage, 5, 1, 1);
    expect(&stage, SHMRPC_CREDIT, 5, 8);
    CHECK_EQUAL(stage.event->item_count, 0);
    expect_items(&stage, 5, 1, 1);
    expect(&stage, SHMRPC_END, 5, 0);
    expect(&stage, SHMRPC_INITIAL, 5, 0);
    CHECK(stage.event->metadata_bytes == 2 && memcmp(stage.event->head, "md", 2) == 0);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    stage_close(&stage);
}

/* An item in pieces is in private memory already: an event of its own, which others may join. */
TEST(items_in_pieces)
{
    enum { LONG = PIECE + 1000 };
    struct stage stage;
    uint8_t body[LONG];

    stage_open(&stage, 0, 0);
    put_item(&stage, 5, "abc", 3);
    fill(body, LONG, 1);
    put_item(&stage, 5, body, LONG);
    put_item(&stage, 5, "defg", 4);
    read_all(&stage);
    expect_items(&stage, 5, 1, 3);
    expect_items(&stage, 5, 2, LONG + 4);
    CHECK_EQUAL(stage.event->ends[0], LONG);
    CHECK(filled(stage.event->body, LONG, 1));
    CHECK(memcmp(stage.event->body + LONG, "defg", 4) == 0);
    stage_close(&stage);
}

/* Items as long as they may be, from an empty event on. */
TEST(empty_items)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    for (int i = 0; i < 40; i++)
        put_item(&stage, 5, NULL, 0);
    put_item(&stage, 5, "x", 1);
    read_all(&stage);
    expect_items(&stage, 5, 41, 1);
    CHECK_EQUAL(stage.event->ends[0], 0);
    CHECK_EQUAL(stage.event->ends[39], 0);
    CHECK_EQUAL(stage.event->body[0], 'x');
    stage_close(&stage);
}

/* Whatever comes in whatever order, each stream has its items in order and whole. */
TEST(random_streams)
{
    enum { STREAMS = 4, ITEMS = 20000, LONGEST = 20000 };
    struct stage stage;
    struct random random = {harness_seed()};
    uint64_t sent[STREAMS] = {0}, taken[STREAMS] = {0};
    uint8_t *body = malloc(LONGEST);

    stage_open(&stage, 0, 0);
    for (int i = 0; i < ITEMS; i++) {
        uint64_t stream = random_below(&random, 8) == 0 ? random_below(&random, STREAMS) : 0;
        uint64_t number = sent[stream]++;
        size_t bytes = random_below(&random, 50) == 0 ? number % LONGEST : number % 60;
        fill(body, bytes, number * STREAMS + stream);
        put_item(&stage, stream, body, bytes);
        if (random_below(&random, 4) == 0 || bytes > 1000)
            read_all(&stage);
        if (random_below(&random, 100) != 0 && i != ITEMS - 1)
            continue;
        read_all(&stage);
        while (shmrpc_take(stage.taker)) {
            const shmrpc_message *event = stage.event;
            uint32_t start = 0;
            REQUIRE(event->kind == SHMRPC_ITEM && event->call_id < STREAMS);
            for (uint32_t k = 0; k < event->item_count; k++) {
                uint32_t end = event->ends != NULL ? event->ends[k] : (uint32_t)event->body_bytes;
                uint64_t next = taken[event->call_id]++;
                CHECK(end - start == next % 60 || end - start == next % LONGEST);
                CHECK(filled(event->body + start, end - start, next * STREAMS + event->call_id));
                start = end;
            }
            CHECK_EQUAL(start, event->body_bytes);
        }
    }
    for (int i = 0; i < STREAMS; i++)
        CHECK_EQUAL(taken[i], sent[i]);
    free(body);
    stage_close(&stage);
}

/* ---- streams that are called ---- */

static int64_t next(struct stage *stage)
{
    int64_t result;

    while ((result = shmrpc_next(stage->slot)) == -EAGAIN) {
    }
    return result;
}

static void put_call(struct stage *stage, uint64_t call_id, const char *method,
                     uint64_t deadline_ns)
{
    put(stage, &(struct frame){.kind = SHMRPC_REQUEST, .flags = SHMRPC_FLAG_STREAM,
                               .call_id = call_id, .method = method, .deadline_ns = deadline_ns});
}

/* The status of the next reply. */
static uint32_t replied(struct stage *stage, uint64_t call_id)
{
    struct frame_header header = {0};

    do {
        REQUIRE(hand_receive(&stage->hand, &header, NULL, 0) == 1);
    } while (header.kind != SHMRPC_REPLY);
    CHECK_EQUAL(header.call_id, call_id);
    return header.method_bytes;
}

TEST(stream_is_announced_before_its_items)
{
    struct stage stage;

    stage_open(&stage, 2, 16);
    put_call(&stage, 7, "m", 0);
    put_item(&stage, 7, "abc", 3);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE); /* runs at once */
    CHECK_EQUAL(shmrpc_slot_message(stage.slot)->flags, SHMRPC_FLAG_STREAM);
    expect(&stage, SHMRPC_REQUEST, 7, 0);
    CHECK_EQUAL(stage.event->flags, SHMRPC_FLAG_STREAM);
    CHECK_EQUAL(shmrpc_reply(stage.slot, 0, NULL, 0), 0);
    CHECK_EQUAL(next(&stage), SHMRPC_EVENTS);
    expect_items(&stage, 7, 1, 3);
    CHECK_EQUAL(replied(&stage, 7), 0);
    stage_close(&stage);
}

/* Those that queue are announced when they come, and their items follow; a call without the flag
 * is not. */
TEST(queued_streams_are_announced)
{
    struct stage stage;

    stage_open(&stage, 1, 16);
    put_call(&stage, 7, "m", 0);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    expect(&stage, SHMRPC_REQUEST, 7, 0);
    put_call(&stage, 8, "m", 0);
    put(&stage, &(struct frame){.kind = SHMRPC_REQUEST, .call_id = 9, .method = "m"});
    put_item(&stage, 8, "abc", 3);
    put_item(&stage, 8, "def", 3);
    read_all(&stage);
    expect(&stage, SHMRPC_REQUEST, 8, 0);
    expect_items(&stage, 8, 2, 6);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    CHECK_EQUAL(shmrpc_slot_message(stage.slot)->call_id, 8);
    stage_close(&stage);
}

TEST(stream_that_is_not_admitted_is_not_announced)
{
    struct stage stage;

    stage_open(&stage, 1, 1);
    put_call(&stage, 6, "unknown", 0);
    put_call(&stage, 7, "m", 0);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    expect(&stage, SHMRPC_REQUEST, 7, 0);
    CHECK_EQUAL(replied(&stage, 6), STATUS_UNIMPLEMENTED);
    put_call(&stage, 8, "m", 0); /* one too many */
    put_call(&stage, 9, "m", 1); /* late */
    read_all(&stage);
    CHECK_EQUAL(replied(&stage, 8), STATUS_RESOURCE_EXHAUSTED);
    CHECK_EQUAL(replied(&stage, 9), STATUS_DEADLINE_EXCEEDED);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    stage_close(&stage);
}

TEST(cancel_of_running_and_queued_streams)
{
    struct stage stage;

    stage_open(&stage, 1, 16);
    put_call(&stage, 7, "m", 0);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    put_call(&stage, 8, "m", 0);
    put(&stage, &(struct frame){.kind = SHMRPC_REQUEST, .call_id = 9, .method = "m"});
    for (uint64_t id = 7; id <= 10; id++) /* 9 is no stream, 10 is none of ours */
        put(&stage, &(struct frame){.kind = SHMRPC_CANCEL, .call_id = id});
    read_all(&stage);
    CHECK_EQUAL(shmrpc_slot_message(stage.slot)->cancelled, 1);
    expect(&stage, SHMRPC_REQUEST, 7, 0);
    expect(&stage, SHMRPC_REQUEST, 8, 0);
    expect(&stage, SHMRPC_CANCEL, 7, 0);
    expect(&stage, SHMRPC_CANCEL, 8, 0);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    CHECK_EQUAL(next(&stage), SHMRPC_EVENTS); /* 8 and 9 are dropped: nothing to run */
    expect(&stage, SHMRPC_CANCEL, 8, 0);
    CHECK_EQUAL(replied(&stage, 8), STATUS_DEADLINE_EXCEEDED); /* and nothing for 7 */
    CHECK_EQUAL(replied(&stage, 9), STATUS_DEADLINE_EXCEEDED);
    stage_close(&stage);
}

/* A stream that turns out to be late, or nobody's, when its turn comes: Python forgets it. */
TEST(queued_stream_that_does_not_start_is_cancelled)
{
    struct stage stage;

    stage_open(&stage, 1, 16);
    put_call(&stage, 7, "m", 0);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    put_call(&stage, 8, "m", clock_now_ns() + 5000000);
    put_call(&stage, 9, "unknown", 0);
    read_all(&stage);
    sleep_us(6000);
    for (uint64_t id = 7; id <= 9; id++)
        expect(&stage, SHMRPC_REQUEST, id, 0);
    CHECK_EQUAL(next(&stage), SHMRPC_EVENTS);
    expect(&stage, SHMRPC_CANCEL, 8, 0);
    expect(&stage, SHMRPC_CANCEL, 9, 0);
    CHECK_EQUAL(replied(&stage, 7), STATUS_CANCELLED); /* has run, and said nothing */
    CHECK_EQUAL(replied(&stage, 8), STATUS_DEADLINE_EXCEEDED);
    CHECK_EQUAL(replied(&stage, 9), STATUS_UNIMPLEMENTED);
    stage_close(&stage);
}

/* ---- replies ---- */

TEST(replies_with_metadata_and_initial_metadata)
{
    struct stage stage;
    const uint64_t id = 3 << 16 | SHMRPC_PYTHON_INDEX;

    stage_open(&stage, 0, 0);
    put(&stage, &(struct frame){.kind = SHMRPC_INITIAL, .call_id = id, .metadata = "first"});
    put_item(&stage, id, "abc", 3);
    put(&stage, &(struct frame){.kind = SHMRPC_REPLY, .call_id = id, .metadata = "last",
                                .body = "result", .bytes = 6});
    read_all(&stage);
    expect(&stage, SHMRPC_INITIAL, id, 0);
    CHECK(memcmp(stage.event->head, "first", 5) == 0);
    expect_items(&stage, id, 1, 3);
    expect(&stage, SHMRPC_REPLY, id, 6);
    CHECK_EQUAL(stage.event->metadata_bytes, 4);
    CHECK(memcmp(stage.event->head, "last", 4) == 0);
    CHECK(memcmp(stage.event->body, "result", 6) == 0);
    stage_close(&stage);
}

/* What a handler has set goes with its reply, and with no other. */
TEST(reply_metadata)
{
    struct stage stage;
    struct frame_header header;
    char payload[20];

    stage_open(&stage, 2, 16);
    CHECK_EQUAL(shmrpc_reply_metadata(stage.slot, "nobody's", 8), 0);
    for (uint64_t id = 7; id <= 8; id++) {
        put(&stage, &(struct frame){.kind = SHMRPC_REQUEST, .call_id = id, .method = "m"});
        CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
        if (id == 8) {
            CHECK_EQUAL(shmrpc_reply_metadata(stage.slot, "some", 4), 0);
            CHECK_EQUAL(shmrpc_reply_metadata(stage.slot, "better", 6), 0);
        }
        CHECK_EQUAL(shmrpc_reply(stage.slot, 0, "result", 6), 0);
        CHECK_EQUAL(shmrpc_reply(stage.slot, 0, "again", 5), 0); /* once */
        REQUIRE(hand_receive(&stage.hand, &header, payload, sizeof payload) == 1);
        CHECK_EQUAL(header.metadata_bytes, id == 8 ? 6 : 0);
        CHECK(memcmp(payload, id == 8 ? "betterresult" : "result", header.total_bytes) == 0);
        CHECK_EQUAL(hand_receive(&stage.hand, &header, NULL, 0), 0);
    }
    stage_close(&stage);
}

/* Metadata that the caller does not accept keeps no error from it. */
TEST(reply_metadata_that_is_too_long)
{
    struct stage stage;
    struct frame_header header;
    static char metadata[6000];

    stage_open(&stage, 2, 16);
    poller_find(stage.poller, stage.conn)->peer_max_message_bytes = 1024;
    put(&stage, &(struct frame){.kind = SHMRPC_REQUEST, .call_id = 7, .method = "m"});
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    CHECK_EQUAL(shmrpc_reply_metadata(stage.slot, metadata, sizeof metadata), 0);
    CHECK_EQUAL(shmrpc_reply(stage.slot, 0, "result", 6), -EMSGSIZE);
    CHECK_EQUAL(shmrpc_reply(stage.slot, 8, "error", 5), 0);
    REQUIRE(hand_receive(&stage.hand, &header, NULL, 0) == 1);
    CHECK_EQUAL(header.method_bytes, 8);
    CHECK_EQUAL(header.total_bytes, 5);
    stage_close(&stage);
}

/* ---- plain replies ---- */

static uint64_t python_id(uint64_t number)
{
    return number << 16 | SHMRPC_PYTHON_INDEX;
}

static void put_reply(struct stage *stage, uint64_t number, const char *metadata, const char *body)
{
    put(stage, &(struct frame){.kind = SHMRPC_REPLY, .call_id = python_id(number),
                               .metadata = metadata, .body = body, .bytes = strlen(body)});
}

/* Take the batch, and check that it has these replies, whose bodies are their numbers. */
static void expect_briefs(struct stage *stage, const uint64_t *numbers, uint32_t count)
{
    const shmrpc_brief *briefs = shmrpc_poller_batch(stage->poller, 1);
    const uint8_t *bodies = shmrpc_poller_batch_bytes(stage->poller);

    REQUIRE(shmrpc_take(stage->taker) == 1);
    CHECK_EQUAL(stage->event->kind, SHMRPC_BRIEFS);
    REQUIRE(stage->event->item_count == count);
    CHECK_EQUAL(stage->event->body_bytes, briefs[count - 1].end);
    for (uint32_t i = 0; i < count; i++) {
        CHECK_EQUAL(briefs[i].call_id, python_id(numbers[i]));
        CHECK_EQUAL(briefs[i].conn_id, stage->conn);
        REQUIRE(briefs[i].end - briefs[i].start == 1);
        CHECK_EQUAL(bodies[briefs[i].start], '0' + numbers[i]);
    }
}

/* They are older than any event, also than those that come while Python has the batch. */
TEST(plain_replies_come_together)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    REQUIRE(shmrpc_poller_batch(stage.poller, 1) != NULL);
    put_reply(&stage, 1, NULL, "1");
    put_reply(&stage, 2, NULL, "2");
    put_reply(&stage, 3, "meta", "3");
    put_reply(&stage, 4, NULL, "4");
    read_all(&stage);
    CHECK_EQUAL(shmrpc_wait_events(stage.taker, 0), SHMRPC_EVENTS);
    expect_briefs(&stage, (const uint64_t[]){1, 2}, 2);
    CHECK_EQUAL(shmrpc_wait_events(stage.taker, 0), SHMRPC_EVENTS); /* that are left */
    expect(&stage, SHMRPC_REPLY, python_id(3), 1);
    expect(&stage, SHMRPC_REPLY, python_id(4), 1);
    put_reply(&stage, 5, NULL, "5");
    read_all(&stage);
    expect_briefs(&stage, (const uint64_t[]){5}, 1);
    put_reply(&stage, 6, NULL, "6"); /* while it is being looked at */
    read_all(&stage);
    CHECK_EQUAL(shmrpc_poller_batch_bytes(stage.poller)[0], '5');
    expect(&stage, SHMRPC_REPLY, python_id(6), 1);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    CHECK_EQUAL(shmrpc_wait_events(stage.taker, 0), -ETIMEDOUT);
    put_reply(&stage, 7, NULL, "7");
    shutdown(stage.hand.control_fd, SHUT_RDWR);
    while (shmrpc_conn_status(stage.poller, stage.conn) == 0)
        shmrpc_wait_events(stage.taker, 0);
    expect_briefs(&stage, (const uint64_t[]){7}, 1);
    expect(&stage, SHMRPC_CLOSED, 0, 0);
    stage_close(&stage);
}

/* More than the batch holds: events, and none is lost. */
TEST(plain_replies_beyond_the_batch)
{
    enum { COUNT = SHMRPC_BATCH_BRIEFS + 10 };
    struct stage stage;

    stage_open(&stage, 0, 0);
    REQUIRE(shmrpc_poller_batch(stage.poller, 1) != NULL);
    for (uint64_t i = 1; i <= COUNT; i++)
        put_reply(&stage, i, NULL, "x");
    read_all(&stage);
    REQUIRE(shmrpc_take(stage.taker) == 1);
    CHECK_EQUAL(stage.event->kind, SHMRPC_BRIEFS);
    CHECK_EQUAL(stage.event->item_count, SHMRPC_BATCH_BRIEFS);
    for (uint64_t i = SHMRPC_BATCH_BRIEFS + 1; i <= COUNT; i++)
        expect(&stage, SHMRPC_REPLY, python_id(i), 1);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    stage_close(&stage);
}

/* An event loop whose messages all come long after it has gone to sleep tries a spin now and then:
 * the peer may be quicker by then. A sleep without a spin before it is no reason to spin less. */
TEST(event_loop_tries_a_spin_now_and_then)
{
    enum { ROUNDS = 3 * SPIN_SKIP_MAX, SPIN_NS = 1000 };
    struct stage stage;
    shmrpc_stats half, whole;

    stage_open(&stage, 0, 0);
    REQUIRE(shmrpc_poller_batch(stage.poller, 0) != NULL);
    for (uint64_t i = 1; i <= 2 * ROUNDS; i++) {
        int64_t status;
        harness_progress(HANG_SECONDS);
        do
            CHECK(shmrpc_poll(stage.taker, SPIN_NS) <= 0);
        while (!shmrpc_arm(stage.taker));
        sleep_us(SPIN_BUDGET_NS / 1000);
        put_reply(&stage, i, NULL, "x");
        while ((status = shmrpc_poll(stage.taker, 0)) <= 0)
            CHECK(status == 0 || status == -EAGAIN);
        CHECK_EQUAL(status, 1 << 16 | 1); /* a body of one byte, one brief */
        if (i == ROUNDS)
            shmrpc_poller_stats(stage.poller, &half);
    }
    shmrpc_poller_stats(stage.poller, &whole);
    CHECK(whole.spins_missed - half.spins_missed >= 2);
    CHECK(whole.spins_missed - half.spins_missed <= 20);
    stage_close(&stage);
}

/* Where an event loop wants it, short items are in the batch: those of one stream that follow each
 * other as one brief, and none that is younger than an event. */
TEST(short_items_come_together)
{
    enum { TOO_LONG = 10000 };
    static const uint8_t zeros[TOO_LONG];
    struct stage stage;
    int64_t status;

    stage_open(&stage, 0, 0);
    const shmrpc_brief *briefs = shmrpc_poller_batch(stage.poller, 0);
    REQUIRE(briefs != NULL);
    shmrpc_poller_brief_items(stage.poller);
    put_item(&stage, 5, "abc", 3);
    put_item(&stage, 5, NULL, 0);
    put_item(&stage, 5, "de", 2);
    put_item(&stage, 6, "f", 1);
    put_item(&stage, 5, "g", 1);
    put_item(&stage, 5, zeros, TOO_LONG);
    put_item(&stage, 5, "h", 1);
    while ((status = shmrpc_poll(stage.taker, 0)) <= 0)
        CHECK(status == 0 || status == -EAGAIN);
    CHECK_EQUAL(status, 7 << 16 | 3);
    CHECK(memcmp(shmrpc_poller_batch_bytes(stage.poller), "abcdefg", 7) == 0);
    const struct {
        uint64_t stream, last;
        int32_t count;
        uint32_t start, end;
    } expected[] = {{5, 2, 3, 0, 5}, {6, 1, 1, 5, 6}, {5, 1, 1, 6, 7}};
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(briefs[i].kind, SHMRPC_ITEM);
        CHECK_EQUAL(briefs[i].conn_id, stage.conn);
        CHECK_EQUAL(briefs[i].call_id, expected[i].stream);
        CHECK_EQUAL(briefs[i].deadline_ns, expected[i].last);
        CHECK_EQUAL(briefs[i].method, expected[i].count);
        CHECK_EQUAL(briefs[i].start, expected[i].start);
        CHECK_EQUAL(briefs[i].end, expected[i].end);
    }
    expect_items(&stage, 5, 2, TOO_LONG + 1);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    stage_close(&stage);
}

/* ---- the end, and limits ---- */

TEST(end_of_a_conn_comes_after_its_last_frames)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    put_item(&stage, 5, "abc", 3);
    put(&stage, &(struct frame){.kind = SHMRPC_CREDIT, .call_id = 5, .body = "12345678",
                                .bytes = 8});
    shutdown(stage.hand.control_fd, SHUT_RDWR);
    while (shmrpc_conn_status(stage.poller, stage.conn) == 0)
        shmrpc_wait_events(stage.taker, 0);
    expect_items(&stage, 5, 1, 3);
    expect(&stage, SHMRPC_CREDIT, 5, 8);
    expect(&stage, SHMRPC_CLOSED, 0, 0);
    CHECK_EQUAL(stage.event->status, EPIPE);
    CHECK_EQUAL(shmrpc_take(stage.taker), 0);
    stage_close(&stage);
}

/* When nobody takes them, no more is read: nothing is lost, and no conn ends, theirs or another. */
TEST(events_that_nobody_takes_stop_their_senders)
{
    enum { FRAMES = 100000, EACH = 500 };
    struct stage stage;
    struct pair pair;
    struct hand other;
    const struct frame_header end = {.kind = SHMRPC_END, .call_id = 77};
    uint32_t sent = 0, waited = 0;

    stage_open(&stage, 2, 16);
    pair_open(&pair, SHM, RING, RING);
    hand_open(&other, &pair);
    uint64_t other_conn = pair_give(&pair, 0, stage.poller);
    while (sent < FRAMES && waited < EACH) {
        struct frame_header header = {.kind = SHMRPC_END, .call_id = sent};
        if (hand_send(&stage.hand, &header, NULL) == 0) {
            sent++;
            waited = 0;
        } else {
            shmrpc_wait_events(stage.taker, 0);
            waited++;
        }
    }
    CHECK(sent < FRAMES);
    CHECK_EQUAL(hand_send(&other, &end, NULL), 0);
    for (int i = 0; i < EACH; i++)
        shmrpc_wait_events(stage.taker, 0);
    CHECK_EQUAL(shmrpc_conn_status(stage.poller, stage.conn), 0);
    CHECK_EQUAL(shmrpc_conn_status(stage.poller, other_conn), 0);
    uint32_t taken = 0, others = 0;
    while (taken < sent || others == 0) {
        if (shmrpc_take(stage.taker) == 0) {
            shmrpc_wait_events(stage.taker, 0);
        } else if (stage.event->conn_id == other_conn) {
            CHECK_EQUAL(stage.event->call_id, 77);
            others++;
        } else {
            CHECK_EQUAL(stage.event->call_id, taken++);
        }
    }
    CHECK_EQUAL(others, 1);
    segment_unmap(other.peer, RING);
    stage_close(&stage);
    pair_close(&pair);
}

/* ---- references ---- */

/* A slot keeps its conn, so that it can tell what became of its calls. */
TEST(slot_outlives_its_conn_and_poller)
{
    for (int freed = 0; freed < 2; freed++) {
        struct stage stage;
        struct hand *hand = &stage.hand;
        shmrpc_name name = name_of("m");
        uint64_t position;

        stage_open(&stage, 2, 16);
        shmrpc_slot *slot = shmrpc_slot_new(stage.poller, stage.conn);
        CHECK_EQUAL(shmrpc_send(slot, SHMRPC_REQUEST, 0, 1 << 16 | SHMRPC_PYTHON_INDEX, &name, 0,
                                NULL, 0, NULL, 0, 0, &position), 0);
        shutdown(hand->control_fd, SHUT_RDWR);
        while (shmrpc_conn_status(stage.poller, stage.conn) == 0)
            shmrpc_wait_events(stage.taker, 0);
        CHECK(shmrpc_slot_new(stage.poller, stage.conn) == NULL); /* it is found no more */
        CHECK_EQUAL(shmrpc_outcome_of(slot, 1 << 16 | SHMRPC_PYTHON_INDEX, position),
                    SHMRPC_NOT_STARTED);
        CHECK_EQUAL(shmrpc_send(slot, SHMRPC_CANCEL, 0, 1, NULL, 0, NULL, 0, NULL, 0, 0, &position),
                    -ENOTCONN);
        if (freed == 0)
            shmrpc_slot_free(slot);
        stage_close(&stage);
        if (freed == 1)
            shmrpc_slot_free(slot);
    }
}

TEST(slots_outlive_a_poller_with_its_conn)
{
    struct stage stage;

    stage_open(&stage, 0, 0);
    shmrpc_slot *slot = shmrpc_slot_new(stage.poller, stage.conn);
    shmrpc_slot *worker = shmrpc_worker_new(stage.poller);
    shmrpc_poller_free(stage.poller);
    CHECK_EQUAL(shmrpc_outcome_of(slot, 1, 0), SHMRPC_UNKNOWN);
    shmrpc_slot_free(worker);
    shmrpc_slot_free(slot);
    shmrpc_slot_free(stage.slot);
    shmrpc_slot_free(stage.taker);
    segment_unmap(stage.hand.peer, RING);
    pair_close(&stage.pair);
}

/* A worker that goes with a request gives everything back: the reply, the conn, its place. */
TEST(worker_that_goes_with_a_request)
{
    struct stage stage;
    shmrpc_stats stats;

    stage_open(&stage, 2, 16);
    put_call(&stage, 7, "m", 0);
    CHECK_EQUAL(next(&stage), SHMRPC_MESSAGE);
    CHECK_EQUAL(shmrpc_reply_metadata(stage.slot, "some", 4), 0);
    shmrpc_slot_free(stage.slot);
    stage.slot = shmrpc_worker_new(stage.poller);
    CHECK_EQUAL(replied(&stage, 7), STATUS_CANCELLED);
    shmrpc_poller_stats(stage.poller, &stats);
    CHECK_EQUAL(stats.running, 0);
    CHECK_EQUAL(poller_find(stage.poller, stage.conn)->references, 1);
    CHECK_EQUAL(shmrpc_inherited_deadline(), 0);
    stage_close(&stage);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
