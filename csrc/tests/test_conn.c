/* test_conn.c - messages over one connection: pieces, the outbox, limits, violations, outcomes. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "conn.h"
#include "segment.h"
#include "support.h"

struct ends {
    struct pair pair;
    struct conn conns[2];
    int epoll_fd;
    uint64_t bells;
    bool holds; /* send_message by conn_send_held */
};

static void ends_init(struct ends *ends)
{
    ends->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    ends->bells = 0;
    ends->holds = false;
    for (int side = 0; side < 2; side++) {
        struct epoll_event event = {.events = EPOLLIN};
        REQUIRE(conn_init(&ends->conns[side], &ends->pair.options[side], ends->epoll_fd) == 0);
        int fd = ends->conns[side].control_fd;
        REQUIRE(epoll_ctl(ends->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0);
        ends->pair.given[side] = 1;
    }
}

static void ends_open(struct ends *ends, enum transport transport, uint32_t ring0, uint32_t ring1)
{
    pair_open(&ends->pair, transport, ring0, ring1);
    ends_init(ends);
}

static void ends_close(struct ends *ends)
{
    for (int side = 0; side < 2; side++)
        conn_destroy(&ends->conns[side]);
    pair_close(&ends->pair);
    close(ends->epoll_fd);
}

/* Send a message whose three parts are `bytes` long together. */
static int send_message(struct ends *ends, int side, uint8_t kind, size_t bytes, uint64_t id,
                        uint64_t *position)
{
    uint8_t *payload = malloc(bytes + 1);
    size_t name = kind == SHMRPC_REQUEST || kind == SHMRPC_NOTIFY ? 4 : 0;
    size_t metadata = bytes > 100 ? 50 : 0;
    atomic_u64 at = 0;

    fill(payload, bytes, id);
    struct outgoing message = {
        .header = {.kind = kind, .call_id = id, .method_bytes = (uint16_t)name,
                   .metadata_bytes = (uint32_t)metadata},
        .parts = {{payload, name}, {payload + name, metadata},
                  {payload + name + metadata, bytes - name - metadata}},
    };
    int status = ends->holds ? conn_send_held(&ends->conns[side], &message, &at)
                             : conn_send(&ends->conns[side], &message, &at, &ends->bells);
    if (position != NULL)
        *position = load_relaxed(&at);
    free(payload);
    return status;
}

static int receive(struct ends *ends, int side, struct frame_header *header)
{
    ends->conns[side].stream.readable = true;
    return conn_receive(&ends->conns[side], header, &ends->bells);
}

/* Check and consume the message that `receive` has found. */
static void take(struct ends *ends, int side, const struct frame_header *header, size_t bytes,
                 uint64_t id)
{
    struct conn *conn = &ends->conns[side];

    CHECK_EQUAL(header->total_bytes, bytes);
    CHECK(header->call_id == id);
    CHECK_EQUAL(header->flags, 0);
    uint8_t *copy = malloc(bytes + 1);
    uint8_t *taken = NULL;
    if (id % 2 == 0)
        taken = conn_take_payload(conn);
    if (taken == NULL)
        conn_read(conn, (uint32_t)bytes, copy);
    CHECK(filled(taken != NULL ? taken : copy, bytes, id));
    free(copy);
    free(taken);
    conn_finish(conn, header->length, &ends->bells);
}

/* Both ends in turn until this side has the message. */
static void pass(struct ends *ends, int side, size_t bytes, uint64_t id)
{
    struct frame_header header;
    int status;

    while ((status = receive(ends, side, &header)) == 0)
        REQUIRE(conn_flush(&ends->conns[!side], &ends->bells) == 0);
    REQUIRE(status == 1);
    take(ends, side, &header, bytes, id);
}

TEST(messages_of_all_sizes_both_ways)
{
    static const size_t sizes[] = {4, 5, 99, 101, 1000, 4000, 5000, 16384 - 32, 16384 - 31, 65504,
                                   65505, 1 << 20, 5 << 20};

    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct ends ends;
        harness_progress(HANG_SECONDS);
        ends_open(&ends, (enum transport)transport, 65536, 4096);
        for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            for (int side = 0; side < 2; side++) {
                CHECK(send_message(&ends, side, SHMRPC_REQUEST, sizes[i], i, NULL) >= 0);
                pass(&ends, !side, sizes[i], i);
            }
        }
        CHECK(send_message(&ends, 0, SHMRPC_REPLY, 0, 77, NULL) == 0);
        pass(&ends, 1, 0, 77);
        ends_close(&ends);
    }
}

