/* test_blocks.c - buffers beside messages between two pollers in one thread: there and back, room,
 * what is dropped, what outlives, loans, segments that come and go. What hostile peers do is in
 * test_hostile_blocks.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "poller.h"
#include "support.h"

enum { KIB = 1 << 10, MIB = 1 << 20, KEPT_MAX = 4096 };

struct end {
    shmrpc_poller *poller;
    shmrpc_slot *slot;
    uint64_t conn_id;
    /* What came: */
    shmrpc_block blocks[KEPT_MAX]; /* with their leases */
    unsigned kept, messages, rooms;
    uint32_t body_bytes, weight;
    bool drops; /* looks at them and lets the slot give them back */
    bool closed;
};

static struct end ends[2];
static struct pair pair;
/* What was attached and may go with the body: stays until the message was sent. */
static uint8_t *attached[64];
static unsigned attached_count;

static void open_limited(enum transport transport, uint64_t max_bytes)
{
    pair_open(&pair, transport, 65536, 65536);
    for (int side = 0; side < 2; side++) {
        pair.options[side].arena_max_bytes = max_bytes;
        pair.options[side].peer_arena_max_bytes = max_bytes;
        memset(&ends[side], 0, sizeof ends[side]);
        ends[side].poller = shmrpc_poller_new(0, 0, WAIT_AUTO, 1);
        REQUIRE(ends[side].poller != NULL);
        shmrpc_poller_serve_events(ends[side].poller, 0);
        ends[side].conn_id = pair_give(&pair, side, ends[side].poller);
        ends[side].slot = shmrpc_slot_new(ends[side].poller, ends[side].conn_id);
        REQUIRE(ends[side].slot != NULL);
    }
}

static void open_ends(enum transport transport)
{
    open_limited(transport, 64 * MIB);
}

static void close_end(int side)
{
    if (ends[side].poller == NULL)
        return;
    shmrpc_slot_free(ends[side].slot);
    shmrpc_poller_free(ends[side].poller);
    ends[side].poller = NULL;
}

static void give_back(struct end *end, unsigned which)
{
    shmrpc_lease_free(end->blocks[which].lease, end->blocks[which].data);
    end->blocks[which] = end->blocks[--end->kept];
}

static void close_ends(void)
{
    for (int side = 0; side < 2; side++) {
        while (ends[side].kept != 0)
            give_back(&ends[side], 0);
        close_end(side);
    }
    pair_close(&pair);
}

static void take_message(struct end *end)
{
    const shmrpc_message *message = shmrpc_slot_message(end->slot);

    if (message->kind == SHMRPC_CLOSED)
        end->closed = true;
    if (message->kind == SHMRPC_ROOM)
        end->rooms++;
    if (message->kind >= SHMRPC_CLOSED)
        return;
    end->messages++;
    end->body_bytes = (uint32_t)message->body_bytes;
    end->weight = (uint32_t)shmrpc_message_weight(message);
    CHECK(filled(message->body, message->body_bytes, message->body_bytes));
    for (uint32_t i = 0; i < message->block_count; i++) {
        const shmrpc_block *block = &message->blocks[i];
        CHECK(filled(block->data, block->bytes, block->bytes));
        if (end->drops || block->lease == NULL)
            continue;
        REQUIRE(end->kept < KEPT_MAX);
        end->blocks[end->kept] = *block;
        end->blocks[end->kept++].lease = shmrpc_lease_take(end->slot, i);
    }
}

/* Read what has come. */
static void pump(int side)
{
    struct end *end = &ends[side];
    int64_t result;

    while ((result = shmrpc_wait_events(end->slot, 0)) == SHMRPC_EVENTS || result == -EAGAIN)
        while (shmrpc_take(end->slot))
            take_message(end);
    CHECK_EQUAL(result, -ETIMEDOUT);
}

static shmrpc_arena_stats stats_of(int side)
{
    shmrpc_arena_stats stats;

    CHECK_EQUAL(shmrpc_arena_stats_of(ends[side].poller, ends[side].conn_id, &stats), 0);
    return stats;
}

