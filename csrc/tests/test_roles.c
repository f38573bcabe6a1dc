/* test_roles.c - both sides call and serve: who leads while handlers wait for each other. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "party.h"
#include "poller.h"
#include "segment.h"

static const int64_t MS = 1000000;
enum { SPARE = 8 }; /* threads that are kept beyond those that are needed */

/* A server and a client that are connected. */
struct duo {
    struct party server, client;
    struct pair pair;
    uint64_t client_conn, server_conn;
};

static void duo_open(struct duo *duo, enum transport transport, uint32_t workers, uint32_t mode)
{
    party_open_server(&duo->server, workers, 1024, mode);
    party_open(&duo->client, true, mode);
    pair_open(&duo->pair, transport, 65536, 65536);
    duo->client_conn = pair_give(&duo->pair, 0, duo->client.poller);
    duo->server_conn = pair_give(&duo->pair, 1, duo->server.poller);
}

static void duo_close(struct duo *duo)
{
    party_close(&duo->server);
    party_close(&duo->client);
    pair_close(&duo->pair);
}

static shmrpc_slot *slot_of(struct party *party, uint64_t conn)
{
    shmrpc_slot *slot = shmrpc_slot_new(party->poller, conn);

    REQUIRE(slot != NULL);
    return slot;
}

static bool echoes(struct party *party, shmrpc_slot *slot, int64_t timeout_ns)
{
    return party_call(party, slot, "echo", "hello", 5, timeout_ns) == 5 &&
           memcmp(shmrpc_slot_view(slot), "hello", 5) == 0;
}

/* A thread with one call, or some. */
struct thread {
    struct party *party;
    uint64_t conn;
    const char *method;
    uint32_t depth, calls;
    int64_t result;
    pthread_t thread;
};

static void *run_calls(void *argument)
{
    struct thread *thread = argument;
    shmrpc_slot *slot = slot_of(thread->party, thread->conn);

    for (uint32_t i = 0; i < thread->calls && thread->result >= 0; i++) {
        if (strcmp(thread->method, "nest") == 0)
            thread->result = party_nest(thread->party, slot, thread->depth, -1) ? 0 : -1;
        else
            thread->result = party_call(thread->party, slot, thread->method, NULL, 0, -1);
    }
    shmrpc_slot_free(slot);
    return NULL;
}

static void start(struct thread *thread, struct party *party, uint64_t conn, const char *method,
                  uint32_t depth, uint32_t calls)
{
    *thread = (struct thread){
        .party = party, .conn = conn, .method = method, .depth = depth, .calls = calls};
    REQUIRE(pthread_create(&thread->thread, NULL, run_calls, thread) == 0);
}

static int64_t end(struct thread *thread)
{
    pthread_join(thread->thread, NULL);
    return thread->result;
}

/* A thread that does nothing but lead: it waits for events until it is poked. */
struct reader {
    struct party *party;
    shmrpc_slot *slot;
    int64_t result;
    uint32_t queued; /* how often it was asked to serve */
    pthread_t thread;
};

static void *read_events(void *argument)
{
    struct reader *reader = argument;

    do {
        reader->result = shmrpc_wait_events(reader->slot, -1);
        reader->queued += reader->result == SHMRPC_QUEUED;
    } while (party_attend(reader->party, reader->result));
    return NULL;
}

static void read_start(struct reader *reader, struct party *party)
{
    *reader = (struct reader){.party = party, .slot = slot_of(party, 0)};
    REQUIRE(pthread_create(&reader->thread, NULL, read_events, reader) == 0);
}

static int64_t read_end(struct reader *reader)
{
    pthread_join(reader->thread, NULL);
    shmrpc_slot_free(reader->slot);
    return reader->result;
}

/* Wait until this slot leads. */
static void await_leader(struct party *party, const shmrpc_slot *slot)
{
    bool leads = false;

    while (!leads) {
        sleep_us(50);
        poller_lock(party->poller);
        leads = party->poller->leader == slot;
        poller_unlock(party->poller);
    }
}

static void await_running(struct party *party, uint64_t count)
{
    shmrpc_stats stats;

    do {
        sleep_us(50);
        shmrpc_poller_stats(party->poller, &stats);
    } while (stats.running != count);
}

static void await_queued(struct party *party, uint64_t count)
{
    shmrpc_stats stats;

    do {
        sleep_us(50);
        shmrpc_poller_stats(party->poller, &stats);
    } while (stats.queued < count);
}

/* Wait until there are so many worker threads, or fewer. */
static void await_threads(struct party *party, uint32_t most)
{
    uint32_t count;

    do {
        sleep_us(50);
        poller_lock(party->poller);
        count = party->poller->worker_threads;
        poller_unlock(party->poller);
    } while (count > most);
}

