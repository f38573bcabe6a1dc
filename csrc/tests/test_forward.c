/* test_forward.c - who stands between: calls of one party passed on to another, both ways, by hand and
 * by ways; what interrupts them, and what makes ways invalid. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "party.h"

static const int64_t MS = 1000000;

enum { THREADS_MAX = 128 };

/* One side of the middle: passes what is asked there on to the other side. */
struct half {
    shmrpc_poller *poller;
    uint64_t conn_id;
    struct half *other;
    bool finds_ways;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t threads[THREADS_MAX];                    /* lock */
    uint32_t thread_count;                             /* lock */
    uint32_t by_hand, further, stale, cancelled, lost; /* lock: calls, and ways that were */
    shmrpc_tally tally;                                /* lock: of threads that have ended */
};

static struct half halves[2];
static struct party client, server;
static struct pair pairs[2];

static void *work(void *argument);

static void start_thread(struct half *half)
{
    pthread_mutex_lock(&half->lock);
    REQUIRE(half->thread_count < THREADS_MAX);
    REQUIRE(pthread_create(&half->threads[half->thread_count++], NULL, work, half) == 0);
    pthread_mutex_unlock(&half->lock);
}

static void count(struct half *half, uint32_t *field)
{
    pthread_mutex_lock(&half->lock);
    ++*field;
    pthread_cond_broadcast(&half->changed);
    pthread_mutex_unlock(&half->lock);
}

static uint32_t now(pthread_mutex_t *lock, const uint32_t *field)
{
    pthread_mutex_lock(lock);
    uint32_t value = *field;
    pthread_mutex_unlock(lock);
    return value;
}

static void await(struct half *half, const uint32_t *field, uint32_t value)
{
    pthread_mutex_lock(&half->lock);
    while (*field < value)
        pthread_cond_wait(&half->changed, &half->lock);
    pthread_mutex_unlock(&half->lock);
}

static bool attend(struct half *half, shmrpc_slot *taker, int64_t status)
{
    if (status == SHMRPC_EVENTS)
        while (shmrpc_take(taker)) {
        }
    else if (status == SHMRPC_SPAWN)
        start_thread(half);
    else
        return status == -EAGAIN || status == -EINTR;
    return true;
}

/* A call that was passed on, to its end. */
static void bring_back(struct half *half, shmrpc_slot *worker, shmrpc_slot *slot,
                       shmrpc_slot *taker, int64_t result)
{
    while (attend(half->other, taker, result))
        result = shmrpc_wait(slot);
    if (result >= 0 || result == SHMRPC_MESSAGE) {
        CHECK_EQUAL(shmrpc_reply_from(worker, slot), 0);
    } else if (result == -ECANCELED) {
        count(half, &half->cancelled);
    } else {
        count(half, &half->lost);
        shmrpc_reply(worker, 14, "lost", 4);
    }
}

static void add_tally(shmrpc_tally *sum, const shmrpc_tally *more)
{
    for (int i = 0; i < 17; i++)
        sum->codes[i] += more->codes[i];
    for (int i = 0; i < 40; i++)
        sum->buckets[i] += more->buckets[i];
    sum->nanoseconds += more->nanoseconds;
    sum->running += more->running;
}

static void *work(void *argument)
{
    struct half *half = argument;
    struct half *other = half->other;
    shmrpc_slot *worker = shmrpc_worker_new(half->poller);
    shmrpc_slot *slot = shmrpc_slot_new(other->poller, other->conn_id);
    shmrpc_slot *taker = shmrpc_slot_new(other->poller, 0);
    shmrpc_tally tally = {0};
    int64_t status;

    REQUIRE(worker != NULL && taker != NULL);
    while ((status = shmrpc_pass(worker)) != SHMRPC_STOPPED) {
        const shmrpc_message *request = shmrpc_slot_message(worker);
        uint64_t epoch = shmrpc_ways_epoch(half->poller);
        if (status == SHMRPC_PASSING) {
            uint64_t since;
            int64_t result = shmrpc_passing(worker, &since);
            CHECK(since != 0);
            count(half, &half->further);
            bring_back(half, worker, slot, taker, result);
        } else if (status >= 0 || status == SHMRPC_MESSAGE) {
            count(half, &half->by_hand);
            /* Without a slot: this thread began after the end of the other's connection. */
            bring_back(half, worker, slot, taker,
                       slot != NULL ? shmrpc_forward(slot, worker, -1) : -EPIPE);
            if (half->finds_ways && slot != NULL)
                shmrpc_way_add(worker, (const char *)request->head, request->method_bytes, slot,
                               -1, &tally, epoch);
        } else if (status == -ESTALE) {
            shmrpc_ways_clear(worker);
            count(half, &half->stale);
        } else {
            REQUIRE(attend(half, worker, status));
        }
    }
    shmrpc_slot_free(taker);
    if (slot != NULL)
        shmrpc_slot_free(slot);
    shmrpc_slot_free(worker);
    pthread_mutex_lock(&half->lock);
    add_tally(&half->tally, &tally);
    pthread_mutex_unlock(&half->lock);
    return NULL;
}