static bool wait_readable(int fd, int timeout_ms)
{
    struct pollfd event = {.fd = fd, .events = POLLIN};

    return poll(&event, 1, timeout_ms) == 1;
}

static int add_segment(int side, uint64_t bytes)
{
    int fd = memory_fd(bytes);
    void *memory = shmrpc_memory_map(fd, bytes);

    REQUIRE(memory != NULL);
    int status = shmrpc_arena_add(ends[side].slot, memory, fd);
    if (status < 0)
        shmrpc_memory_unmap(memory);
    close(fd);
    return status;
}

/* Attach bytes that depend on their number, and grow as a user does. */
static int attach(int side, uint64_t bytes)
{
    shmrpc_slot *slot = ends[side].slot;
    uint8_t *data = malloc(bytes + 1);
    int status;

    fill(data, bytes, bytes);
    while ((status = shmrpc_attach(slot, data, bytes)) == SHMRPC_GROW) {
        pump(side); /* what came back without a bell */
        uint64_t wants = shmrpc_arena_wants(slot, bytes);
        if (wants != 0)
            REQUIRE(add_segment(side, wants) == 0);
    }
    REQUIRE(attached_count < 64);
    attached[attached_count++] = data;
    return status;
}

static int send_kind(int side, uint32_t kind, uint64_t call_id, uint32_t body_bytes)
{
    static char body[100000];
    shmrpc_name name = name_of("a");
    uint64_t position;
    bool named = kind == SHMRPC_REQUEST || kind == SHMRPC_NOTIFY;

    fill((uint8_t *)body, body_bytes, body_bytes);
    int status = shmrpc_send(ends[side].slot, kind, 0, call_id, named ? &name : NULL, 0, NULL, 0,
                             body, body_bytes, 0, &position);
    while (attached_count != 0)
        free(attached[--attached_count]);
    return status;
}

static int send_item(int side, uint32_t body_bytes)
{
    return send_kind(side, SHMRPC_ITEM, 5 << 16 | SHMRPC_PYTHON_INDEX, body_bytes);
}

/* Both read until this end has so many messages. */
static void pass(int side, unsigned messages)
{
    for (int round = 0; ends[side].messages < messages; round++) {
        REQUIRE(round < 1000);
        pump(side);
        pump(!side);
    }
    CHECK_EQUAL(ends[side].messages, messages);
}

static int open_fds(void)
{
    int count = 0;

    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static int64_t wait_blocks(int side, uint64_t bytes, int64_t timeout_ns)
{
    int64_t result = shmrpc_wait_blocks(ends[side].slot, bytes, timeout_ns);

    while (result == -EAGAIN || result == -EINTR)
        result = shmrpc_wait(ends[side].slot);
    return result;
}

/* ---- there and back ---- */

TEST(all_that_carry_values)
{
    static const uint32_t kinds[] = {SHMRPC_REQUEST, SHMRPC_NOTIFY, SHMRPC_REPLY, SHMRPC_ITEM};

    for (int transport = 0; transport < TRANSPORTS; transport++) {
        bool shm = transport != STREAM;
        open_ends((enum transport)transport);
        for (int i = 0; i < 8; i++) {
            int side = i % 2;
            struct end *peer = &ends[!side];
            peer->messages = 0;
            CHECK_EQUAL(attach(side, 20000), !shm);
            CHECK_EQUAL(attach(side, 1 * MIB), !shm);
            CHECK_EQUAL(attach(side, BLOCK_BYTES_MIN - 1), 1); /* goes with the body */
            CHECK_EQUAL(attach(side, BLOCK_BYTES_MIN), !shm);
            uint64_t weight = shmrpc_attached_weight(ends[side].slot);
            CHECK(send_kind(side, kinds[i / 2], 3 << 16 | SHMRPC_PYTHON_INDEX, 77) >= 0);
            pass(!side, 1);
            CHECK_EQUAL(peer->body_bytes, 77);
            CHECK_EQUAL(peer->weight, weight);
            CHECK_EQUAL(peer->kept, shm ? 3 : 0);
            if (!shm)
                continue;
            CHECK_EQUAL(stats_of(side).lent_blocks, 3);
            CHECK_EQUAL(stats_of(!side).leases, 3);
            CHECK(stats_of(!side).leased_bytes == 20000 + 1 * MIB + BLOCK_BYTES_MIN);
            give_back(peer, 1);
            pump(side);
            CHECK_EQUAL(stats_of(side).lent_blocks, 2);
            CHECK(filled(peer->blocks[0].data, 20000, 20000));
            give_back(peer, 0);
            give_back(peer, 0);
            pump(side);
            CHECK_EQUAL(stats_of(side).used_bytes, 0);
            CHECK_EQUAL(stats_of(!side).leases, 0);
        }
        close_ends();
    }
}

/* A message may have a table without entries: its body is of the kind that has one. */
TEST(no_buffers_at_all)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        open_ends((enum transport)transport);
        CHECK_EQUAL(shmrpc_attach(ends[0].slot, NULL, 0), 0);
        CHECK(send_item(0, 500) >= 0);
        CHECK(send_item(0, 500) >= 0); /* and this is an ordinary one again */
        pass(1, 2);
        close_ends();
    }
}