/* ---- nested calls ---- */

static void nested(enum transport transport, uint32_t mode, uint32_t workers, bool serves,
                   int threads, uint32_t depth, uint32_t calls)
{
    struct duo duo;
    struct thread callers[8];

    harness_progress(HANG_SECONDS);
    duo_open(&duo, transport, workers, mode);
    if (serves)
        party_serve(&duo.client, workers, 1024);
    for (int i = 0; i < threads; i++)
        start(&callers[i], &duo.client, duo.client_conn, "nest", depth, calls);
    for (int i = 0; i < threads; i++)
        CHECK_EQUAL(end(&callers[i]), 0);
    duo_close(&duo);
}

TEST(nested_calls_on_every_transport_and_mode)
{
    for (int transport = 0; transport < TRANSPORTS; transport++)
        for (uint32_t mode = 0; mode <= 2; mode++)
            nested((enum transport)transport, mode, 4, true, 1, 3, 30);
}

TEST(nested_calls_from_many_threads)
{
    for (int transport = 0; transport < TRANSPORTS; transport++)
        nested((enum transport)transport, 0, 4, true, 6, 4, 20);
}

/* Handlers that wait for handlers do not use up the workers. */
TEST(deep_nesting_with_one_worker)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        nested((enum transport)transport, 0, 1, true, 1, 60, 2);
        nested((enum transport)transport, 2, 1, true, 4, 12, 5);
    }
}

/* While a handler waits on one stream socket, the server reads the others. */
TEST(nested_call_does_not_deafen_the_server)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct duo duo;
        struct party other;
        struct pair pair;
        struct thread caller;

        harness_progress(HANG_SECONDS);
        duo_open(&duo, (enum transport)transport, 4, 0);
        party_serve(&duo.client, 4, 64);
        party_open(&other, true, 0);
        pair_open(&pair, (enum transport)transport, 65536, 65536);
        shmrpc_slot *slot = slot_of(&other, pair_give(&pair, 0, other.poller));
        pair_give(&pair, 1, duo.server.poller);
        start(&caller, &duo.server, duo.server_conn, "block", 0, 1); /* leads on the server */
        party_await(&duo.client, &duo.client.blocked, 1);
        for (int i = 0; i < 20; i++)
            CHECK(echoes(&other, slot, 2000 * MS));
        party_gate(&duo.client, true);
        CHECK_EQUAL(end(&caller), 0);
        shmrpc_slot_free(slot);
        duo_close(&duo);
        party_close(&other);
        pair_close(&pair);
    }
}

/* ---- requests that queue while a caller leads ---- */

/* A server whose peer is made by hand. */
struct scene {
    struct party server;
    struct pair pair;
    struct hand hand;
    uint64_t conn;
};

static void scene_open(struct scene *scene, uint32_t workers, uint32_t max_concurrency)
{
    party_open_server(&scene->server, workers, max_concurrency, 0);
    pair_open(&scene->pair, SHM, 65536, 65536);
    hand_open(&scene->hand, &scene->pair);
    scene->conn = pair_give(&scene->pair, 0, scene->server.poller);
}

static void scene_close(struct scene *scene)
{
    party_close(&scene->server);
    segment_unmap(scene->hand.peer, 65536);
    pair_close(&scene->pair);
}

/* Publish a frame; the bell is rung by the next hand_ring. */
static void put(struct hand *hand, uint8_t kind, uint8_t flags, uint64_t call_id,
                const char *method, const void *body, size_t body_bytes)
{
    struct iovec parts[2] = {{(void *)(uintptr_t)method, strlen(method)},
                             {(void *)(uintptr_t)body, body_bytes}};
    uint32_t length = (uint32_t)(parts[0].iov_len + body_bytes);
    const struct frame_header header = {.length = length, .kind = kind, .flags = flags,
                                        .method_bytes = (uint16_t)parts[0].iov_len,
                                        .call_id = call_id, .total_bytes = length};

    while (ring_push(&hand->producer, &header, parts, 2) == -EAGAIN)
        hand_ring(hand);
}

/* Take the next frame of this kind, and drop those before it. */
static struct frame_header take_frame(struct hand *hand, uint8_t kind, void *payload,
                                      size_t capacity)
{
    struct frame_header header;

    while (hand_receive(hand, &header, payload, capacity) == 0 || header.kind != kind)
        sleep_us(20);
    return header;
}

