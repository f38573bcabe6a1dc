/* test_calls.c - the public API with threads: callers and workers over every transport. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "segment.h"
#include "service.h"

static const int64_t MS = 1000000;

/* A service and a client over one connection. */
struct setup {
    struct service service;
    struct pair pair;
    shmrpc_poller *client;
    uint64_t client_conn, server_conn;
};

static void setup_open(struct setup *setup, enum transport transport, uint32_t workers,
                       uint32_t mode)
{
    service_open(&setup->service, workers, 1024, mode);
    setup->client = shmrpc_poller_new(0, 0, mode, 0);
    REQUIRE(setup->client != NULL);
    pair_open(&setup->pair, transport, 65536, 65536);
    setup->client_conn = pair_give(&setup->pair, 0, setup->client);
    setup->server_conn = pair_give(&setup->pair, 1, setup->service.poller);
}

static void setup_close(struct setup *setup)
{
    service_close(&setup->service);
    shmrpc_poller_free(setup->client);
    pair_close(&setup->pair);
}

static shmrpc_slot *slot_of(struct setup *setup)
{
    shmrpc_slot *slot = shmrpc_slot_new(setup->client, setup->client_conn);

    REQUIRE(slot != NULL);
    return slot;
}

/* ---- echo ---- */

struct caller {
    struct setup *setup;
    pthread_t thread;
    uint64_t seed;
    int calls;
    size_t longest;
    bool failed;
};

static void *call_echo(void *argument)
{
    struct caller *caller = argument;
    struct random random = {caller->seed};
    shmrpc_slot *slot = slot_of(caller->setup);

    for (int i = 0; i < caller->calls; i++) {
        size_t most = random_below(&random, 8) == 0 ? caller->longest : 200;
        size_t bytes = random_below(&random, most + 1);
        if (!echo_works(slot, bytes, random_next(&random))) {
            caller->failed = true;
            break;
        }
    }
    shmrpc_slot_free(slot);
    return NULL;
}

static void echo_from_threads(enum transport transport, uint32_t mode, uint32_t workers,
                              int threads, int calls, size_t longest)
{
    struct setup setup;
    struct caller callers[8];

    setup_open(&setup, transport, workers, mode);
    for (int i = 0; i < threads; i++) {
        callers[i] = (struct caller){.setup = &setup, .seed = harness_seed() + (uint64_t)i,
                                     .calls = calls, .longest = longest};
        REQUIRE(pthread_create(&callers[i].thread, NULL, call_echo, &callers[i]) == 0);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(callers[i].thread, NULL);
        CHECK(!callers[i].failed);
    }
    setup_close(&setup);
}

TEST(echo_on_every_transport_and_mode)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        for (uint32_t mode = 0; mode <= 2; mode++) {
            harness_progress(HANG_SECONDS);
            echo_from_threads((enum transport)transport, mode, 4, 1, 300, 200000);
        }
    }
}

TEST(echo_from_many_threads)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        for (int threads = 2; threads <= 8; threads += 3) {
            harness_progress(HANG_SECONDS);
            echo_from_threads((enum transport)transport, threads == 5 ? 2 : 0, 3, threads, 200,
                              100000);
        }
    }
}

/* Requests and replies that are both longer than anything that either side keeps. */
TEST(echo_of_megabytes_from_two_threads)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        harness_progress(HANG_SECONDS);
        echo_from_threads((enum transport)transport, 0, 4, 3, 12, 6 << 20);
    }
}

/* ---- a lock of the program's ---- */

static _Thread_local pthread_mutex_t *program_lock; /* this thread has it */

static int program_held(void)
{
    return program_lock != NULL;
}

static void program_release(void)
{
    if (program_lock != NULL)
        pthread_mutex_unlock(program_lock);
    program_lock = NULL;
}

/* Its handlers need the service's lock, with which they are called here. */
static void *call_locked(void *argument)
{
    struct caller *caller = argument;
    shmrpc_slot *slot = slot_of(caller->setup);

    for (int i = 0; i < caller->calls && !caller->failed; i++) {
        pthread_mutex_lock(&caller->setup->service.lock);
        program_lock = &caller->setup->service.lock;
        caller->failed = call(slot, "note", (const uint8_t *)"abc", 3, -1) < 0;
        program_release();
    }
    shmrpc_slot_free(slot);
    return NULL;
}