/* Long bodies with long buffers beside them, in pieces, through rings that are full. */
TEST(many_and_long)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct random random = {harness_seed()};
        unsigned sent[2] = {0};
        open_ends((enum transport)transport);
        for (int step = 0; step < 300; step++) {
            int side = (int)random_below(&random, 2);
            if (step % 50 == 0)
                harness_progress(HANG_SECONDS);
            CHECK_EQUAL(shmrpc_attach(ends[side].slot, NULL, 0), 0); /* or items share an event */
            for (uint64_t i = random_below(&random, 6); i-- != 0;)
                CHECK(attach(side, random_below(&random, 60000) + 1) >= 0);
            CHECK(send_item(side, (uint32_t)random_below(&random, 90000)) >= 0);
            sent[side]++;
            pump((int)random_below(&random, 2));
            while (ends[side].kept > 20)
                give_back(&ends[side], (unsigned)random_below(&random, ends[side].kept));
        }
        for (int side = 0; side < 2; side++) {
            pass(!side, sent[side]);
            while (ends[!side].kept != 0)
                give_back(&ends[!side], 0);
            for (int round = 0; transport != STREAM && stats_of(side).used_bytes != 0; round++) {
                REQUIRE(round < 100); /* what did not fit into its ring leaves now */
                pump(side);
                pump(!side);
            }
        }
        close_ends();
    }
}

TEST(ten_thousand_random_orders)
{
    struct random random = {harness_seed()};
    unsigned sent = 0;

    open_ends(SHM);
    for (int step = 0; step < 10000; step++) {
        uint64_t bytes = BLOCK_BYTES_MIN + random_below(&random, step % 10 == 0 ? 500000 : 5000);
        if (step % 1000 == 0)
            harness_progress(HANG_SECONDS);
        CHECK_EQUAL(attach(0, bytes), 0);
        CHECK(send_item(0, (uint32_t)random_below(&random, 50)) >= 0);
        sent++;
        if (random_below(&random, 4) == 0)
            pump(1);
        while (ends[1].kept > 12)
            give_back(&ends[1], (unsigned)random_below(&random, ends[1].kept));
    }
    pass(1, sent);
    pump(0); /* where nothing was left to pass, it has not looked at what came back */
    shmrpc_arena_stats stats = stats_of(0);
    CHECK(stats.bytes <= 32 * MIB);
    CHECK_EQUAL(stats.lent_blocks, ends[1].kept); /* all others have come back */
    while (ends[1].kept != 0)
        give_back(&ends[1], 0);
    pump(0);
    CHECK_EQUAL(stats_of(0).used_bytes, 0);
    close_ends();
}

/* ---- bells ---- */