/* What is held is seen when it is published, or with the next message that is not held: in order. */
TEST(held_messages)
{
    struct frame_header header;
    struct ends ends;
    uint64_t position;

    harness_progress(HANG_SECONDS);
    ends_open(&ends, SHM, 4096, 4096);
    for (uint64_t round = 0; round < 200; round++) { /* past the ring's end, several times */
        uint64_t id = 10 * round;
        conn_hold(&ends.conns[0]);
        ends.holds = true;
        for (unsigned i = 0; i < 3; i++) {
            CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 90, id + i, &position), 0);
            CHECK_EQUAL(receive(&ends, 1, &header), 0);
        }
        CHECK_EQUAL(conn_outcome(&ends.conns[0], id + 2, position), SHMRPC_NOT_STARTED);
        ends.holds = false;
        if (round % 2 == 0)
            conn_publish(&ends.conns[0], round % 4 == 0, &ends.bells);
        else
            CHECK_EQUAL(send_message(&ends, 0, SHMRPC_CANCEL, 0, id + 3, NULL), 0);
        for (unsigned i = 0; i < 3; i++)
            pass(&ends, 1, 90, id + i);
        if (round % 2 != 0)
            pass(&ends, 1, 0, id + 3);
        CHECK_EQUAL(receive(&ends, 1, &header), 0);
    }
    ends_close(&ends);
}

/* A ring that is full of what is held empties all the same. */
TEST(held_messages_fill_the_ring)
{
    struct ends ends;
    unsigned sent = 0;
    int status = 0;

    harness_progress(HANG_SECONDS);
    ends_open(&ends, SHM, 4096, 4096);
    conn_hold(&ends.conns[0]);
    ends.holds = true;
    while ((status = send_message(&ends, 0, SHMRPC_REQUEST, 500, sent, NULL)) == 0)
        sent++;
    CHECK_EQUAL(status, 1); /* it waits: time to publish */
    CHECK(sent >= 6);
    conn_publish(&ends.conns[0], true, &ends.bells);
    for (unsigned i = 0; i <= sent; i++)
        pass(&ends, 1, 500, i);
    CHECK_EQUAL(load_relaxed(&ends.conns[0].outbox_bytes), 0);
    ends_close(&ends);
}

/* Exactly as long as one, two and three frames: no empty last piece. */
TEST(multiples_of_a_frame)
{
    struct ends ends;
    uint32_t frame = ring_frame_max(8192);

    ends_open(&ends, SHM, 8192, 8192);
    for (uint32_t frames = 1; frames <= 4; frames++) {
        for (int more = -1; more <= 1; more++) {
            size_t bytes = (size_t)((int)(frames * frame) + more);
            CHECK(send_message(&ends, 0, SHMRPC_REPLY, bytes, frames, NULL) >= 0);
            pass(&ends, 1, bytes, frames);
        }
    }
    ends_close(&ends);
}

/* Everything that is sent arrives, once and in order, however much waits in the outbox. */
TEST(outbox_keeps_the_order)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct ends ends;
        struct random random = {harness_seed()};
        static uint32_t sizes[2][400];
        unsigned sent[2] = {0}, taken[2] = {0};
        bool waited = false;

        harness_progress(HANG_SECONDS);
        ends_open(&ends, (enum transport)transport, 16384, 8192);
        while (taken[0] < 400 || taken[1] < 400) {
            int side = (int)random_below(&random, 2);
            struct frame_header header;
            if (sent[side] < 400 && random_below(&random, 2)) {
                uint32_t bytes = (uint32_t)random_below(&random, sent[side] % 3 ? 300 : 60000);
                sizes[side][sent[side]] = bytes;
                int status = send_message(&ends, side, SHMRPC_REPLY, bytes, sent[side]++, NULL);
                REQUIRE(status >= 0);
                waited |= status == 1;
                CHECK((load_relaxed(&ends.conns[side].outbox_bytes) != 0) == (status == 1));
            } else if (random_below(&random, 2)) {
                REQUIRE(conn_flush(&ends.conns[side], &ends.bells) == 0);
            } else {
                int status = receive(&ends, !side, &header);
                REQUIRE(status >= 0);
                if (status == 1) {
                    take(&ends, !side, &header, sizes[side][taken[side]], taken[side]);
                    taken[side]++;
                }
            }
        }
        CHECK(waited);
        for (int side = 0; side < 2; side++) {
            CHECK_EQUAL(conn_flush(&ends.conns[side], &ends.bells), 0);
            CHECK_EQUAL(load_relaxed(&ends.conns[side].outbox_bytes), 0);
        }
        ends_close(&ends);
    }
}

