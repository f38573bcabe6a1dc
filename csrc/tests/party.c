/* party.c - see party.h. */
#define _GNU_SOURCE
#include "party.h"

#include <errno.h>
#include <string.h>
#include <time.h>

static void *work(void *argument);

static void start_thread(struct party *party)
{
    pthread_mutex_lock(&party->lock);
    REQUIRE(party->threads_started < PARTY_THREADS_MAX);
    pthread_t *thread = &party->threads[party->threads_started++];
    REQUIRE(pthread_create(thread, NULL, work, party) == 0);
    pthread_mutex_unlock(&party->lock);
}

static void count(struct party *party, uint32_t *field, uint32_t more)
{
    pthread_mutex_lock(&party->lock);
    *field += more;
    pthread_cond_broadcast(&party->changed);
    pthread_mutex_unlock(&party->lock);
}

/* ---- handlers ---- */

static void block(struct party *party)
{
    pthread_mutex_lock(&party->lock);
    party->blocked++;
    party->blocked_total++;
    pthread_cond_broadcast(&party->changed);
    while (!party->gate_open)
        pthread_cond_wait(&party->changed, &party->lock);
    party->blocked--;
    pthread_mutex_unlock(&party->lock);
}

static void nest(struct party *party, shmrpc_slot *worker)
{
    const shmrpc_message *message = shmrpc_slot_message(worker);
    uint32_t depth = 0;

    if (message->body_bytes == sizeof depth)
        memcpy(&depth, message->body, sizeof depth);
    bool good = true;
    if (depth != 0) {
        shmrpc_slot *slot = shmrpc_slot_new(party->poller, message->conn_id);
        good = slot != NULL && party_nest(party, slot, depth - 1, -1);
        if (slot != NULL)
            shmrpc_slot_free(slot);
    } else if (party->nest_blocks) {
        block(party);
    }
    shmrpc_reply(worker, good ? 0 : 2, (const char *)&depth, sizeof depth);
}

static void run(struct party *party, shmrpc_slot *worker)
{
    const shmrpc_message *message = shmrpc_slot_message(worker);

    count(party, &party->served, 1);
    switch (message->method) {
    case PARTY_BLOCK:
        block(party);
        break;
    case PARTY_NEST:
        nest(party, worker);
        return;
    case PARTY_FORGET:
        return;
    default:
        break;
    }
    shmrpc_reply(worker, 0, (const char *)message->body, message->body_bytes);
}

/* ---- threads ---- */

static void *work(void *argument)
{
    struct party *party = argument;
    shmrpc_slot *slot = shmrpc_worker_new(party->poller);
    int64_t result;

    REQUIRE(slot != NULL);
    while ((result = shmrpc_next(slot)) != SHMRPC_STOPPED) {
        if (result >= 0 || result == SHMRPC_MESSAGE) {
            run(party, slot);
        } else if (!party_attend(party, result)) {
            party->odd = result;
            sleep_us(1000);
        }
    }
    shmrpc_slot_free(slot);
    count(party, &party->threads_end, 1);
    return NULL;
}

static shmrpc_slot *spare_worker(struct party *party)
{
    pthread_mutex_lock(&party->lock);
    shmrpc_slot *worker =
        party->spare_count != 0 ? party->spare[--party->spare_count] : NULL;
    pthread_mutex_unlock(&party->lock);
    return worker != NULL ? worker : shmrpc_worker_new(party->poller);
}

static void serve_queued(struct party *party)
{
    shmrpc_slot *worker = spare_worker(party);

    REQUIRE(worker != NULL);
    if (shmrpc_next_queued(worker) == SHMRPC_MESSAGE) {
        count(party, &party->served_inline, 1);
        run(party, worker);
        shmrpc_finish(worker);
    }
    pthread_mutex_lock(&party->lock);
    party->spare[party->spare_count++] = worker;
    pthread_mutex_unlock(&party->lock);
}

/* ---- for tests ---- */