/* An echo pays no system call for a return; who waits for one is woken. */
TEST(returns_ring_only_who_waits)
{
    for (int transport = SHM; transport <= SHM_SOCKET_BELLS; transport++) {
        shmrpc_stats before, after;
        open_ends((enum transport)transport);
        CHECK_EQUAL(attach(0, 50000), 0);
        CHECK(send_item(0, 10) >= 0);
        pass(1, 1);
        while (!shmrpc_arm(ends[0].slot))
            pump(0);
        give_back(&ends[1], 0);
        CHECK(!wait_readable(shmrpc_poller_fd(ends[0].poller), 0));
        shmrpc_poller_stats(ends[1].poller, &before);
        pump(0); /* not woken, it finds it all the same */
        CHECK_EQUAL(stats_of(0).lent_blocks, 0);

        CHECK_EQUAL(attach(0, 50000), 0);
        CHECK(send_item(0, 10) >= 0);
        pass(1, 2);
        CHECK_EQUAL(shmrpc_want_blocks(ends[0].slot, 200 * MIB), 1);
        while (!shmrpc_arm(ends[0].slot))
            pump(0);
        give_back(&ends[1], 0);
        CHECK(wait_readable(shmrpc_poller_fd(ends[0].poller), HANG_SECONDS * 1000));
        shmrpc_poller_stats(ends[1].poller, &after);
        pump(0);
        CHECK_EQUAL(ends[0].rooms, 1);
        close_ends();
    }
}

/* A ring full of them would keep the rest in the process that returns, where nobody may read. */
TEST(many_returns_ring)
{
    for (int transport = SHM; transport <= SHM_SOCKET_BELLS; transport++) {
        open_ends((enum transport)transport);
        for (unsigned i = 0; i < 1000; i++) {
            CHECK_EQUAL(attach(0, 5000), 0);
            CHECK(send_item(0, 1) >= 0);
            pass(1, i + 1);
        }
        while (!shmrpc_arm(ends[0].slot))
            pump(0);
        while (ends[1].kept != 0)
            give_back(&ends[1], 0);
        CHECK(wait_readable(shmrpc_poller_fd(ends[0].poller), HANG_SECONDS * 1000));
        for (int round = 0; round < 100 && stats_of(0).lent_blocks != 0; round++)
            pump(0);
        CHECK_EQUAL(stats_of(0).lent_blocks, 0);
        close_ends();
    }
}

/* ---- room ---- */

TEST(grows_up_to_its_limit)
{
    open_limited(SHM, 4 * MIB);
    int fds = open_fds();
    uint8_t *data = calloc(1, 8 * MIB);
    shmrpc_slot *slot = ends[0].slot;

    CHECK_EQUAL(stats_of(0).bytes, 0);
    CHECK_EQUAL(shmrpc_attach(slot, data, 100000), SHMRPC_GROW);
    CHECK_EQUAL(shmrpc_arena_wants(slot, 100000), SEGMENT_BYTES_MIN);
    CHECK_EQUAL(add_segment(0, SEGMENT_BYTES_MIN), 0);
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(attach(0, 1 * MIB), 0);
        CHECK(send_item(0, 1) >= 0);
        pass(1, (unsigned)i + 1);
        CHECK_EQUAL(open_fds(), fds); /* none stays open */
    }
    CHECK_EQUAL(shmrpc_attach(slot, data, 2 * MIB), SHMRPC_FULL);
    CHECK_EQUAL(shmrpc_arena_wants(slot, 2 * MIB), 0);
    CHECK(stats_of(0).bytes <= 4 * MIB);
    CHECK_EQUAL(add_segment(0, 4 * MIB), -ENOSPC);
    CHECK_EQUAL(wait_blocks(0, 2 * MIB, 1000000), -ETIMEDOUT);
    while (ends[1].kept != 0)
        give_back(&ends[1], 0);
    CHECK_EQUAL(wait_blocks(0, 1 * MIB, -1), 0);
    CHECK_EQUAL(stats_of(0).used_bytes, 0);
    /* What can never fit goes with the body. */
    CHECK_EQUAL(shmrpc_attach(slot, data, 4 * MIB + 1), 1);
    CHECK_EQUAL(stats_of(0).used_bytes, 0);
    shmrpc_detach(slot);
    free(data);
    close_ends();
}

