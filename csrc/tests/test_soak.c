/* test_soak.c - lost wake-ups: ping-pong that sleeps between any two messages, with random delays
 * where arming and publishing meet. No timeout hides a lost wake-up: it is a hang, and a failure.
 * SHMRPC_SOAK sets the number of calls. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "conn.h"
#include "party.h"
#include "poller.h"
#include "service.h"

enum { PROGRESS_SECONDS = 5 };

static struct service service;
static struct party server_party, client_party;
static shmrpc_poller *client, *server;

static void dump_words(const char *name, const struct segment_shm *segment)
{
    fprintf(stderr, "  %s: tail %llu head %llu arm %llu space %llu\n", name,
            (unsigned long long)load_relaxed(&segment->tail),
            (unsigned long long)load_relaxed(&segment->head),
            (unsigned long long)load_relaxed(&segment->arm),
            (unsigned long long)load_relaxed(&segment->space));
}

static void dump(void)
{
    const shmrpc_poller *pollers[] = {client, server};

    for (int i = 0; i < 2; i++) {
        const struct conn *conn = pollers[i]->conns[0];
        const shmrpc_slot *leader = pollers[i]->leader;
        fprintf(stderr, " %s: hot %d outbox %llu running %u queued %u sleeps %llu rung %llu\n",
                i == 0 ? "client" : "server", conn->hot,
                (unsigned long long)load_relaxed(&conn->outbox_bytes), pollers[i]->running,
                pollers[i]->queued, (unsigned long long)load_relaxed(&pollers[i]->counters.sleeps),
                (unsigned long long)load_relaxed(&conn->wake.rung));
        fprintf(stderr, "  leader's goal %d away %d inside %u blocked %u threads %u startable %llu\n",
                leader != NULL ? (int)leader->goal : -1, pollers[i]->away, pollers[i]->inside,
                pollers[i]->blocked, pollers[i]->worker_threads,
                (unsigned long long)load_relaxed(&pollers[i]->startable));
        if (conn->is_shm)
            dump_words(i == 0 ? "client" : "server", conn->wake.own);
    }
}

/* Nothing, a yield, or some pauses: what an armed peer may be doing meanwhile. */
static void delay(struct random *random)
{
    uint64_t choice = random_below(random, 8);

    if (choice == 0)
        sched_yield();
    for (uint64_t i = choice < 5 ? 0 : random_below(random, 1u << (2 * choice - 9)); i > 0; i--)
        cpu_pause();
}

struct soaker {
    pthread_t thread;
    uint64_t conn_id, calls, seed;
    size_t longest;
    bool failed;
};

static void *soak_calls(void *argument)
{
    struct soaker *soaker = argument;
    struct random random = {soaker->seed};
    shmrpc_slot *slot = shmrpc_slot_new(client, soaker->conn_id);

    for (uint64_t i = 0; i < soaker->calls && !soaker->failed; i++) {
        if (i % 1000 == 0)
            harness_progress(PROGRESS_SECONDS);
        size_t most = random_below(&random, 32) == 0 ? soaker->longest : 16;
        soaker->failed = !echo_works(slot, random_below(&random, most + 1), i);
        delay(&random);
    }
    shmrpc_slot_free(slot);
    return NULL;
}

static void allow_cpus(int count)
{
    cpu_set_t cpus, all;
    int chosen = 0;

    CPU_ZERO(&cpus);
    sched_getaffinity(0, sizeof all, &all);
    for (size_t cpu = 0; cpu < CPU_SETSIZE && chosen < count; cpu++)
        if (CPU_ISSET(cpu, &all)) {
            CPU_SET(cpu, &cpus);
            chosen++;
        }
    sched_setaffinity(0, sizeof cpus, &cpus); /* threads made from now on inherit it */
}

static void soak(enum transport transport, uint32_t mode, int cpus, int threads, size_t longest,
                 uint64_t calls)
{
    struct pair pair;
    struct soaker soakers[8];
    cpu_set_t before;

    sched_getaffinity(0, sizeof before, &before);
    allow_cpus(cpus);
    service_open(&service, 2, 64, mode);
    server = service.poller;
    client = shmrpc_poller_new(0, 0, mode, 0);
    pair_open(&pair, transport, 4096, 4096);
    uint64_t id = pair_give(&pair, 0, client);
    pair_give(&pair, 1, service.poller);
    harness_on_hang(dump);
    for (int i = 0; i < threads; i++) {
        soakers[i] = (struct soaker){.conn_id = id, .calls = calls / (uint64_t)threads,
                                     .seed = harness_seed() + (uint64_t)i, .longest = longest};
        REQUIRE(pthread_create(&soakers[i].thread, NULL, soak_calls, &soakers[i]) == 0);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(soakers[i].thread, NULL);
        CHECK(!soakers[i].failed);
    }
    harness_on_hang(NULL);
    harness_progress(HANG_SECONDS);
    service_close(&service);
    shmrpc_poller_free(client);
    pair_close(&pair);
    sched_setaffinity(0, sizeof before, &before);
}

static uint64_t soak_calls_count(uint64_t otherwise)
{
    return harness_number("SHMRPC_SOAK", otherwise);
}

TEST(one_cpu)
{
    soak(SHM, 2, 1, 1, 16, soak_calls_count(100000));
}