static void open_all(enum transport transport, bool finds_ways, uint32_t mode)
{
    party_open_server(&client, 8, 64, mode);
    party_open_server(&server, 8, 64, mode);
    for (int i = 0; i < 2; i++) {
        halves[i] = (struct half){
            .poller = shmrpc_poller_new(8, 64, mode, 0),
            .other = &halves[1 - i],
            .finds_ways = finds_ways,
            .lock = PTHREAD_MUTEX_INITIALIZER,
            .changed = PTHREAD_COND_INITIALIZER,
        };
        REQUIRE(halves[i].poller != NULL);
        CHECK_EQUAL(shmrpc_method_add(halves[i].poller, "", 0, -1, 1), 0);
        pair_open(&pairs[i], transport, 65536, 65536);
        halves[i].conn_id = pair_give(&pairs[i], 1, halves[i].poller);
    }
    for (int i = 0; i < 2; i++) {
        start_thread(&halves[i]);
        start_thread(&halves[i]);
    }
}

static void join_half(struct half *half)
{
    shmrpc_poller_stop(half->poller);
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&half->lock);
        bool more = i < half->thread_count;
        pthread_t thread = more ? half->threads[i] : pthread_self();
        pthread_mutex_unlock(&half->lock);
        if (!more)
            return;
        pthread_join(thread, NULL);
    }
}

static void close_all(void)
{
    party_close(&client);
    party_close(&server);
    join_half(&halves[0]);
    join_half(&halves[1]);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(halves[i].tally.running, 0);
        shmrpc_poller_free(halves[i].poller);
        pair_close(&pairs[i]);
    }
}

static shmrpc_slot *client_slot(void)
{
    uint64_t conn_id = pair_give(&pairs[0], 0, client.poller);

    pair_give(&pairs[1], 0, server.poller);
    shmrpc_slot *slot = shmrpc_slot_new(client.poller, conn_id);
    REQUIRE(slot != NULL);
    return slot;
}

static bool echoes(shmrpc_slot *slot, size_t bytes, uint64_t seed)
{
    uint8_t *body = malloc(bytes + 1);

    fill(body, bytes, seed);
    int64_t result = party_call(&client, slot, "echo", body, bytes, -1);
    free(body);
    const shmrpc_message *message = shmrpc_slot_message(slot);
    return (result == (int64_t)bytes || result == SHMRPC_MESSAGE) && message->status == 0 &&
           message->body_bytes == bytes && filled(message->body, bytes, seed);
}

TEST(there_and_back)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        for (int ways = 0; ways < 2; ways++) {
            harness_progress(HANG_SECONDS);
            open_all((enum transport)transport, ways != 0, 0);
            shmrpc_slot *slot = client_slot();
            for (uint64_t i = 0; i < 300; i++)
                CHECK(echoes(slot, i % 50 == 0 ? i * 900 : i, i));
            CHECK_EQUAL(party_call(&client, slot, "forget", NULL, 0, -1), SHMRPC_MESSAGE);
            CHECK_EQUAL(shmrpc_slot_message(slot)->status, 1);
            CHECK_EQUAL(party_call(&client, slot, "unknown", NULL, 0, -1), SHMRPC_MESSAGE);
            CHECK_EQUAL(shmrpc_slot_message(slot)->status, 12);
            shmrpc_slot_free(slot);
            close_all();
            uint32_t by_hand = halves[0].by_hand;
            CHECK_EQUAL(halves[0].tally.codes[0] + by_hand, 302);
            CHECK(ways ? by_hand < 30 : by_hand == 302);
        }
    }
}