TEST(program_lock_is_let_go_before_a_sleep)
{
    shmrpc_use_lock(program_held, program_release);
    for (int variant = 0; variant < TRANSPORTS * 3; variant++) {
        struct setup setup;
        struct caller callers[3];
        setup_open(&setup, (enum transport)(variant / 3), 2, (uint32_t)variant % 3);
        harness_progress(HANG_SECONDS);
        for (int i = 0; i < 3; i++) {
            callers[i] = (struct caller){.setup = &setup, .calls = 40};
            REQUIRE(pthread_create(&callers[i].thread, NULL, call_locked, &callers[i]) == 0);
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(callers[i].thread, NULL);
            CHECK(!callers[i].failed);
        }
        shmrpc_slot *slot = slot_of(&setup);
        pthread_mutex_lock(&setup.service.lock);
        program_lock = &setup.service.lock;
        CHECK_EQUAL(events(slot, 2 * MS), -ETIMEDOUT);
        CHECK(program_lock == NULL); /* also without a reply to wait for */
        shmrpc_slot_free(slot);
        setup_close(&setup);
    }
    shmrpc_use_lock(NULL, NULL);
}

struct bare_peer {
    pthread_mutex_t lock;
    shmrpc_bare *bare;
    int status;
};

static void *send_locked(void *argument)
{
    struct bare_peer *peer = argument;

    pthread_mutex_lock(&peer->lock);
    peer->status = shmrpc_bare_send(peer->bare, "answer", 6);
    pthread_mutex_unlock(&peer->lock);
    return NULL;
}

TEST(program_lock_is_let_go_by_who_waits_on_bare_rings)
{
    enum { RING_BYTES = 4096 };
    void *memory = aligned_alloc(4096, (shmrpc_bare_bytes(RING_BYTES) + 4095) / 4096 * 4096);
    REQUIRE(memory != NULL);
    memset(memory, 0, shmrpc_bare_bytes(RING_BYTES));
    shmrpc_bare *bare = shmrpc_bare_new(memory, RING_BYTES, 0);
    struct bare_peer peer = {.lock = PTHREAD_MUTEX_INITIALIZER,
                             .bare = shmrpc_bare_new(memory, RING_BYTES, 1)};
    pthread_t thread;
    uint8_t body[16];

    shmrpc_use_lock(program_held, program_release);
    pthread_mutex_lock(&peer.lock);
    program_lock = &peer.lock;
    REQUIRE(pthread_create(&thread, NULL, send_locked, &peer) == 0);
    CHECK_EQUAL(shmrpc_bare_receive(bare, body, sizeof body), 6);
    CHECK(program_lock == NULL);
    pthread_join(thread, NULL);
    CHECK_EQUAL(peer.status, 0);
    shmrpc_use_lock(NULL, NULL);
    shmrpc_bare_free(bare);
    shmrpc_bare_free(peer.bare);
    free(memory);
}