/* All of them run, not only the first: there are workers enough. */
TEST(requests_that_came_together_run_together)
{
    struct scene scene;
    struct reader reader;

    scene_open(&scene, 8, 64);
    read_start(&reader, &scene.server);
    await_leader(&scene.server, reader.slot);
    for (uint64_t i = 1; i <= 8; i++)
        put(&scene.hand, SHMRPC_REQUEST, 0, i << 16, "block", NULL, 0);
    hand_ring(&scene.hand);
    party_await(&scene.server, &scene.server.blocked, 8);
    party_gate(&scene.server, true);
    for (int i = 0; i < 8; i++)
        take_frame(&scene.hand, SHMRPC_REPLY, NULL, 0);
    shmrpc_poke(reader.slot);
    CHECK_EQUAL(read_end(&reader), 0);
    scene_close(&scene);
}

/* The same on a client, whose waiting threads serve. */
TEST(requests_to_a_client_that_came_together_run_together)
{
    struct duo duo;
    struct thread callers[3];
    struct thread blocked[4];

    for (int transport = 0; transport < TRANSPORTS; transport++) {
        harness_progress(HANG_SECONDS);
        duo_open(&duo, (enum transport)transport, 8, 0);
        party_serve(&duo.client, 4, 64);
        for (int i = 0; i < 3; i++)
            start(&callers[i], &duo.client, duo.client_conn, "block", 0, 1);
        party_await(&duo.server, &duo.server.blocked, 3);
        for (int i = 0; i < 4; i++)
            start(&blocked[i], &duo.server, duo.server_conn, "block", 0, 1);
        party_await(&duo.client, &duo.client.blocked, 4);
        party_gate(&duo.client, true);
        for (int i = 0; i < 4; i++)
            CHECK_EQUAL(end(&blocked[i]), 0);
        party_gate(&duo.server, true);
        for (int i = 0; i < 3; i++)
            CHECK_EQUAL(end(&callers[i]), 0);
        duo_close(&duo);
    }
}

/* A reply is read also when it lies behind more requests than may queue. */
static void reply_behind_requests(enum transport transport)
{
    enum { CALLS = 900 };
    struct duo duo;
    struct thread nester;
    shmrpc_name name = name_of("echo");
    uint64_t position;

    harness_progress(HANG_SECONDS);
    duo_open(&duo, transport, 1, 2);
    party_serve(&duo.client, 2, 64);
    duo.client.nest_blocks = true;
    start(&nester, &duo.client, duo.client_conn, "nest", 1, 1);
    party_await(&duo.client, &duo.client.blocked, 1); /* the server's handler waits for it */
    struct thread blocker;
    start(&blocker, &duo.client, duo.client_conn, "block", 0, 1);
    party_await(&duo.server, &duo.server.blocked, 1); /* the one worker */
    shmrpc_slot *slot = slot_of(&duo.client, duo.client_conn);
    for (uint64_t i = 1; i <= CALLS; i++)
        CHECK(shmrpc_send(slot, SHMRPC_REQUEST, 0, i << 16 | SHMRPC_PYTHON_INDEX, &name, 0, NULL, 0,
                          "x", 1, 0, &position) >= 0);
    await_queued(&duo.server, LAYOUT_QUEUED_MAX);
    party_gate(&duo.client, true);
    CHECK_EQUAL(end(&nester), 0);
    party_gate(&duo.server, true);
    CHECK_EQUAL(end(&blocker), 0);
    while (duo.client.events[SHMRPC_REPLY] < CALLS)
        CHECK(party_attend(&duo.client, shmrpc_wait_events(slot, -1)));
    shmrpc_slot_free(slot);
    duo_close(&duo);
}

TEST(reply_behind_more_requests_than_may_queue)
{
    for (int transport = 0; transport < TRANSPORTS; transport++)
        reply_behind_requests((enum transport)transport);
}