/* ---- both ways at once ---- */

struct caller {
    pthread_t thread;
    uint64_t seed, conn_id;
    uint32_t good, late;
    bool failed;
};

static void *call_nested(void *argument)
{
    struct caller *caller = argument;
    struct random random = {caller->seed};
    shmrpc_slot *slot = shmrpc_slot_new(client.poller, caller->conn_id);

    REQUIRE(slot != NULL);
    for (int i = 0; i < 60; i++) {
        uint32_t depth = (uint32_t)random_below(&random, 4);
        bool hurried = random_below(&random, 3) == 0;
        int64_t timeout_ns = hurried ? (int64_t)random_below(&random, 400000) : -1;
        int64_t result =
            party_call(&client, slot, "nest", &depth, sizeof depth, timeout_ns);
        caller->good += result == (int64_t)sizeof depth;
        caller->late += hurried && result != (int64_t)sizeof depth;
        if (!hurried && result != (int64_t)sizeof depth)
            caller->failed = true;
    }
    shmrpc_slot_free(slot);
    return NULL;
}

/* Each side passes on to the other, and calls are given up on both: locks in one order. */
TEST(nested_calls_that_are_given_up)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct caller callers[3];
        harness_progress(3 * HANG_SECONDS);
        open_all((enum transport)transport, true, 0);
        uint64_t conn_id = pair_give(&pairs[0], 0, client.poller);
        pair_give(&pairs[1], 0, server.poller);
        for (int i = 0; i < 3; i++) {
            callers[i] = (struct caller){.seed = harness_seed() + (uint64_t)i, .conn_id = conn_id};
            REQUIRE(pthread_create(&callers[i].thread, NULL, call_nested, &callers[i]) == 0);
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(callers[i].thread, NULL);
            CHECK(!callers[i].failed);
            CHECK(callers[i].good != 0);
        }
        close_all();
    }
}

/* ---- ends ---- */

/* A call that blocks at the server, in a thread of its own. */
struct blocked {
    pthread_t thread;
    shmrpc_slot *slot;
    int64_t timeout_ns, result;
};

static void *call_block(void *argument)
{
    struct blocked *blocked = argument;

    blocked->result =
        party_call(&client, blocked->slot, "block", "x", 1, blocked->timeout_ns);
    return NULL;
}

static void begin_block(struct blocked *blocked, shmrpc_slot *slot, int64_t timeout_ns)
{
    uint32_t before = now(&server.lock, &server.blocked_total);

    *blocked = (struct blocked){.slot = slot, .timeout_ns = timeout_ns};
    REQUIRE(pthread_create(&blocked->thread, NULL, call_block, blocked) == 0);
    party_await(&server, &server.blocked_total, before + 1);
}

TEST(callers_that_give_up_or_go)
{
    for (int ways = 0; ways < 2; ways++) {
        struct blocked blocked;
        harness_progress(HANG_SECONDS);
        open_all(SHM, ways != 0, 0);
        shmrpc_slot *slot = client_slot();
        party_gate(&server, true);
        for (int i = 0; i < 8; i++) /* the workers know their ways */
            CHECK_EQUAL(party_call(&client, slot, "block", "x", 1, -1), 1);
        party_gate(&server, false);
        begin_block(&blocked, slot, 30 * MS);
        pthread_join(blocked.thread, NULL);
        /* The deadline is the middle's as well: which of the two sees it first is open. */
        CHECK(blocked.result == -ETIMEDOUT ||
              (blocked.result == SHMRPC_MESSAGE && shmrpc_slot_message(slot)->status != 0));
        shmrpc_stats stats;
        do {
            sleep_us(500);
            shmrpc_poller_stats(halves[0].poller, &stats);
        } while (stats.running != 0);
        begin_block(&blocked, slot, -1);
        uint32_t cancelled = now(&halves[0].lock, &halves[0].cancelled);
        REQUIRE(shmrpc_conn_shutdown(halves[0].poller, halves[0].conn_id) == 0);
        pthread_join(blocked.thread, NULL);
        CHECK_EQUAL(blocked.result, -EPIPE);
        await(&halves[0], &halves[0].cancelled, cancelled + 1);
        shmrpc_slot_free(slot);
        close_all();
    }
}