TEST(main_thread_calls)
{
    struct setup setup;

    setup_open(&setup, SHM, 2, 2);
    shmrpc_slot *slot = slot_of(&setup);
    for (size_t bytes = 0; bytes < 3000; bytes += 37)
        CHECK(echo_works(slot, bytes, bytes));
    CHECK(echo_works(slot, 3 << 20, 7));
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

TEST(error_replies_and_unknown_methods)
{
    struct setup setup;

    setup_open(&setup, SHM, 2, 0);
    shmrpc_slot *slot = slot_of(&setup);
    const shmrpc_message *message = shmrpc_slot_message(slot);
    CHECK_EQUAL(call(slot, "fail", (const uint8_t *)"why", 3, -1), SHMRPC_MESSAGE);
    CHECK_EQUAL(message->status, 2);
    CHECK_EQUAL(message->metadata_bytes, 4);
    CHECK(memcmp(message->head, "meta", 4) == 0);
    CHECK(message->body_bytes == 3 && memcmp(message->body, "why", 3) == 0);
    CHECK_EQUAL(call(slot, "nothing", NULL, 0, -1), SHMRPC_MESSAGE);
    CHECK_EQUAL(message->status, 12);
    CHECK(echo_works(slot, 10, 1));
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

TEST(result_longer_than_the_caller_accepts)
{
    struct setup setup;

    service_open(&setup.service, 2, 16, 0);
    setup.client = shmrpc_poller_new(0, 0, 0, 0);
    pair_open(&setup.pair, SHM, 65536, 65536);
    setup.pair.options[0].max_message_bytes = 1 << 20;
    setup.pair.options[1].peer_max_message_bytes = 1 << 20;
    setup.client_conn = pair_give(&setup.pair, 0, setup.client);
    pair_give(&setup.pair, 1, setup.service.poller);
    shmrpc_slot *slot = slot_of(&setup);
    CHECK_EQUAL(call(slot, "large", NULL, 0, -1), SHMRPC_MESSAGE);
    CHECK_EQUAL(shmrpc_slot_message(slot)->status, 8);
    CHECK(echo_works(slot, 10, 1));
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

/* A single request of more than 64 MB to an idle server is not "too many". */
TEST(one_very_long_request)
{
    struct setup setup;

    service_open(&setup.service, 2, 16, 0);
    setup.client = shmrpc_poller_new(0, 0, 0, 0);
    pair_open(&setup.pair, SHM, 1 << 20, 1 << 20);
    for (int side = 0; side < 2; side++) {
        setup.pair.options[side].max_message_bytes = 100 << 20;
        setup.pair.options[side].peer_max_message_bytes = 100 << 20;
    }
    setup.client_conn = pair_give(&setup.pair, 0, setup.client);
    pair_give(&setup.pair, 1, setup.service.poller);
    shmrpc_slot *slot = slot_of(&setup);
    CHECK(echo_works(slot, 70 << 20, 1));
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

/* ---- deadlines and giving up ---- */

TEST(deadline_passes_and_the_late_reply_is_dropped)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct setup setup;
        shmrpc_stats stats;

        setup_open(&setup, (enum transport)transport, 2, 0);
        shmrpc_slot *slot = slot_of(&setup);
        CHECK_EQUAL(call(slot, "block", NULL, 0, 20 * MS), -ETIMEDOUT);
        CHECK(echo_works(slot, 10, 1));
        service_gate(&setup.service, true);
        do { /* calls, until the late one has come in */
            CHECK(echo_works(slot, 10, 2));
            shmrpc_poller_stats(setup.client, &stats);
        } while (stats.late_replies == 0);
        int64_t result = call(slot, "echo", NULL, 0, 0);
        CHECK(result == -ETIMEDOUT || /* we, or the server, says so */
              (result == SHMRPC_MESSAGE && shmrpc_slot_message(slot)->status == 4));
        shmrpc_slot_free(slot);
        setup_close(&setup);
    }
}

static void *wait_for_notice(void *argument)
{
    struct service *service = argument;

    service_await(service, &service->blocked_total, 1);
    return NULL;
}

TEST(abandoned_call)
{
    struct setup setup;
    shmrpc_name name = name_of("block");

    setup_open(&setup, SHM, 2, 2);
    shmrpc_slot *slot = slot_of(&setup);
    CHECK_EQUAL(shmrpc_call(slot, &name, NULL, 0, -1), -EAGAIN); /* main thread */
    wait_for_notice(&setup.service);
    shmrpc_abandon(slot);
    CHECK(echo_works(slot, 100, 1));
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

static void *call_block(void *argument)
{
    struct caller *caller = argument;
    shmrpc_slot *slot = slot_of(caller->setup);

    int64_t result = call(slot, "block", NULL, 0, 30000 * MS);
    caller->failed = result != 0;
    caller->seed = (uint64_t)result;
    caller->calls = shmrpc_slot_message(slot)->outcome;
    shmrpc_slot_free(slot);
    return NULL;
}

static void start_blocked(struct setup *setup, struct caller *callers, int count)
{
    for (int i = 0; i < count; i++) {
        callers[i] = (struct caller){.setup = setup};
        REQUIRE(pthread_create(&callers[i].thread, NULL, call_block, &callers[i]) == 0);
    }
}

/* ---- handlers that block ---- */

TEST(blocked_handlers_do_not_hold_up_others)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct setup setup;
        struct caller callers[3];

        harness_progress(HANG_SECONDS);
        setup_open(&setup, (enum transport)transport, 4, 0);
        shmrpc_slot *slot = slot_of(&setup);
        start_blocked(&setup, callers, 3);
        service_await(&setup.service, &setup.service.blocked, 3);
        for (int i = 0; i < 50; i++)
            CHECK(echo_works(slot, 100, 1));
        service_gate(&setup.service, true);
        for (int i = 0; i < 3; i++) {
            pthread_join(callers[i].thread, NULL);
            CHECK(!callers[i].failed);
        }
        CHECK(setup.service.thread_count <= 5); /* workers + 1 */
        shmrpc_slot_free(slot);
        setup_close(&setup);
    }
}

/* All workers block: the next calls queue, and run when there is a worker again. */
TEST(queued_calls_run_later)
{
    struct setup setup;
    struct caller callers[6];
    shmrpc_stats stats;

    setup_open(&setup, SHM, 2, 0);
    start_blocked(&setup, callers, 6);
    do {
        sleep_us(1000);
        shmrpc_poller_stats(setup.service.poller, &stats);
    } while (stats.running != 2 || stats.queued != 4);
    service_await(&setup.service, &setup.service.blocked, 2);
    service_gate(&setup.service, true);
    for (int i = 0; i < 6; i++) {
        pthread_join(callers[i].thread, NULL);
        CHECK(!callers[i].failed);
    }
    setup_close(&setup);
}

TEST(refused_beyond_max_concurrency)
{
    struct setup setup;
    struct caller callers[3];
    shmrpc_stats stats;

    setup_open(&setup, SHM, 1, 0);
    shmrpc_poller_free(setup.client); /* a service of its own, with max_concurrency 3 */
    service_close(&setup.service);
    pair_close(&setup.pair);
    service_open(&setup.service, 1, 3, 0);
    setup.client = shmrpc_poller_new(0, 0, 0, 0);
    pair_open(&setup.pair, SHM, 65536, 65536);
    setup.client_conn = pair_give(&setup.pair, 0, setup.client);
    pair_give(&setup.pair, 1, setup.service.poller);
    shmrpc_slot *slot = slot_of(&setup);
    start_blocked(&setup, callers, 3);
    do {
        sleep_us(1000);
        shmrpc_poller_stats(setup.service.poller, &stats);
    } while (stats.running + stats.queued != 3);
    CHECK_EQUAL(call(slot, "echo", NULL, 0, -1), SHMRPC_MESSAGE);
    CHECK_EQUAL(shmrpc_slot_message(slot)->status, 8);
    service_gate(&setup.service, true);
    for (int i = 0; i < 3; i++)
        pthread_join(callers[i].thread, NULL);
    CHECK(echo_works(slot, 10, 1));
    shmrpc_poller_drain(setup.service.poller);
    CHECK_EQUAL(call(slot, "echo", NULL, 0, -1), SHMRPC_MESSAGE);
    CHECK_EQUAL(shmrpc_slot_message(slot)->status, 14);
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

/* More calls queued from one conn than its segment can list (448), then all run. */
TEST(queue_table_full)
{
    enum { CALLS = 700 };
    struct setup setup;
    shmrpc_name name = name_of("block");
    uint64_t position;
    int replies = 0;

    setup_open(&setup, SHM, 2, 0);
    shmrpc_slot *slot = slot_of(&setup);
    for (uint64_t i = 1; i <= CALLS; i++)
        CHECK(shmrpc_send(slot, SHMRPC_REQUEST, 0, i << 16 | SHMRPC_PYTHON_INDEX, &name, 0, NULL, 0,
                          "x", 1, 0, &position) >= 0);
    sleep_us(20000);
    service_gate(&setup.service, true);
    while (replies < CALLS) {
        events(slot, 100 * MS);
        while (shmrpc_take(slot))
            replies += shmrpc_slot_message(slot)->kind == SHMRPC_REPLY;
    }
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

/* ---- the end of either side ---- */

static void hang_up_ends_every_wait(enum transport transport, int how)
{
    struct setup setup;
    struct caller callers[4];

    setup_open(&setup, transport, 8, 0);
    start_blocked(&setup, callers, 4);
    service_await(&setup.service, &setup.service.blocked, 4);
    if (how == 0)
        CHECK_EQUAL(shmrpc_conn_shutdown(setup.client, setup.client_conn), 0);
    else
        CHECK_EQUAL(shmrpc_conn_shutdown(setup.service.poller, setup.server_conn), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(callers[i].thread, NULL);
        CHECK_EQUAL(callers[i].seed, -EPIPE);
        CHECK_EQUAL(callers[i].calls, SHMRPC_UNKNOWN);
    }
    service_await(&setup.service, &setup.service.closed, 1);
    shmrpc_slot *slot = slot_of(&setup);
    CHECK_EQUAL(call(slot, "echo", NULL, 0, -1), -ENOTCONN);
    CHECK_EQUAL(shmrpc_conn_status(setup.client, setup.client_conn), -EPIPE);
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

TEST(hang_up_ends_every_wait)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        for (int how = 0; how < 2; how++) {
            harness_progress(HANG_SECONDS);
            hang_up_ends_every_wait((enum transport)transport, how);
        }
    }
}

TEST(stop_ends_every_wait)
{
    struct setup setup;
    struct caller callers[4];

    setup_open(&setup, SHM, 8, 0);
    start_blocked(&setup, callers, 4);
    service_await(&setup.service, &setup.service.blocked, 4);
    shmrpc_poller_stop(setup.client);
    for (int i = 0; i < 4; i++) {
        pthread_join(callers[i].thread, NULL);
        CHECK_EQUAL(callers[i].seed, SHMRPC_STOPPED);
    }
    setup_close(&setup);
}

/* A server that stops says that what it has not answered was not started; not while it runs. */
TEST(goodbye_tells_what_became_of_calls)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct setup setup;
        struct caller blocked;
        shmrpc_name name = name_of("echo");
        const uint64_t call_id = 1 << 16 | SHMRPC_PYTHON_INDEX;
        uint64_t position;

        harness_progress(HANG_SECONDS);
        setup_open(&setup, (enum transport)transport, 1, 0);
        shmrpc_poller *server = setup.service.poller;
        shmrpc_slot *slot = slot_of(&setup);
        start_blocked(&setup, &blocked, 1);
        service_await(&setup.service, &setup.service.blocked, 1);
        CHECK_EQUAL(shmrpc_conn_goodbye(server, setup.server_conn), -EBUSY);
        service_gate(&setup.service, true);
        pthread_join(blocked.thread, NULL);
        shmrpc_poller_drain(server);
        service_join(&setup.service);
        CHECK(shmrpc_send(slot, SHMRPC_REQUEST, 0, call_id, &name, 0, NULL, 0, "x", 1, 0,
                          &position) >= 0);
        CHECK_EQUAL(shmrpc_conn_goodbye(server, setup.server_conn), 0);
        CHECK_EQUAL(shmrpc_conn_shutdown(server, setup.server_conn), 0);
        CHECK_EQUAL(events(slot, -1), SHMRPC_EVENTS);
        CHECK_EQUAL(shmrpc_take(slot), 1);
        CHECK_EQUAL(shmrpc_slot_message(slot)->kind, SHMRPC_CLOSED);
        CHECK_EQUAL(shmrpc_outcome_of(slot, call_id, position), SHMRPC_NOT_STARTED);
        CHECK_EQUAL(call(slot, "echo", NULL, 0, -1), -ENOTCONN);
        shmrpc_slot_free(slot);
        setup_close(&setup);
    }
}