/* A full ring asks for space, and is rung when it is there: without it both would sleep. */
TEST(room_rings_the_sender)
{
    struct ends ends;
    struct frame_header header;

    ends_open(&ends, SHM, 8192, 8192);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REPLY, 50000, 0, NULL), 1);
    for (int round = 0; load_relaxed(&ends.conns[0].outbox_bytes) != 0; round++) {
        REQUIRE(round < 200);
        wake_arm(&ends.conns[0].wake); /* the sender sleeps now */
        wake_arm_fence();
        REQUIRE(conn_flush(&ends.conns[0], &ends.bells) == 0); /* as arm_all does */
        uint64_t before = ends.bells;
        int status = receive(&ends, 1, &header); /* frees what there is */
        REQUIRE(status >= 0);
        CHECK(ends.bells > before || load_relaxed(&ends.conns[0].outbox_bytes) == 0);
        wake_disarm(&ends.conns[0].wake);
        REQUIRE(conn_flush(&ends.conns[0], &ends.bells) == 0);
    }
    pass(&ends, 1, 50000, 0);
    ends_close(&ends);
}

/* Whatever waits to be sent on a stream, epoll says when it can go on: also the rest of a frame
 * that the kernel took in part, after a send and after a flush. */
TEST(kept_bytes_ask_for_room)
{
    struct ends ends;
    struct random random = {harness_seed()};
    static uint8_t drain[1 << 20];
    int buffer_bytes = 4096;
    uint64_t waited = 0;

    ends_open(&ends, STREAM, 0, 0);
    struct conn *conn = &ends.conns[0];
    setsockopt(conn->control_fd, SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof buffer_bytes);
    for (uint64_t i = 0; i < 500; i++) {
        size_t bytes = random_below(&random, i % 2 ? 20000 : 100000);
        REQUIRE(send_message(&ends, 0, SHMRPC_REPLY, bytes, i, NULL) >= 0);
        while (load_relaxed(&conn->outbox_bytes) != 0) {
            struct epoll_event events[4];
            bool writable = false;
            waited++;
            while (recv(ends.conns[1].control_fd, drain, sizeof drain, MSG_DONTWAIT) > 0) {
            }
            int count = epoll_wait(ends.epoll_fd, events, 4, 0);
            for (int k = 0; k < count; k++)
                writable |= (events[k].events & EPOLLOUT) != 0;
            REQUIRE(writable);
            REQUIRE(conn_flush(conn, &ends.bells) == 0);
        }
    }
    CHECK(waited > 100);
    ends_close(&ends);
}

TEST(longest_message)
{
    struct ends ends;

    pair_open(&ends.pair, SHM, 65536, 65536);
    ends.pair.options[0].peer_max_message_bytes = 10000;
    ends.pair.options[1].max_message_bytes = 10000;
    ends_init(&ends);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REPLY, 10001, 0, NULL), -EMSGSIZE);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REPLY, 10000, 0, NULL), 0);
    pass(&ends, 1, 10000, 0);
    ends_close(&ends);

    for (int more = 0; more < 2; more++) { /* a peer that does not keep to it, even in pieces */
        struct frame_header header;
        pair_open(&ends.pair, SHM, 65536, 65536);
        ends.pair.options[1].max_message_bytes = 10000;
        ends_init(&ends);
        CHECK(send_message(&ends, 0, SHMRPC_REPLY, more ? 50000 : 10001, 0, NULL) >= 0);
        CHECK_EQUAL(receive(&ends, 1, &header), -EPROTO);
        ends_close(&ends);
    }
}