void party_open(struct party *party, bool client, uint32_t mode)
{
    *party = (struct party){
        .poller = shmrpc_poller_new(client ? 0 : 1, client ? 0 : 1, mode, 0),
        .lock = PTHREAD_MUTEX_INITIALIZER,
        .changed = PTHREAD_COND_INITIALIZER,
    };
    REQUIRE(party->poller != NULL);
    party->taker = shmrpc_slot_new(party->poller, 0);
    CHECK_EQUAL(shmrpc_method_add(party->poller, "echo", 4, PARTY_ECHO, 1), 0);
    CHECK_EQUAL(shmrpc_method_add(party->poller, "block", 5, PARTY_BLOCK, 1), 0);
    CHECK_EQUAL(shmrpc_method_add(party->poller, "nest", 4, PARTY_NEST, 0), 0);
    CHECK_EQUAL(shmrpc_method_add(party->poller, "forget", 6, PARTY_FORGET, 0), 0);
}

void party_serve(struct party *party, uint32_t workers, uint32_t max_concurrency)
{
    shmrpc_poller_serve(party->poller, workers, max_concurrency);
    start_thread(party);
    start_thread(party);
}

void party_open_server(struct party *party, uint32_t workers, uint32_t max_concurrency,
                       uint32_t mode)
{
    party_open(party, false, mode);
    party_serve(party, workers, max_concurrency);
}

void party_gate(struct party *party, bool open)
{
    pthread_mutex_lock(&party->lock);
    party->gate_open = open;
    pthread_cond_broadcast(&party->changed);
    pthread_mutex_unlock(&party->lock);
}

void party_await(struct party *party, const uint32_t *field, uint32_t value)
{
    pthread_mutex_lock(&party->lock);
    while (*field < value)
        pthread_cond_wait(&party->changed, &party->lock);
    pthread_mutex_unlock(&party->lock);
}

void party_close(struct party *party)
{
    party_gate(party, true);
    shmrpc_poller_stop(party->poller);
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&party->lock);
        bool more = i < party->threads_started;
        pthread_t thread = more ? party->threads[i] : pthread_self();
        pthread_mutex_unlock(&party->lock);
        if (!more)
            break;
        pthread_join(thread, NULL);
    }
    CHECK_EQUAL(party->odd, 0);
    for (uint32_t i = 0; i < party->spare_count; i++)
        shmrpc_slot_free(party->spare[i]);
    shmrpc_slot_free(party->taker);
    shmrpc_poller_free(party->poller);
    party->poller = NULL;
}

bool party_attend(struct party *party, int64_t result)
{
    if (result == SHMRPC_EVENTS)
        party_take(party);
    else if (result == SHMRPC_SPAWN)
        start_thread(party);
    else if (result == SHMRPC_QUEUED)
        serve_queued(party);
    else
        return result == -EAGAIN || result == -EINTR;
    return true;
}

int64_t party_go_on(struct party *party, shmrpc_slot *slot, int64_t result)
{
    while (party_attend(party, result))
        result = shmrpc_wait(slot);
    return result;
}

int64_t party_call(struct party *party, shmrpc_slot *slot, const char *method, const void *body,
                   size_t body_bytes, int64_t timeout_ns)
{
    shmrpc_name name = name_of(method);

    return party_go_on(party, slot, shmrpc_call(slot, &name, body, body_bytes, timeout_ns));
}

void party_take(struct party *party)
{
    pthread_mutex_lock(&party->lock);
    while (shmrpc_take(party->taker)) {
        const shmrpc_message *message = shmrpc_slot_message(party->taker);
        if (message->kind == SHMRPC_CLOSED)
            party->closed++;
        else
            party->events[message->kind % PARTY_KINDS]++;
        party->items += message->item_count;
    }
    pthread_cond_broadcast(&party->changed);
    pthread_mutex_unlock(&party->lock);
}

bool party_nest(struct party *party, shmrpc_slot *slot, uint32_t depth, int64_t timeout_ns)
{
    int64_t result = party_call(party, slot, "nest", &depth, sizeof depth, timeout_ns);

    return result == (int64_t)sizeof depth &&
           memcmp(shmrpc_slot_view(slot), &depth, sizeof depth) == 0;
}

int64_t cpu_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}