static void *give_back_later(void *unused)
{
    (void)unused;
    sleep_us(20000);
    give_back(&ends[1], 0);
    return NULL;
}

TEST(waits_for_what_comes_back)
{
    for (int transport = SHM; transport <= SHM_SOCKET_BELLS; transport++) {
        pthread_t thread;
        open_limited((enum transport)transport, 1 * MIB);
        CHECK_EQUAL(attach(0, 600000), 0);
        CHECK(send_item(0, 1) >= 0);
        pass(1, 1);
        CHECK_EQUAL(attach(0, 600000), SHMRPC_FULL);
        REQUIRE(pthread_create(&thread, NULL, give_back_later, NULL) == 0);
        CHECK_EQUAL(wait_blocks(0, 600000, -1), 0);
        pthread_join(thread, NULL);
        CHECK_EQUAL(attach(0, 600000), 0);
        CHECK(send_item(0, 1) >= 0);
        pass(1, 2);
        close_ends();
    }
}

/* Free, but in segments that are too small: they go, and a large one comes. */
TEST(small_segments_make_room_for_a_large_one)
{
    open_limited(SHM, 4 * MIB);
    for (int i = 0; i < 4; i++) {
        CHECK_EQUAL(attach(0, 1 * MIB), 0);
        CHECK(send_item(0, 1) >= 0);
        pass(1, (unsigned)i + 1);
    }
    CHECK_EQUAL(attach(0, 3 * MIB), SHMRPC_FULL);
    while (ends[1].kept != 0)
        give_back(&ends[1], 0);
    pump(0);
    CHECK_EQUAL(attach(0, 3 * MIB), SHMRPC_FULL); /* though all of it is free */
    CHECK_EQUAL(wait_blocks(0, 3 * MIB, 1000000), -ETIMEDOUT);
    CHECK_EQUAL(stats_of(0).bytes, 4 * MIB);
    pump(1); /* lets go */
    CHECK_EQUAL(stats_of(1).peer_bytes, 0);
    CHECK_EQUAL(wait_blocks(0, 3 * MIB, -1), 0);
    CHECK_EQUAL(attach(0, 3 * MIB), 0);
    CHECK(send_item(0, 1) >= 0);
    pass(1, 5);
    close_ends();
}

TEST(idle_memory_goes_back_to_the_system)
{
    open_ends(SHM);
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(attach(0, 3 * MIB), 0);
        CHECK(send_item(0, 1) >= 0);
        pass(1, (unsigned)i + 1);
    }
    uint64_t bytes = stats_of(0).bytes;
    CHECK(bytes >= 9 * MIB);
    CHECK_EQUAL(stats_of(1).peer_bytes, bytes);
    while (ends[1].kept > 1)
        give_back(&ends[1], 1);
    pump(0);
    CHECK_EQUAL(shmrpc_arena_trim(ends[0].poller, ends[0].conn_id, 3600000000000ull), bytes);
    CHECK_EQUAL(shmrpc_arena_trim(ends[1].poller, ends[1].conn_id, 0), bytes); /* the peer's */
    pump(1);
    CHECK_EQUAL(stats_of(1).peer_bytes, bytes); /* not quiet for so long */
    CHECK_EQUAL(shmrpc_arena_trim(ends[0].poller, ends[0].conn_id, 0), bytes);
    pump(1);
    pump(0);
    CHECK(stats_of(0).bytes < bytes && stats_of(0).bytes >= 3 * MIB);
    CHECK_EQUAL(stats_of(1).peer_bytes, stats_of(0).bytes);
    CHECK(filled(ends[1].blocks[0].data, 3 * MIB, 3 * MIB));
    CHECK_EQUAL(attach(0, 5 * MIB), 0); /* and comes again */
    CHECK(send_item(0, 1) >= 0);
    pass(1, 4);
    close_ends();
}

/* ---- what nobody takes ---- */