static void flush_after_the_end(enum transport transport)
{
    struct pair pair;
    shmrpc_poller *client = shmrpc_poller_new(0, 0, 2, 0);
    shmrpc_name name = name_of("echo");
    char *body = calloc(1, 1 << 20);
    uint64_t position;

    pair_open(&pair, transport, 65536, 65536);
    uint64_t id = pair_give(&pair, 0, client);
    shmrpc_slot *slot = shmrpc_slot_new(client, id);
    CHECK_EQUAL(shmrpc_send(slot, SHMRPC_NOTIFY, 0, 0, &name, 0, NULL, 0, body, 1 << 20, 0,
                            &position), 1);
    shutdown(pair.options[1].control_fd, SHUT_RDWR);
    CHECK_EQUAL(flush(slot, 2000 * MS), -EPIPE);
    CHECK_EQUAL(flush(slot, 2000 * MS), -EPIPE); /* and once more */
    CHECK_EQUAL(shmrpc_outcome_of(slot, 1, position), SHMRPC_NOT_SENT);
    shmrpc_slot_free(slot);
    shmrpc_poller_free(client);
    pair_close(&pair);
    free(body);
}

TEST(flush_ends_with_the_connection)
{
    flush_after_the_end(SHM);
    flush_after_the_end(STREAM);
}