/* ---- a peer that breaks the rules ---- */

struct violation {
    const char *what;
    struct frame_header frames[3];
    int expected; /* status when the last frame has come */
};

#define MORE SHMRPC_FLAG_MORE
static const struct violation violations[] = {
    {"none", {{.kind = 1, .length = 8, .total_bytes = 8, .method_bytes = 4}}, 1},
    {"none: reply", {{.kind = 2, .method_bytes = 9999, .length = 8, .total_bytes = 8}}, 1},
    {"none: later kind", {{.kind = 77, .length = 8, .total_bytes = 8}}, 1},
    {"none: pieces", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                      {.kind = 4, .length = 4}}, 1},
    {"no method", {{.kind = 1, .length = 8, .total_bytes = 8}}, -EPROTO},
    {"no method in a notification", {{.kind = 3, .length = 8, .total_bytes = 8}}, -EPROTO},
    {"method too long", {{.kind = 1, .length = 300, .total_bytes = 300, .method_bytes = 256}},
     -EPROTO},
    {"method beyond the end", {{.kind = 1, .length = 8, .total_bytes = 8, .method_bytes = 9}},
     -EPROTO},
    {"metadata beyond the end", {{.kind = 2, .length = 8, .total_bytes = 8, .metadata_bytes = 9}},
     -EPROTO},
    {"method and metadata beyond the end",
     {{.kind = 1, .length = 8, .total_bytes = 8, .method_bytes = 4, .metadata_bytes = 5}}, -EPROTO},
    {"sum overflows",
     {{.kind = 1, .length = 8, .total_bytes = 8, .method_bytes = 8, .metadata_bytes = 0xfffffffc}},
     -EPROTO},
    {"unknown flag", {{.kind = 2, .flags = 64, .length = 8, .total_bytes = 8}}, -EPROTO},
    {"all flags", {{.kind = 2, .flags = 255, .length = 8, .total_bytes = 8}}, -EPROTO},
    {"continue without a start", {{.kind = 4, .length = 8, .total_bytes = 8}}, -EPROTO},
    {"total too small", {{.kind = 2, .length = 8, .total_bytes = 7}}, -EPROTO},
    {"total too large", {{.kind = 2, .length = 8, .total_bytes = 9}}, -EPROTO},
    {"total beyond the limit", {{.kind = 2, .flags = MORE, .length = 8, .total_bytes = UINT32_MAX}},
     -EPROTO},
    {"more, and nothing missing", {{.kind = 2, .flags = MORE, .length = 8, .total_bytes = 8}},
     -EPROTO},
    {"more, and nothing in it", {{.kind = 2, .flags = MORE, .length = 0, .total_bytes = 8}},
     -EPROTO},
    {"another message in between", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                                    {.kind = 2, .length = 4, .total_bytes = 4}}, -EPROTO},
    {"piece of another call", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                               {.kind = 4, .length = 4, .call_id = 1}}, -EPROTO},
    {"empty piece", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                     {.kind = 4, .flags = MORE, .length = 0}}, -EPROTO},
    {"last piece too short", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                              {.kind = 4, .length = 3}}, -EPROTO},
    {"last piece too long", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                             {.kind = 4, .length = 5}}, -EPROTO},
    {"more after the end", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                            {.kind = 4, .flags = MORE, .length = 4}}, -EPROTO},
    {"unknown flag in a piece", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 8},
                                 {.kind = 4, .flags = 64, .length = 4}}, -EPROTO},
    {"beyond the end in the third", {{.kind = 2, .flags = MORE, .length = 4, .total_bytes = 12},
                                     {.kind = 4, .flags = MORE, .length = 4},
                                     {.kind = 4, .flags = MORE, .length = 4}}, -EPROTO},
};
#undef MORE