/* Requests whose caller did not fetch its replies run when it does, also while a caller leads. */
TEST(requests_that_waited_for_room)
{
    struct scene scene;
    struct reader reader;
    struct frame_header header;
    int replies = 0;

    scene_open(&scene, 2, 64);
    read_start(&reader, &scene.server);
    await_leader(&scene.server, reader.slot);
    char *body = calloc(1, 2 << 20);
    for (uint64_t i = 1; i <= 2; i++)
        put(&scene.hand, SHMRPC_REQUEST, 0, i << 16, "block", NULL, 0);
    for (uint64_t i = 3; i <= 6; i++)
        put(&scene.hand, SHMRPC_REQUEST, 0, i << 16, "echo", "hello", 5);
    hand_ring(&scene.hand);
    party_await(&scene.server, &scene.server.blocked, 2);
    await_queued(&scene.server, 4);
    shmrpc_slot *slot = slot_of(&scene.server, scene.conn);
    shmrpc_name name = name_of("echo");
    uint64_t position;
    CHECK_EQUAL(shmrpc_send(slot, SHMRPC_NOTIFY, 0, 0, &name, 0, NULL, 0, body, 2 << 20, 0,
                            &position), 1);
    party_gate(&scene.server, true); /* the others may not start */
    await_running(&scene.server, 0);
    await_queued(&scene.server, 4);
    while (replies < 6) {
        if (hand_receive(&scene.hand, &header, NULL, 0) == 0)
            sleep_us(20);
        else
            replies += header.kind == SHMRPC_REPLY;
    }
    shmrpc_poke(reader.slot);
    CHECK_EQUAL(read_end(&reader), 0);
    shmrpc_slot_free(slot);
    scene_close(&scene);
    free(body);
}

/* Whoever leads after a caller has left: somebody stands by, also when the standby has just gone
 * to run a request, and the thread that it woke leads instead of it. */
TEST(leader_after_a_caller_has_a_standby)
{
    struct random random = {harness_seed()};

    for (int i = 0; i < 400; i++) {
        struct scene scene;
        struct reader reader;

        harness_progress(HANG_SECONDS);
        scene_open(&scene, 4, 64);
        for (uint64_t id = 1; id <= 3; id++) /* makes threads, which idle then */
            put(&scene.hand, SHMRPC_REQUEST, 0, id << 16, "block", NULL, 0);
        hand_ring(&scene.hand);
        party_await(&scene.server, &scene.server.blocked, 3);
        party_gate(&scene.server, true);
        for (int k = 0; k < 3; k++)
            take_frame(&scene.hand, SHMRPC_REPLY, NULL, 0);
        await_running(&scene.server, 0);
        party_gate(&scene.server, false);
        read_start(&reader, &scene.server);
        await_leader(&scene.server, reader.slot);
        put(&scene.hand, SHMRPC_REQUEST, 0, 4 << 16, "block", NULL, 0);
        hand_ring(&scene.hand);
        party_await(&scene.server, &scene.server.blocked, 1);
        for (uint64_t k = random_below(&random, 2000); k > 0; k--)
            cpu_pause();
        shmrpc_poke(reader.slot);
        put(&scene.hand, SHMRPC_REQUEST, 0, 5 << 16, "block", NULL, 0);
        hand_ring(&scene.hand);
        party_await(&scene.server, &scene.server.blocked, 2);
        put(&scene.hand, SHMRPC_REQUEST, 0, 6 << 16, "echo", "hello", 5);
        hand_ring(&scene.hand);
        CHECK_EQUAL(take_frame(&scene.hand, SHMRPC_REPLY, NULL, 0).call_id, 6 << 16);
        CHECK_EQUAL(read_end(&reader), 0);
        scene_close(&scene);
    }
}

/* Requests whose handlers wait count for max_concurrency: each of them has a thread. */
TEST(waiting_handlers_are_limited)
{
    enum { MOST = 8, CALLS = 40 };
    struct scene scene;
    const uint32_t depth = 1;
    uint32_t refused = 0;

    scene_open(&scene, 2, MOST);
    for (uint64_t i = 1; i <= CALLS; i++)
        put(&scene.hand, SHMRPC_REQUEST, 0, i << 16, "nest", &depth, sizeof depth);
    hand_ring(&scene.hand);
    while (refused < CALLS - MOST)
        refused += take_frame(&scene.hand, SHMRPC_REPLY, NULL, 0).method_bytes == 8;
    await_threads(&scene.server, 2 + MOST + 1 + SPARE);
    shmrpc_conn_shutdown(scene.server.poller, scene.conn);
    scene_close(&scene);
}