/* ---- futures ---- */

static void futures_over(enum transport transport, int64_t timeout_ns)
{
    enum { CALLS = 200 };
    struct setup setup;
    shmrpc_name name = name_of("echo");
    uint8_t body[3000];
    bool seen[CALLS] = {false};
    int replies = 0;
    uint64_t position;

    setup_open(&setup, transport, 4, 0);
    shmrpc_slot *slot = slot_of(&setup);
    for (uint64_t i = 0; i < CALLS; i++) {
        fill(body, sizeof body, i);
        int status = shmrpc_send(slot, SHMRPC_REQUEST, 0, (i + 1) << 16 | SHMRPC_PYTHON_INDEX,
                                 &name, 0, NULL, 0, (const char *)body, sizeof body, 0, &position);
        CHECK(status == 0 || status == 1);
    }
    for (int tries = 0; replies < CALLS && tries < 1000000; tries++) {
        int64_t result = events(slot, timeout_ns);
        CHECK(result == SHMRPC_EVENTS || result == -ETIMEDOUT);
        while (shmrpc_take(slot)) {
            const shmrpc_message *message = shmrpc_slot_message(slot);
            uint64_t index = (message->call_id >> 16) - 1;
            REQUIRE(index < CALLS);
            CHECK(!seen[index]);
            seen[index] = true;
            CHECK(message->body_bytes == sizeof body && filled(message->body, sizeof body, index));
            replies++;
        }
        if (timeout_ns == 0)
            sleep_us(20);
    }
    CHECK_EQUAL(replies, CALLS);
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

TEST(futures)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        harness_progress(HANG_SECONDS);
        futures_over((enum transport)transport, 1000 * MS);
    }
}