static void violate(const struct violation *violation, enum transport transport)
{
    struct ends ends;
    struct frame_header header;
    static uint8_t payload[400];
    int status = 0;

    ends_open(&ends, transport, 65536, 65536);
    for (int i = 0; i < 3 && violation->frames[i].kind != 0; i++) {
        const struct frame_header *frame = &violation->frames[i];
        struct iovec part = {payload, frame->length};
        CHECK_EQUAL(status, 0); /* the frames before were right */
        if (transport == STREAM)
            REQUIRE(stream_push(&ends.conns[0].stream, frame, &part, 1) == 0);
        else
            REQUIRE(ring_push(&ends.conns[0].producer, frame, &part, 1) == 0);
        status = receive(&ends, 1, &header);
    }
    if (status != violation->expected)
        harness_fail(__FILE__, __LINE__, violation->what);
    ends_close(&ends);
}

TEST(violations)
{
    for (unsigned i = 0; i < sizeof violations / sizeof *violations; i++) {
        violate(&violations[i], SHM);
        violate(&violations[i], STREAM);
    }
}

/* Any header at all: accepted with sizes that are true, or refused. */
TEST(random_headers)
{
    struct random random = {harness_seed()};
    static uint8_t payload[65536];

    for (int run = 0; run < 3000; run++) {
        struct ends ends;
        ends_open(&ends, SHM, 4096, 4096);
        for (int i = 0; i < 12; i++) {
            struct frame_header header;
            uint32_t length = (uint32_t)random_below(&random, 200);
            struct iovec part = {payload, length};
            struct frame_header frame = {
                .length = length,
                .kind = (uint8_t)random_below(&random, 8),
                .flags = (uint8_t)(random_below(&random, 8) ? random_below(&random, 4) : 255),
                .method_bytes = (uint16_t)random_below(&random, i % 4 ? 20 : 65536),
                .call_id = random_below(&random, 2),
                .metadata_bytes = (uint32_t)(random_below(&random, 4) ? random_below(&random, 20)
                                                                      : random_next(&random)),
                .total_bytes = length + (uint32_t)(random_below(&random, 2)
                                                       ? random_below(&random, 300) : 0),
            };
            if (ring_push(&ends.conns[0].producer, &frame, &part, 1) < 0)
                break;
            int status = receive(&ends, 1, &header);
            CHECK(status == 0 || status == 1 || status == -EPROTO);
            if (status < 0)
                break;
            if (status == 1) {
                bool named = header.kind == SHMRPC_REQUEST || header.kind == SHMRPC_NOTIFY;
                CHECK((uint64_t)header.metadata_bytes + (named ? header.method_bytes : 0) <=
                      header.total_bytes);
                conn_read(&ends.conns[1], header.total_bytes, payload);
                conn_finish(&ends.conns[1], header.length, &ends.bells);
            }
        }
        ends_close(&ends);
    }
}

TEST(impossible_ring_sizes)
{
    static const uint32_t sizes[] = {0, 1, 2048, 4097, 12288, 128u << 20, UINT32_MAX};

    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int which = 0; which < 2; which++) {
            struct pair pair;
            struct conn conn;
            pair_open(&pair, SHM, 4096, 4096);
            shmrpc_conn_options options = pair.options[0];
            *(which ? &options.own_ring_bytes : &options.peer_ring_bytes) = sizes[i];
            CHECK_EQUAL(conn_init(&conn, &options, -1), -EINVAL);
            pair_close(&pair);
        }
    }
}

/* ---- what became of a call ---- */