/* What runs is told with its start, though no clock was looked at then; what waits with its age. */
TEST(requests_that_run_are_told)
{
    struct duo duo;
    struct thread blocked[3];
    shmrpc_running running[4];
    shmrpc_stats stats;
    uint64_t counts[8] = {0};
    uint32_t known = 0, used = 0;

    duo_open(&duo, SHM, 2, 0);
    CHECK_EQUAL(shmrpc_poller_running(duo.server.poller, running, 4), 0);
    uint64_t before_ns = clock_now_ns();
    for (int i = 0; i < 3; i++)
        start(&blocked[i], &duo.client, duo.client_conn, "block", 0, 1);
    party_await(&duo.server, &duo.server.blocked, 2);
    while (known < 2) { /* the standby takes a tick or two */
        known = 0;
        used = shmrpc_poller_running(duo.server.poller, running, 4);
        for (uint32_t i = 0; i < used; i++)
            known += running[i].since_ns != 0;
        sleep_us(200);
    }
    CHECK_EQUAL(used, 2);
    for (uint32_t i = 0; i < used; i++) {
        CHECK_EQUAL(running[i].method, PARTY_BLOCK);
        CHECK_EQUAL(running[i].conn_id, duo.server_conn);
        CHECK(running[i].call_id != 0);
        /* It is noted as one tick ago: a request that began later than that seems older by less. */
        CHECK(running[i].since_ns + 2 * (uint64_t)MS >= before_ns);
        CHECK(running[i].since_ns <= clock_now_ns());
    }
    CHECK_EQUAL(shmrpc_poller_running(duo.server.poller, running, 1), 1);
    do
        shmrpc_poller_stats(duo.server.poller, &stats);
    while (stats.queued == 0);
    CHECK(stats.oldest_queued_ns > 0);
    CHECK_EQUAL(stats.calls_queued, 0);
    CHECK_EQUAL(stats.ring_bytes, 2 * 65536);
    party_gate(&duo.server, true);
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(end(&blocked[i]), 0);
    await_running(&duo.server, 0);
    shmrpc_poller_stats(duo.server.poller, &stats);
    CHECK_EQUAL(stats.calls_queued, 1);
    CHECK(stats.queued_ns > 0);
    CHECK_EQUAL(stats.oldest_queued_ns, 0);
    shmrpc_method_counts(duo.server.poller, counts, 8);
    CHECK_EQUAL(counts[PARTY_BLOCK], 3);
    shmrpc_method_counts(duo.server.poller, counts, 0); /* no room: nothing is written */
    duo_close(&duo);
}

/* Our ring's fill is computed from the peer's words: whatever they are, it is one of a ring. */
TEST(ring_use_of_a_peer_that_lies)
{
    static const uint64_t lies[] = {1, 0xffff, 65536, 65537, UINT64_MAX / 2, UINT64_MAX};
    struct scene scene;
    shmrpc_stats stats;

    scene_open(&scene, 2, 8);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        store_release(&scene.hand.own->head, lies[i]);
        shmrpc_poller_stats(scene.server.poller, &stats);
        CHECK(stats.ring_used <= stats.ring_bytes);
        CHECK(stats.fullest_ring_percent <= 100);
    }
    store_release(&scene.hand.own->head, 0);
    scene_close(&scene);
}

/* ---- serving in threads that wait ---- */

/* However many workers there are for such threads, none of them is a thread of its own. */
TEST(workers_for_waiting_threads_are_no_threads)
{
    enum { WORKERS = 30 };
    struct duo duo;
    struct thread blocked[4];
    shmrpc_slot *workers[WORKERS];

    duo_open(&duo, SHM, 8, 0);
    for (int i = 0; i < WORKERS; i++) {
        workers[i] = shmrpc_worker_new(duo.client.poller);
        CHECK_EQUAL(shmrpc_next_queued(workers[i]), 0);
    }
    party_serve(&duo.client, 4, 64);
    for (int i = 0; i < 4; i++)
        start(&blocked[i], &duo.server, duo.server_conn, "block", 0, 1);
    party_await(&duo.client, &duo.client.blocked, 4);
    party_gate(&duo.client, true);
    for (int i = 0; i < 4; i++)
        CHECK_EQUAL(end(&blocked[i]), 0);
    for (int i = 0; i < WORKERS; i++)
        shmrpc_slot_free(workers[i]);
    duo_close(&duo);
}

/* However deep a waiting thread serves within serving, it is one request that runs. */
TEST(nesting_leaves_the_workers_to_others)
{
    struct duo duo;
    struct thread nester;

    duo_open(&duo, SHM, 8, 0);
    party_serve(&duo.client, 2, 64);
    duo.client.nest_blocks = true;
    start(&nester, &duo.client, duo.client_conn, "nest", 9, 1); /* 8, 6, 4, 2, 0 are the client's */
    party_await(&duo.client, &duo.client.blocked, 1);
    shmrpc_slot *slot = slot_of(&duo.server, duo.server_conn);
    CHECK(echoes(&duo.server, slot, 5000 * MS));
    await_running(&duo.client, 5);
    party_gate(&duo.client, true);
    CHECK_EQUAL(end(&nester), 0);
    await_running(&duo.client, 0);
    shmrpc_slot_free(slot);
    duo_close(&duo);
}

static uint32_t field(struct party *party, const uint32_t *field)
{
    pthread_mutex_lock(&party->lock);
    uint32_t value = *field;
    pthread_mutex_unlock(&party->lock);
    return value;
}