/* As an event loop does that waits elsewhere: looking once finds what is there. */
TEST(futures_by_looking_once)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        harness_progress(HANG_SECONDS);
        futures_over((enum transport)transport, 0);
    }
}

static void *poke_later(void *argument)
{
    sleep_us(5000);
    shmrpc_poke(argument);
    return NULL;
}

TEST(poke_ends_a_wait_for_events)
{
    struct setup setup;
    pthread_t thread;

    setup_open(&setup, SHM, 2, 2);
    shmrpc_slot *slot = slot_of(&setup);
    for (int i = 0; i < 20; i++) {
        REQUIRE(pthread_create(&thread, NULL, poke_later, slot) == 0);
        int64_t result;
        while ((result = shmrpc_wait_events(slot, -1)) == -EAGAIN) {
        }
        CHECK_EQUAL(result, 0);
        pthread_join(thread, NULL);
    }
    shmrpc_poke(slot); /* while nobody waits: the next wait ends at once */
    CHECK_EQUAL(shmrpc_wait_events(slot, -1), 0);
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

TEST(closed_event_comes_to_those_who_wait_for_events)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct setup setup;
        setup_open(&setup, (enum transport)transport, 2, 0);
        shmrpc_slot *slot = slot_of(&setup);
        shmrpc_conn_shutdown(setup.service.poller, setup.server_conn);
        CHECK_EQUAL(events(slot, -1), SHMRPC_EVENTS);
        CHECK_EQUAL(shmrpc_take(slot), 1);
        CHECK_EQUAL(shmrpc_slot_message(slot)->kind, SHMRPC_CLOSED);
        CHECK_EQUAL(shmrpc_slot_message(slot)->status, EPIPE);
        shmrpc_slot_free(slot);
        setup_close(&setup);
    }
}