TEST(outcomes)
{
    struct ends ends;
    struct frame_header header;
    uint64_t first, second, third;

    ends_open(&ends, SHM, 8192, 8192);
    struct conn *caller = &ends.conns[0];
    struct segment_shm *peer = ends.conns[1].wake.own;
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 100, 1, &first), 0);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 9000, 2, &second), 1);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 100, 3, &third), 1);
    CHECK_EQUAL(conn_outcome(caller, 1, first), SHMRPC_NOT_STARTED);
    CHECK_EQUAL(conn_outcome(caller, 2, second), SHMRPC_NOT_SENT);
    CHECK_EQUAL(conn_outcome(caller, 3, third), SHMRPC_NOT_SENT);
    REQUIRE(receive(&ends, 1, &header) == 1);
    CHECK_EQUAL(conn_outcome(caller, 1, first), SHMRPC_NOT_STARTED); /* not finished yet */
    store_relaxed(&peer->queued[LAYOUT_QUEUED_MAX - 1], 1);
    take(&ends, 1, &header, 100, 1);
    CHECK_EQUAL(conn_outcome(caller, 1, first), SHMRPC_NOT_STARTED); /* queued */
    store_relaxed(&peer->queued[LAYOUT_QUEUED_MAX - 1], 0);
    CHECK_EQUAL(conn_outcome(caller, 1, first), SHMRPC_UNKNOWN);
    CHECK_EQUAL(conn_outcome(caller, 2, second), SHMRPC_NOT_SENT);
    while (load_relaxed(&caller->outbox_bytes) != 0) {
        int status = receive(&ends, 1, &header); /* takes pieces, finishes nothing */
        REQUIRE(status >= 0);
        if (status == 1)
            break;
        REQUIRE(conn_flush(caller, &ends.bells) == 0);
    }
    CHECK_EQUAL(conn_outcome(caller, 2, second), SHMRPC_NOT_STARTED);
    pass(&ends, 1, 9000, 2);
    REQUIRE(conn_flush(caller, &ends.bells) == 0);
    CHECK_EQUAL(conn_outcome(caller, 2, second), SHMRPC_UNKNOWN);
    CHECK_EQUAL(conn_outcome(caller, 3, third), SHMRPC_NOT_STARTED);
    ends_close(&ends);
}

/* Without an id and a reply, they can't be told apart once they were taken. */
TEST(outcomes_of_notifications)
{
    struct ends ends;
    struct frame_header header;
    uint64_t position;

    ends_open(&ends, SHM, 8192, 8192);
    struct conn *caller = &ends.conns[0];
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_NOTIFY, 100, 0, &position), 0);
    CHECK_EQUAL(conn_outcome(caller, 0, position), SHMRPC_NOT_STARTED);
    REQUIRE(receive(&ends, 1, &header) == 1);
    take(&ends, 1, &header, 100, 0);
    CHECK_EQUAL(conn_outcome(caller, 0, position), SHMRPC_UNKNOWN);
    store_relaxed(&caller->said_goodbye, 1);
    CHECK_EQUAL(conn_outcome(caller, 0, position), SHMRPC_UNKNOWN);
    ends_close(&ends);
}

TEST(outcomes_on_a_stream)
{
    struct ends ends;
    uint64_t position = 0, last = 0;

    ends_open(&ends, STREAM, 0, 0);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 100, 1, &position), 0);
    CHECK_EQUAL(conn_outcome(&ends.conns[0], 1, position), SHMRPC_UNKNOWN);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 8 << 20, 2, &last), 1);
    CHECK_EQUAL(conn_outcome(&ends.conns[0], 2, last), SHMRPC_NOT_SENT);
    ends_close(&ends);
}

/* Whatever the dead peer has left in its segment, an outcome is one of three. */
TEST(outcomes_from_garbage)
{
    struct ends ends;
    struct random random = {harness_seed()};
    uint64_t position;

    ends_open(&ends, SHM, 8192, 8192);
    CHECK_EQUAL(send_message(&ends, 0, SHMRPC_REQUEST, 100, 1, &position), 0);
    struct segment_shm *peer = ends.conns[1].wake.own;
    for (int i = 0; i < 1000; i++) {
        store_relaxed(&peer->head, random_next(&random));
        unsigned place = (unsigned)random_below(&random, LAYOUT_QUEUED_MAX);
        store_relaxed(&peer->queued[place], random_below(&random, 9));
        int outcome = conn_outcome(&ends.conns[0], 1, position);
        CHECK(outcome == SHMRPC_UNKNOWN || outcome == SHMRPC_NOT_STARTED);
    }
    ends_close(&ends);
}

/* The peer's head goes backwards or beyond: -EPROTO as soon as we look at it. */
TEST(hostile_head_ends_sending)
{
    struct ends ends;
    int status = 0;

    ends_open(&ends, SHM, 4096, 4096);
    store_relaxed(&ends.conns[1].wake.own->head, 1ull << 40);
    for (int i = 0; i < 100 && status == 0; i++)
        status = send_message(&ends, 0, SHMRPC_REQUEST, 500, 1, NULL);
    CHECK_EQUAL(status, -EPROTO);
    ends_close(&ends);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