/* A thread that waits for a reply takes the role from the worker that leads, and serves what comes:
 * the fewest switches from thread to thread. */
TEST(waiting_thread_serves)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct duo duo;
        struct thread waiter;
        uint32_t calls = 0;

        harness_progress(HANG_SECONDS);
        duo_open(&duo, (enum transport)transport, 4, 2);
        party_serve(&duo.client, 2, 64);
        shmrpc_slot *slot = slot_of(&duo.server, duo.server_conn);
        for (; calls < 10; calls++)
            CHECK(echoes(&duo.server, slot, -1));
        CHECK_EQUAL(field(&duo.client, &duo.client.served_inline), 0);
        start(&waiter, &duo.client, duo.client_conn, "block", 0, 1);
        party_await(&duo.server, &duo.server.blocked, 1);
        while (field(&duo.client, &duo.client.served_inline) == 0) {
            CHECK(echoes(&duo.server, slot, -1)); /* the role has not changed hands yet */
            calls++;
        }
        uint32_t before = field(&duo.client, &duo.client.served) -
                          field(&duo.client, &duo.client.served_inline);
        for (int i = 0; i < 50; i++, calls++)
            CHECK(echoes(&duo.server, slot, -1));
        CHECK_EQUAL(field(&duo.client, &duo.client.served), calls);
        CHECK_EQUAL(field(&duo.client, &duo.client.served) -
                        field(&duo.client, &duo.client.served_inline),
                    before);
        party_gate(&duo.server, true);
        CHECK_EQUAL(end(&waiter), 0);
        shmrpc_slot_free(slot);
        duo_close(&duo);
    }
}

/* A handler that forgets its caller does not keep it waiting. */
TEST(request_that_ends_without_a_reply)
{
    for (int serves = 0; serves < 2; serves++) {
        struct duo duo;
        struct thread waiter;

        harness_progress(HANG_SECONDS);
        duo_open(&duo, SHM, 4, 0);
        party_serve(&duo.client, 2, 64);
        if (serves) { /* inline: while somebody waits on the client */
            start(&waiter, &duo.client, duo.client_conn, "block", 0, 1);
            party_await(&duo.server, &duo.server.blocked, 1);
        }
        shmrpc_slot *slot = slot_of(&duo.server, duo.server_conn);
        int64_t result = party_call(&duo.server, slot, "forget", NULL, 0, -1);
        CHECK_EQUAL(result, SHMRPC_MESSAGE);
        CHECK_EQUAL(shmrpc_slot_message(slot)->status, 1);
        CHECK_EQUAL(shmrpc_slot_message(slot)->body_bytes, 0);
        party_gate(&duo.server, true);
        if (serves)
            CHECK_EQUAL(end(&waiter), 0);
        shmrpc_slot_free(slot);
        duo_close(&duo);
    }
}

static const struct frame_header ITEM = {.kind = SHMRPC_ITEM, .call_id = 5, .length = 1,
                                         .total_bytes = 1};

/* A client whose peer is made by hand; this thread leads, and asks what there is to do. */
struct solo {
    struct party client;
    struct pair pair;
    struct hand hand;
    shmrpc_slot *slot;
};

static void solo_open(struct solo *solo)
{
    party_open(&solo->client, true, 0);
    shmrpc_poller_serve(solo->client.poller, 4, 64); /* and has no thread of its own */
    pair_open(&solo->pair, SHM, 65536, 65536);
    hand_open(&solo->hand, &solo->pair);
    solo->slot = slot_of(&solo->client, pair_give(&solo->pair, 0, solo->client.poller));
}

static void solo_close(struct solo *solo)
{
    shmrpc_slot_free(solo->slot);
    party_close(&solo->client);
    segment_unmap(solo->hand.peer, 65536);
    pair_close(&solo->pair);
}

static int64_t look(struct solo *solo, int64_t timeout_ns)
{
    int64_t result;

    while ((result = shmrpc_wait_events(solo->slot, timeout_ns)) == -EAGAIN) {
    }
    return result;
}

/* Streams and requests take turns: neither waits until the other one runs dry. */
TEST(events_and_requests_take_turns)
{
    struct solo solo;
    int served = 0, taken = 0;

    solo_open(&solo);
    for (uint64_t i = 1; i <= 20; i++) {
        CHECK_EQUAL(hand_send(&solo.hand, &ITEM, "x"), 0); /* all the time something new */
        put(&solo.hand, SHMRPC_REQUEST, 0, i << 16, "echo", "hello", 5);
        int64_t result = look(&solo, -1);
        served += result == SHMRPC_QUEUED;
        taken += result == SHMRPC_EVENTS;
        CHECK(party_attend(&solo.client, result));
    }
    CHECK(served >= 9);
    CHECK(taken >= 9);
    solo_close(&solo);
}