TEST(a_middle_that_stops)
{
    struct blocked blocked;

    open_all(SHM, true, 0);
    shmrpc_slot *slot = client_slot();
    begin_block(&blocked, slot, -1);
    shmrpc_poller_stop(halves[0].poller);
    await(&halves[0], &halves[0].cancelled, 1);
    CHECK_EQUAL(shmrpc_conn_shutdown(halves[0].poller, halves[0].conn_id), 0);
    join_half(&halves[0]);
    halves[0].thread_count = 0;
    shmrpc_poller_stop(client.poller); /* nobody reads the middle's end any more */
    pthread_join(blocked.thread, NULL);
    shmrpc_slot_free(slot);
    close_all();
}

/* ---- ways ---- */

TEST(ways_that_become_invalid)
{
    struct blocked blocked;

    open_all(SHM, true, 0);
    shmrpc_slot *slot = client_slot();
    party_gate(&server, true);
    for (int i = 0; i < 50; i++)
        CHECK_EQUAL(party_call(&client, slot, "block", "x", 1, -1), 1);
    party_gate(&server, false);
    CHECK_EQUAL(shmrpc_ways_stale(halves[0].poller), 0);
    begin_block(&blocked, slot, -1);
    uint64_t epoch = shmrpc_ways_epoch(halves[0].poller);
    uint32_t by_hand = now(&halves[0].lock, &halves[0].by_hand);
    shmrpc_ways_renew(halves[0].poller);
    CHECK(shmrpc_ways_epoch(halves[0].poller) != epoch);
    /* It goes on as it began, and who asks is told of it. */
    CHECK_EQUAL(shmrpc_ways_stale(halves[0].poller), 1);
    party_gate(&server, true);
    pthread_join(blocked.thread, NULL);
    CHECK_EQUAL(blocked.result, 1);
    await(&halves[0], &halves[0].stale, 1);
    CHECK_EQUAL(shmrpc_ways_stale(halves[0].poller), 0);
    CHECK(echoes(slot, 10, 1));
    await(&halves[0], &halves[0].by_hand, by_hand + 1);
    shmrpc_slot_free(slot);
    close_all();
}

/* Invalid ways are not added, nor mixed with others. */
TEST(ways_of_another_time)
{
    shmrpc_poller *poller = shmrpc_poller_new(1, 1, 0, 0);
    shmrpc_slot *worker = shmrpc_worker_new(poller);
    shmrpc_tally tally = {0};
    uint64_t epoch = shmrpc_ways_epoch(poller);

    CHECK_EQUAL(shmrpc_way_add(worker, "", 0, NULL, -1, &tally, epoch), -EINVAL);
    CHECK_EQUAL(shmrpc_way_add(worker, "a", 1, NULL, -1, &tally, epoch), 0);
    shmrpc_ways_renew(poller);
    CHECK_EQUAL(shmrpc_way_add(worker, "b", 1, NULL, -1, &tally, epoch), -ESTALE);
    epoch = shmrpc_ways_epoch(poller);
    CHECK_EQUAL(shmrpc_way_add(worker, "b", 1, NULL, -1, &tally, epoch), -ESTALE);
    CHECK_EQUAL(shmrpc_pass(worker), -ESTALE);
    shmrpc_ways_clear(worker);
    char name[8];
    for (int i = 0; i < 100; i++) {
        int bytes = snprintf(name, sizeof name, "n%d", i);
        CHECK_EQUAL(shmrpc_way_add(worker, name, (size_t)bytes, NULL, -1, &tally, epoch), 0);
    }
    shmrpc_slot_free(worker);
    shmrpc_poller_free(poller);
}

/* A peer that says that it serves is for who knows how to call it back. */
TEST(callers_that_serve_take_no_way)
{
    open_all(SHM, true, 0);
    shmrpc_slot *slot = client_slot();
    uint64_t position;

    for (int i = 0; i < 30; i++)
        CHECK(echoes(slot, 10, 1));
    CHECK_EQUAL(shmrpc_send(slot, SHMRPC_SERVES, 0, 0, NULL, 0, NULL, 0, NULL, 0, 0, &position),
                0);
    uint32_t by_hand = now(&halves[0].lock, &halves[0].by_hand);
    for (uint32_t i = 1; i <= 20; i++) {
        CHECK(echoes(slot, 10, 1));
        await(&halves[0], &halves[0].by_hand, by_hand + i);
    }
    shmrpc_slot_free(slot);
    close_all();
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