TEST(dropped_messages_give_their_blocks_back)
{
    static const uint32_t kinds[] = {SHMRPC_REPLY, SHMRPC_REQUEST, SHMRPC_ITEM, SHMRPC_NOTIFY};

    for (unsigned i = 0; i < 4; i++) {
        open_ends(SHM);
        ends[1].drops = true;
        if (kinds[i] == SHMRPC_REQUEST)
            shmrpc_poller_drain(ends[1].poller); /* refused */
        CHECK_EQUAL(attach(0, 20000), 0);
        CHECK_EQUAL(attach(0, 30000), 0);
        /* The reply is one to a slot that does not wait. */
        CHECK(send_kind(0, kinds[i], kinds[i] == SHMRPC_REPLY ? 9 << 16 : 9, 10) >= 0);
        pump(1);
        if (kinds[i] == SHMRPC_ITEM || kinds[i] == SHMRPC_NOTIFY) {
            CHECK_EQUAL(ends[1].messages, 1);
            CHECK_EQUAL(shmrpc_take(ends[1].slot), 0);
            CHECK(send_item(0, 10) >= 0); /* the next one in the same slot */
            pass(1, 2);
        }
        pump(0);
        CHECK_EQUAL(stats_of(0).used_bytes, 0);
        close_ends();
    }
}

TEST(events_that_nobody_takes)
{
    open_ends(SHM);
    CHECK_EQUAL(attach(0, 20000), 0);
    CHECK(send_item(0, 10) >= 0);
    CHECK_EQUAL(shmrpc_wait_events(ends[1].slot, -1), SHMRPC_EVENTS);
    close_end(1);
    close_ends();
}

TEST(what_is_not_sent_stays_ours)
{
    open_limited(SHM, 256 * MIB);
    CHECK_EQUAL(attach(0, 20000), 0);
    CHECK(stats_of(0).used_bytes != 0);
    CHECK_EQUAL(stats_of(0).lent_blocks, 0);
    CHECK_EQUAL(shmrpc_attach(ends[0].slot, NULL, 0), 0); /* begins anew */
    CHECK_EQUAL(stats_of(0).used_bytes, 0);
    CHECK_EQUAL(attach(0, 40 * MIB), 0);
    CHECK_EQUAL(attach(0, 24 * MIB), 0);
    CHECK_EQUAL(send_item(0, 10), -EMSGSIZE); /* more than 64 MiB together */
    CHECK_EQUAL(stats_of(0).used_bytes, 0);
    CHECK_EQUAL(attach(0, 40 * MIB), 0);
    shmrpc_detach(ends[0].slot);
    while (attached_count != 0)
        free(attached[--attached_count]);
    CHECK(send_item(0, 10) >= 0);
    pass(1, 1);
    CHECK_EQUAL(ends[1].kept, 0);
    close_ends();
}

/* ---- what outlives ---- */

TEST(leases_outlive_everything)
{
    for (int first = 0; first < 2; first++) {
        open_ends(SHM);
        CHECK_EQUAL(attach(0, 100000), 0);
        CHECK_EQUAL(attach(0, 200000), 0);
        CHECK(send_item(0, 10) >= 0);
        pass(1, 1);
        close_end(first);
        CHECK(filled(ends[1].blocks[0].data, 100000, 100000));
        give_back(&ends[1], 1);
        close_end(!first);
        CHECK(filled(ends[1].blocks[0].data, 100000, 100000));
        close_ends(); /* gives the other back */
    }
}

TEST(loans_outlive_everything)
{
    shmrpc_loan *loan;
    uint8_t *data;

    open_ends(SHM);
    CHECK_EQUAL(shmrpc_loan_new(ends[0].slot, 100000, &loan, &data), SHMRPC_GROW);
    CHECK_EQUAL(add_segment(0, 1 * MIB), 0);
    CHECK_EQUAL(shmrpc_loan_new(ends[0].slot, 100000, &loan, &data), 0);
    close_ends();
    fill(data, 100000, 1);
    CHECK(filled(data, 100000, 1));
    shmrpc_loan_free(loan, data);
}