enum { FLOOD_RING = 64 << 20, FLOOD_ITEMS = FLOOD_RING / FRAME_HEADER_BYTES };

/* A handler that reads a stream which never runs dry does not keep others from being heard. */
TEST(reader_of_a_stream_hears_others)
{
    const struct frame_header item = {.kind = SHMRPC_ITEM, .call_id = 5};
    struct duo duo;
    struct pair pair;
    struct hand hand;
    struct reader reader;
    shmrpc_stats stats;

    duo_open(&duo, SHM, 4, 0);
    pair_open(&pair, SHM, 65536, FLOOD_RING);
    hand_open(&hand, &pair);
    for (uint32_t offset = 0; offset < FLOOD_RING; offset += FRAME_HEADER_BYTES)
        memcpy(hand.own->ring + offset, &item, FRAME_HEADER_BYTES);
    store_release(&hand.own->tail, FLOOD_RING);
    shmrpc_slot *slot = slot_of(&duo.client, duo.client_conn);
    read_start(&reader, &duo.server);
    await_leader(&duo.server, reader.slot);
    sleep_us(5000); /* everything is cold */
    pair_give(&pair, 0, duo.server.poller);
    hand_ring(&hand);
    party_await(&duo.server, &duo.server.items, 1);
    CHECK(echoes(&duo.client, slot, 5000 * MS));
    shmrpc_poller_stats(duo.server.poller, &stats);
    CHECK(stats.frames_received < FLOOD_ITEMS);
    shmrpc_poke(reader.slot);
    CHECK_EQUAL(read_end(&reader), 0);
    shmrpc_slot_free(slot);
    duo_close(&duo);
    segment_unmap(hand.peer, 65536);
    pair_close(&pair);
}

/* Requests of a conn that has ended are nobody's to run, and keep nobody awake. */
TEST(conn_ends_with_requests_that_wait)
{
    struct solo solo;
    shmrpc_stats stats;

    solo_open(&solo);
    for (uint64_t i = 1; i <= 20; i++)
        put(&solo.hand, SHMRPC_REQUEST, 0, i << 16, "echo", "hello", 5);
    CHECK_EQUAL(look(&solo, -1), SHMRPC_QUEUED);
    shutdown(solo.hand.control_fd, SHUT_RDWR);
    while (solo.client.closed == 0) {
        if (look(&solo, -1) == SHMRPC_EVENTS)
            party_take(&solo.client);
    }
    CHECK_EQUAL(look(&solo, 20 * MS), -ETIMEDOUT);
    shmrpc_poller_stats(solo.client.poller, &stats);
    CHECK_EQUAL(stats.queued, 0);
    solo_close(&solo);
}

/* ---- threads, and nothing to do ---- */

static int64_t idle_cpu(void)
{
    int64_t before = cpu_ns();
    sleep_us(200000);
    return cpu_ns() - before;
}

/* Nobody is awake when there is nothing to do: not while handlers wait for each other, nor when
 * callers have led and left, nor after the threads were many. */
TEST(idle_uses_no_cpu)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        struct duo duo;
        struct thread callers[6], nester;

        harness_progress(HANG_SECONDS);
        duo_open(&duo, (enum transport)transport, 2, 0);
        party_serve(&duo.client, 2, 64);
        sleep_us(20000);
        CHECK(idle_cpu() < 10 * MS); /* nobody has called */
        for (int i = 0; i < 6; i++)
            start(&callers[i], &duo.client, duo.client_conn, "nest", 6, 5);
        for (int i = 0; i < 6; i++)
            CHECK_EQUAL(end(&callers[i]), 0);
        sleep_us(20000);
        CHECK(idle_cpu() < 10 * MS); /* they have come and gone */
        duo.client.nest_blocks = true;
        start(&nester, &duo.client, duo.client_conn, "nest", 5, 1);
        party_await(&duo.client, &duo.client.blocked, 1);
        sleep_us(20000);
        CHECK(idle_cpu() < 10 * MS); /* all wait for one */
        party_gate(&duo.client, true);
        CHECK_EQUAL(end(&nester), 0);
        duo_close(&duo);
    }
}