TEST(two_cpus)
{
    soak(SHM, 2, 2, 1, 16, soak_calls_count(30000));
}

TEST(two_cpus_now_spinning_now_sleeping)
{
    soak(SHM, 0, 2, 1, 16, soak_calls_count(100000));
}

/* Messages longer than the ring: the wake-ups for space. */
TEST(full_rings_on_one_cpu)
{
    soak(SHM, 2, 1, 1, 60000, soak_calls_count(20000));
}

TEST(full_rings_on_two_cpus)
{
    soak(SHM, 2, 2, 1, 60000, soak_calls_count(8000));
}

/* Leading is handed from thread to thread. */
TEST(many_threads)
{
    soak(SHM, 2, 2, 5, 5000, soak_calls_count(30000));
    soak(SHM, 0, 1, 5, 5000, soak_calls_count(30000));
}

TEST(bells_on_the_socket)
{
    soak(SHM_SOCKET_BELLS, 2, 2, 2, 5000, soak_calls_count(20000));
}

TEST(stream)
{
    soak(STREAM, 2, 2, 2, 500000, soak_calls_count(4000));
}

/* ---- both sides call and send ---- */

struct talker {
    struct party *party;
    pthread_t thread;
    uint64_t conn_id, calls, seed;
    uint32_t depth;
    bool failed;
};

static void *nest_calls(void *argument)
{
    struct talker *talker = argument;
    struct random random = {talker->seed};
    shmrpc_slot *slot = shmrpc_slot_new(talker->party->poller, talker->conn_id);

    for (uint64_t i = 0; i < talker->calls && !talker->failed; i++) {
        if (i % 100 == 0)
            harness_progress(PROGRESS_SECONDS);
        uint32_t depth = (uint32_t)random_below(&random, talker->depth + 1);
        talker->failed = !party_nest(talker->party, slot, depth, -1);
        delay(&random);
    }
    shmrpc_slot_free(slot);
    return NULL;
}

static void *send_items(void *argument)
{
    struct talker *talker = argument;
    struct random random = {talker->seed};
    static const char body[3000];
    shmrpc_slot *slot = shmrpc_slot_new(talker->party->poller, talker->conn_id);

    for (uint64_t i = 0; i < talker->calls && !talker->failed; i++) {
        size_t bytes = random_below(&random, random_below(&random, 32) == 0 ? sizeof body : 32);
        int status = shmrpc_send_item(slot, 0, random_below(&random, 8) == 0 ? 6 : 5, body, bytes);
        if (status > 0)
            status = (int)party_go_on(talker->party, slot, shmrpc_flush(slot, -1));
        talker->failed = status != 0;
        delay(&random);
    }
    shmrpc_slot_free(slot);
    return NULL;
}

/* Threads on both sides call, are called back and send items, all on one connection. */
static void soak_both(enum transport transport, uint32_t mode, int cpus, uint32_t workers,
                      uint32_t depth, uint64_t calls)
{
    enum { PAIRS = 2 };
    struct pair pair;
    struct talker talkers[2 * 2 * PAIRS];
    struct party *parties[2] = {&client_party, &server_party};
    cpu_set_t before;
    int count = 0;

    sched_getaffinity(0, sizeof before, &before);
    allow_cpus(cpus);
    party_open_server(&server_party, workers, 1024, mode);
    party_open(&client_party, true, mode);
    client = client_party.poller;
    server = server_party.poller;
    pair_open(&pair, transport, 4096, 4096);
    uint64_t ids[2] = {pair_give(&pair, 0, client), pair_give(&pair, 1, server)};
    party_serve(&client_party, workers, 1024);
    harness_on_hang(dump);
    for (int side = 0; side < 2; side++) {
        for (int i = 0; i < 2 * PAIRS; i++, count++) {
            bool sends = i % 2 != 0;
            talkers[count] = (struct talker){
                .party = parties[side], .conn_id = ids[side], .depth = depth,
                .calls = sends ? 20 * calls : calls, .seed = harness_seed() + (uint64_t)count};
            REQUIRE(pthread_create(&talkers[count].thread, NULL, sends ? send_items : nest_calls,
                                   &talkers[count]) == 0);
        }
    }
    for (int i = 0; i < count; i++) {
        pthread_join(talkers[i].thread, NULL);
        CHECK(!talkers[i].failed);
    }
    for (int side = 0; side < 2; side++)
        party_await(parties[side], &parties[side]->items, (uint32_t)(PAIRS * 20 * calls));
    harness_on_hang(NULL);
    harness_progress(HANG_SECONDS);
    party_close(&server_party);
    party_close(&client_party);
    pair_close(&pair);
    sched_setaffinity(0, sizeof before, &before);
}

TEST(both_ways_on_one_cpu)
{
    soak_both(SHM, 2, 1, 2, 4, soak_calls_count(60000) / 100);
}

TEST(both_ways_on_two_cpus)
{
    soak_both(SHM, 0, 2, 1, 4, soak_calls_count(60000) / 100);
    soak_both(SHM, 2, 2, 4, 2, soak_calls_count(60000) / 100);
}

TEST(both_ways_over_a_stream)
{
    soak_both(STREAM, 0, 2, 2, 3, soak_calls_count(40000) / 100);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