/* A child has the memory, and gives nothing back that is its parent's. */
TEST(a_forked_child_returns_nothing)
{
    shmrpc_loan *loan;
    uint8_t *data;

    open_ends(SHM);
    CHECK_EQUAL(attach(0, 100000), 0);
    CHECK_EQUAL(attach(1, 100000), 0);
    CHECK(send_item(0, 10) >= 0);
    shmrpc_detach(ends[1].slot);
    pass(1, 1);
    CHECK_EQUAL(shmrpc_loan_new(ends[1].slot, 5000, &loan, &data), 0);
    pthread_mutex_lock(&poller_find(ends[1].poller, ends[1].conn_id)->send_lock);
    pid_t child = fork();
    if (child == 0) { /* by a thread that the child has not */
        bool good = filled(ends[1].blocks[0].data, 100000, 100000);
        give_back(&ends[1], 0);
        shmrpc_loan_free(loan, data);
        _exit(good ? 0 : 1);
    }
    pthread_mutex_unlock(&poller_find(ends[1].poller, ends[1].conn_id)->send_lock);
    int status;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK_EQUAL(status, 0);
    pump(0);
    CHECK_EQUAL(stats_of(0).lent_blocks, 1);
    CHECK_EQUAL(stats_of(1).loans, 1);
    CHECK(filled(ends[1].blocks[0].data, 100000, 100000));
    shmrpc_loan_free(loan, data);
    give_back(&ends[1], 0);
    pump(0);
    CHECK_EQUAL(stats_of(0).lent_blocks, 0);
    close_ends();
}

/* ---- loans ---- */

TEST(loans_travel_without_a_copy)
{
    shmrpc_slot *slot;
    shmrpc_loan *loan;
    uint8_t *data;

    open_ends(SHM);
    slot = ends[0].slot;
    CHECK_EQUAL(shmrpc_loan_new(slot, 100000, &loan, &data), SHMRPC_GROW);
    CHECK_EQUAL(add_segment(0, 1 * MIB), 0);
    CHECK_EQUAL(shmrpc_loan_new(slot, 100000, &loan, &data), 0);
    uint64_t used = stats_of(0).used_bytes;
    CHECK_EQUAL(stats_of(0).loans, 1);
    fill(data, 100000, 100000);
    CHECK_EQUAL(shmrpc_attach(slot, data, 100000), 2);
    CHECK(send_item(0, 10) >= 0);
    /* Twice, and a part of it: the same block. */
    CHECK_EQUAL(shmrpc_attach(slot, data, 100000), 2);
    CHECK(send_item(0, 10) >= 0);
    CHECK_EQUAL(stats_of(0).used_bytes, used);
    pass(1, 2);
    CHECK_EQUAL(ends[1].kept, 2);
    fill(data, 100000, 5); /* shared, and not copied */
    CHECK(filled(ends[1].blocks[0].data, 100000, 5));
    shmrpc_loan_free(loan, data);
    CHECK_EQUAL(stats_of(0).loans, 0);
    give_back(&ends[1], 0);
    pump(0);
    CHECK_EQUAL(stats_of(0).used_bytes, used); /* one lease is left */
    CHECK(filled(ends[1].blocks[0].data, 100000, 5));
    give_back(&ends[1], 0);
    pump(0);
    CHECK_EQUAL(stats_of(0).used_bytes, 0);
    close_ends();
}

TEST(parts_of_a_loan)
{
    shmrpc_slot *slot;
    shmrpc_loan *loan;
    uint8_t *data;

    open_ends(SHM);
    slot = ends[0].slot;
    CHECK_EQUAL(add_segment(0, 1 * MIB), 0);
    CHECK_EQUAL(shmrpc_loan_new(slot, 100000, &loan, &data), 0);
    fill(data + 10001, 50000, 50000);
    CHECK_EQUAL(shmrpc_attach(slot, data + 10001, 50000), 2);
    CHECK(send_item(0, 10) >= 0);
    pass(1, 1);
    CHECK_EQUAL(ends[1].blocks[0].bytes, 50000);
    data[10001] ^= 1;
    CHECK(!filled(ends[1].blocks[0].data, 50000, 50000));
    shmrpc_loan_free(loan, data);
    close_ends();
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
