/* test_soak.c - lost wake-ups: ping-pong that sleeps between any two messages, with random delays
 * where arming and publishing meet. No timeout hides a lost wake-up: it is a hang, and a failure.
 * SHMRPC_SOAK sets the number of calls. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "conn.h"
#include "poller.h"
#include "service.h"

enum { PROGRESS_SECONDS = 5 };

static struct service service;
static shmrpc_poller *client;

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
    const shmrpc_poller *pollers[] = {client, service.poller};

    for (int i = 0; i < 2; i++) {
        const struct conn *conn = pollers[i]->conns[0];
        fprintf(stderr, " %s: hot %d outbox %llu running %u queued %u sleeps %llu rung %llu\n",
                i == 0 ? "client" : "server", conn->hot,
                (unsigned long long)load_relaxed(&conn->outbox_bytes), pollers[i]->running,
                pollers[i]->queued, (unsigned long long)load_relaxed(&pollers[i]->counters.sleeps),
                (unsigned long long)load_relaxed(&conn->wake.rung));
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

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