/* A main thread that waits for events alone gets -EAGAIN and comes back by shmrpc_wait. */
TEST(wait_goes_on_after_events)
{
    struct setup setup;
    shmrpc_name name = name_of("block");

    setup_open(&setup, SHM, 4, 2);
    shmrpc_slot *slot = slot_of(&setup);
    int64_t result = shmrpc_call(slot, &name, "ab", 2, -1);
    service_await(&setup.service, &setup.service.blocked, 1);
    uint64_t position;
    shmrpc_name echo = name_of("echo");
    CHECK(shmrpc_send(slot, SHMRPC_REQUEST, 0, 5 << 16 | SHMRPC_PYTHON_INDEX, &echo, 0, NULL, 0,
                      "xyz", 3, 0, &position) >= 0);
    CHECK_EQUAL(wait_on(slot, result), SHMRPC_EVENTS);
    shmrpc_slot *other = slot_of(&setup);
    CHECK_EQUAL(shmrpc_take(other), 1);
    CHECK_EQUAL(shmrpc_slot_message(other)->body_bytes, 3);
    service_gate(&setup.service, true);
    CHECK_EQUAL(wait_on(slot, shmrpc_wait(slot)), 2);
    shmrpc_slot_free(slot);
    shmrpc_slot_free(other);
    setup_close(&setup);
}