/* Threads that were started because others waited end when those have come back. */
TEST(surplus_threads_end)
{
    enum { CALLERS = 24, WORKERS = 2 };
    struct scene scene;
    const uint32_t depth = 1;
    struct frame_header header;
    uint64_t asked[CALLERS];

    scene_open(&scene, WORKERS, 64);
    for (uint64_t i = 1; i <= CALLERS; i++)
        put(&scene.hand, SHMRPC_REQUEST, 0, i << 16, "nest", &depth, sizeof depth);
    hand_ring(&scene.hand);
    for (int i = 0; i < CALLERS; i++)
        asked[i] = take_frame(&scene.hand, SHMRPC_REQUEST, NULL, 0).call_id;
    await_running(&scene.server, CALLERS); /* a thread each, which waits for us */
    for (int i = 0; i < CALLERS; i++) {
        const uint32_t none = 0;
        header = (struct frame_header){.kind = SHMRPC_REPLY, .call_id = asked[i],
                                       .length = sizeof none, .total_bytes = sizeof none};
        CHECK_EQUAL(hand_send(&scene.hand, &header, &none), 0);
    }
    for (int i = 0; i < CALLERS; i++)
        CHECK_EQUAL(take_frame(&scene.hand, SHMRPC_REPLY, NULL, 0).method_bytes, 0);
    await_threads(&scene.server, WORKERS + 1 + SPARE);
    put(&scene.hand, SHMRPC_REQUEST, 0, 99 << 16, "echo", "hello", 5); /* and it goes on */
    hand_ring(&scene.hand);
    CHECK_EQUAL(take_frame(&scene.hand, SHMRPC_REPLY, NULL, 0).call_id, 99 << 16);
    scene_close(&scene);
}

/* ---- the end ---- */

static void *stop_soon(void *argument)
{
    struct party *party = argument;

    for (uint64_t i = harness_seed() % 200; i > 0; i--)
        cpu_pause();
    shmrpc_poller_stop(party->poller);
    return NULL;
}

/* A thread that begins to wait while the workers end is told, whoever led. */
TEST(stop_while_callers_come)
{
    struct random random = {harness_seed()};

    for (int i = 0; i < 1500; i++) {
        struct party server;
        struct reader reader;
        pthread_t stopper;

        harness_progress(HANG_SECONDS);
        party_open_server(&server, 2, 16, 2);
        reader = (struct reader){.party = &server, .slot = slot_of(&server, 0)};
        sleep_us(random_below(&random, 100));
        REQUIRE(pthread_create(&stopper, NULL, stop_soon, &server) == 0);
        REQUIRE(pthread_create(&reader.thread, NULL, read_events, &reader) == 0);
        CHECK_EQUAL(read_end(&reader), SHMRPC_STOPPED);
        pthread_join(stopper, NULL);
        party_close(&server);
    }
}

/* Callers inside, whoever leads, and wherever the leader sleeps. */
TEST(stop_ends_every_wait_on_both_sides)
{
    for (int transport = 0; transport < TRANSPORTS; transport++) {
        for (int serves = 0; serves < 2; serves++) {
            struct duo duo;
            struct thread callers[4];

            harness_progress(HANG_SECONDS);
            duo_open(&duo, (enum transport)transport, 4, 0);
            if (serves)
                party_serve(&duo.client, 2, 16);
            for (int i = 0; i < 4; i++)
                start(&callers[i], &duo.client, duo.client_conn, "block", 0, 1);
            party_await(&duo.server, &duo.server.blocked, 4);
            sleep_us(2000); /* asleep */
            shmrpc_poller_stop(duo.client.poller);
            for (int i = 0; i < 4; i++)
                CHECK_EQUAL(end(&callers[i]), SHMRPC_STOPPED);
            duo_close(&duo);
        }
    }
}

/* The worker that leads when a client's conn ends leaves nobody behind that waits. */
TEST(conn_ends_while_callers_come)
{
    struct random random = {harness_seed()};

    for (int i = 0; i < 400; i++) {
        struct duo duo;
        struct reader reader;

        harness_progress(HANG_SECONDS);
        duo_open(&duo, SHM, 2, 2);
        party_serve(&duo.client, 2, 16);
        sleep_us(random_below(&random, 300));
        shmrpc_conn_shutdown(duo.server.poller, duo.server_conn);
        for (uint64_t k = random_below(&random, 3000); k > 0; k--)
            cpu_pause();
        read_start(&reader, &duo.client);
        party_await(&duo.client, &duo.client.closed, 1);
        party_await(&duo.client, &duo.client.threads_end, 2);
        await_leader(&duo.client, reader.slot);
        shmrpc_poke(reader.slot);
        CHECK_EQUAL(read_end(&reader), 0);
        duo_close(&duo);
    }
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