TEST(notifications)
{
    struct setup setup;
    shmrpc_name name = name_of("note");
    uint64_t position;

    setup_open(&setup, STREAM, 2, 0);
    shmrpc_slot *slot = slot_of(&setup);
    for (int i = 0; i < 500; i++)
        CHECK(shmrpc_send(slot, SHMRPC_NOTIFY, 0, 0, &name, 0, NULL, 0, "hello", 5, 0,
                          &position) >= 0);
    CHECK_EQUAL(flush(slot, -1), 0);
    service_await(&setup.service, &setup.service.notes, 500);
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

/* ---- signals ---- */

static void on_signal(int number)
{
    (void)number;
}

/* A signal to any worker, in whatever role it is, must do no harm. */
TEST(signals_to_workers)
{
    struct setup setup;
    struct caller callers[3];
    struct sigaction action = {.sa_handler = on_signal}; /* no SA_RESTART, as Python does it */
    struct random random = {harness_seed()};

    sigaction(SIGUSR1, &action, NULL);
    setup_open(&setup, SHM, 4, 2);
    shmrpc_slot *slot = slot_of(&setup);
    start_blocked(&setup, callers, 3); /* makes threads */
    service_await(&setup.service, &setup.service.blocked, 3);
    service_gate(&setup.service, true);
    for (int i = 0; i < 3; i++)
        pthread_join(callers[i].thread, NULL);
    for (int i = 0; i < 300; i++) {
        pthread_mutex_lock(&setup.service.lock);
        pthread_t thread = setup.service.threads[random_below(&random, setup.service.thread_count)];
        pthread_mutex_unlock(&setup.service.lock);
        pthread_kill(thread, SIGUSR1);
        if (i % 3 == 0)
            sleep_us(200);
        CHECK(echo_works(slot, 10, 1));
    }
    shmrpc_slot_free(slot);
    setup_close(&setup);
}

/* ---- unfair peers ---- */

enum { FLOOD_RING = 64 << 20, FLOOD_FRAMES = FLOOD_RING / FRAME_HEADER_BYTES };

/* A peer whose ring holds two million frames: nobody reads them in a few milliseconds. */
static void flood_open(struct hand *hand, struct pair *pair, uint8_t kind)
{
    const struct frame_header header = {.kind = kind, .call_id = 77};

    pair_open(pair, SHM, 65536, FLOOD_RING);
    hand_open(hand, pair);
    for (uint32_t offset = 0; offset < FLOOD_RING; offset += FRAME_HEADER_BYTES)
        memcpy(hand->own->ring + offset, &header, FRAME_HEADER_BYTES);
    store_release(&hand->own->tail, FLOOD_RING);
    hand_ring(hand);
}

static void flood_close(struct hand *hand, struct pair *pair)
{
    segment_unmap(hand->peer, 65536);
    pair_close(pair);
}

/* A server that sends frames nobody asked for, without a pause, does not stop the clock. */
TEST(flood_of_replies_does_not_stop_deadlines)
{
    for (uint32_t mode = 0; mode <= 2; mode++) {
        struct pair pair;
        struct hand hand;
        shmrpc_stats stats;
        shmrpc_poller *client = shmrpc_poller_new(0, 0, mode, 0);

        harness_progress(HANG_SECONDS);
        flood_open(&hand, &pair, SHMRPC_REPLY);
        shmrpc_slot *slot = shmrpc_slot_new(client, pair_give(&pair, 0, client));
        CHECK_EQUAL(call(slot, "echo", NULL, 0, 5 * MS), -ETIMEDOUT);
        shmrpc_poller_stats(client, &stats);
        CHECK(stats.frames_received < FLOOD_FRAMES);
        shmrpc_slot_free(slot);
        shmrpc_poller_free(client);
        flood_close(&hand, &pair);
    }
}

/* A client that sends without a pause does not keep others from being heard. */
TEST(flooding_client_does_not_starve_others)
{
    for (uint32_t mode = 0; mode <= 2; mode++) {
        struct setup setup;
        struct pair pair;
        struct hand hand;
        shmrpc_stats stats;

        harness_progress(HANG_SECONDS);
        setup_open(&setup, SHM, 2, mode);
        flood_open(&hand, &pair, 50); /* a kind that is read and dropped */
        shmrpc_slot *slot = slot_of(&setup);
        sleep_us(5000); /* everything is cold */
        pair_give(&pair, 0, setup.service.poller);
        hand_ring(&hand);
        CHECK_EQUAL(call(slot, "echo", NULL, 0, -1), 0);
        shmrpc_poller_stats(setup.service.poller, &stats);
        CHECK(stats.frames_received < FLOOD_FRAMES);
        shmrpc_slot_free(slot);
        setup_close(&setup);
        flood_close(&hand, &pair);
    }
}

/* A client that asks for megabytes and does not fetch them neither keeps others from being heard
 * nor keeps the server busy. */
static void greedy_client(enum transport transport, uint32_t mode)
{
    struct setup setup;
    struct pair pair;
    shmrpc_name name = name_of("large");
    shmrpc_poller *greedy = shmrpc_poller_new(0, 0, 0, 0);
    uint64_t position;
    shmrpc_stats stats;

    setup_open(&setup, transport, 2, mode);
    pair_open(&pair, transport, 65536, 65536);
    shmrpc_slot *asker = shmrpc_slot_new(greedy, pair_give(&pair, 0, greedy));
    pair_give(&pair, 1, setup.service.poller);
    for (uint64_t i = 1; i <= 8; i++) {
        shmrpc_send(asker, SHMRPC_REQUEST, 0, i << 16 | SHMRPC_PYTHON_INDEX, &name, 0, NULL, 0,
                    NULL, 0, 0, &position);
        do { /* the first are answered and not fetched, the others not even read */
            sleep_us(1000);
            shmrpc_poller_stats(setup.service.poller, &stats);
        } while (i == 4 && stats.outbox_bytes < 2 << 20);
    }
    shmrpc_slot *slot = slot_of(&setup);
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(call(slot, "echo", NULL, 0, 2000 * MS), 0);
    sleep_us(50000);
    clockid_t clock;
    int64_t used = 0;
    for (uint32_t i = 0; i < setup.service.thread_count; i++) {
        struct timespec before, after;
        REQUIRE(pthread_getcpuclockid(setup.service.threads[i], &clock) == 0);
        clock_gettime(clock, &before);
        sleep_us(100000);
        clock_gettime(clock, &after);
        used += (after.tv_sec - before.tv_sec) * 1000 * MS + after.tv_nsec - before.tv_nsec;
    }
    CHECK(used < 20 * MS); /* mode auto or block: asleep but for ticks */
    shmrpc_slot_free(asker);
    shmrpc_poller_free(greedy);
    service_await(&setup.service, &setup.service.closed, 1); /* its end is noticed */
    shmrpc_slot_free(slot);
    setup_close(&setup);
    pair_close(&pair);
}

TEST(client_that_fetches_nothing_on_shm)
{
    greedy_client(SHM, 0);
    greedy_client(SHM, 2);
}

TEST(client_that_fetches_nothing_on_a_stream)
{
    greedy_client(STREAM, 0);
    greedy_client(STREAM, 2);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
