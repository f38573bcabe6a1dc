/* forward.c - requests that are passed on as calls to somebody else, for who stands between.
 *
 *   poller of those who call               poller of those who are called
 *
 *   worker: shmrpc_pass
 *     a request is in its slot   ------->  the way's slot: a call like any other, which the same
 *     (its thread is away)                 thread waits for, leading or following
 *     shmrpc_reply_from          <-------  the reply is in that slot
 *     shmrpc_next
 *
 * What is passed on goes from one slot into the other conn's ring or arena: nobody else sees it.
 *
 * A caller that waits for somebody else's call has to hear that this somebody does not wait any
 * more: who reads the CANCEL, or the end of the conn, is another thread, and finds it in the list
 * `forwards` of the poller that the request is of. That list has a lock of its own, which comes
 * before all others: calls may be passed on from each of two pollers to the other.
 */
#define _GNU_SOURCE
#include "poller.h"

#include <errno.h>
#include <stdlib.h>

struct way {
    struct shmrpc_slot *slot;
    int64_t timeout_ns;
    shmrpc_tally *tally;
};

struct ways {
    struct methods names; /* index: in `list` */
    struct way *list;
    uint32_t count, capacity;
    uint64_t epoch; /* as poller->ways_epoch when the first was added */
    int64_t result; /* see shmrpc_passing */
    uint64_t since_ns;
};

/* ---- which calls are under way ---- */

/* Whether the request still has somebody who waits for it. Asked after it was linked: who cancels it
 * stores that first, and then looks through the list. */
static bool is_wanted(struct shmrpc_slot *worker)
{
    return worker->running && load_relaxed(&worker->conn->error) == 0 &&
           load_acquire32((atomic_u32 *)&worker->message.cancelled) == 0;
}

/* From here on the call may be interrupted. -ESTALE: it was to go a way that is not valid. */
static int begin(struct shmrpc_slot *slot, struct shmrpc_slot *worker, uint64_t epoch)
{
    struct shmrpc_poller *poller = worker->poller;

    slot->unwanted = false;
    pthread_mutex_lock(&poller->forward_lock);
    if (epoch != 0 && epoch != load_relaxed(&poller->ways_epoch)) {
        pthread_mutex_unlock(&poller->forward_lock);
        return -ESTALE;
    }
    slot->origin = worker;
    slot->way_epoch = epoch;
    slot->previous_forward = NULL;
    slot->next_forward = poller->forwards;
    if (slot->next_forward != NULL)
        slot->next_forward->previous_forward = slot;
    poller->forwards = slot;
    pthread_mutex_unlock(&poller->forward_lock);
    if (is_wanted(worker))
        return 0;
    forward_end(slot);
    return -ECANCELED;
}

void forward_end(struct shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->origin->poller;

    pthread_mutex_lock(&poller->forward_lock);
    if (slot->previous_forward != NULL)
        slot->previous_forward->next_forward = slot->next_forward;
    else
        poller->forwards = slot->next_forward;
    if (slot->next_forward != NULL)
        slot->next_forward->previous_forward = slot->previous_forward;
    pthread_mutex_unlock(&poller->forward_lock);
    slot->origin = NULL;
}

/* The forward_lock of its origin is held: its thread can't be gone. */
static void interrupt(struct shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    slot->unwanted = true; /* if the call has not begun */
    if (slot->goal == GOAL_REPLY) {
        /* Its result says so since it began: a leader that reads the reply just now writes its own
         * without the lock. */
        slot_wake(slot, SLOT_DONE);
        if (poller->leader == slot)
            poller_kick(poller);
    }
    poller_unlock(poller);
}

void forwards_unwanted(struct shmrpc_poller *poller, const struct conn *conn, uint64_t call_id)
{
    pthread_mutex_lock(&poller->forward_lock);
    for (struct shmrpc_slot *slot = poller->forwards; slot != NULL; slot = slot->next_forward)
        /* A request keeps its conn and its id until its call has ended. */
        if ((conn == NULL || slot->origin->conn == conn) &&
            (call_id == 0 || slot->origin->call_id == call_id))
            interrupt(slot);
    pthread_mutex_unlock(&poller->forward_lock);
}

/* ---- there and back ---- */

static int64_t forward(struct shmrpc_slot *slot, struct shmrpc_slot *worker, int64_t timeout_ns,
                       uint64_t epoch)
{
    const shmrpc_message *request = &worker->message;
    struct outgoing message = {
        .header = {.kind = SHMRPC_REQUEST,
                   .flags = (uint8_t)request->flags,
                   .method_bytes = (uint16_t)request->method_bytes,
                   .metadata_bytes = request->metadata_bytes},
        .parts = {{(void *)(uintptr_t)request->head, request->method_bytes},
                  {(void *)(uintptr_t)(request->head + request->method_bytes),
                   request->metadata_bytes},
                  {(void *)(uintptr_t)request->body, request->body_bytes}},
    };

    int status = conn_hung_up(slot->conn) ? -ENOTCONN : begin(slot, worker, epoch);
    if (status < 0) {
        shmrpc_detach(slot);
        return status;
    }
    status = blocks_pass(slot, request);
    if (status == 0)
        return slot_call(slot, &message, timeout_ns);
    forward_end(slot);
    slot->message.outcome = SHMRPC_NOT_SENT;
    return status;
}

int64_t shmrpc_forward(shmrpc_slot *slot, shmrpc_slot *worker, int64_t timeout_ns)
{
    return forward(slot, worker, timeout_ns, 0);
}

int shmrpc_reply_from(shmrpc_slot *worker, shmrpc_slot *slot)
{
    const shmrpc_message *reply = &slot->message;
    struct outgoing message = {
        .header = {.kind = SHMRPC_REPLY,
                   .method_bytes = (uint16_t)reply->status,
                   .call_id = worker->call_id,
                   .metadata_bytes = reply->metadata_bytes},
        .parts = {{(void *)(uintptr_t)reply->head, reply->metadata_bytes},
                  {(void *)(uintptr_t)reply->body, reply->body_bytes}},
    };
    atomic_u64 position;

    if (!worker->running || worker->replied)
        return 0;
    int result = blocks_pass_back(worker, slot);
    if (result < 0)
        return result;
    /* Before the reply: its caller's next call finds its blocks free, and still in the caches. */
    slot_drop_blocks(worker);
    result = slot_send(worker, &message, 1, &position);
    worker->replied = result != -EMSGSIZE && result != -ENOMEM;
    if (worker->replied)
        slot_drop_blocks(slot);
    return result < 0 ? result : 0;
}

/* ---- ways ---- */

bool ways_stale(const struct shmrpc_poller *poller, const struct shmrpc_slot *worker)
{
    const struct ways *ways = worker->ways;

    return ways != NULL && ways->count != 0 && ways->epoch != load_relaxed(&poller->ways_epoch);
}

void shmrpc_ways_clear(shmrpc_slot *worker)
{
    struct ways *ways = worker->ways;

    if (ways == NULL)
        return;
    methods_free(&ways->names);
    ways->count = 0;
}

void ways_forget(struct shmrpc_slot *worker)
{
    shmrpc_ways_clear(worker);
    if (worker->ways != NULL)
        free(worker->ways->list);
    free(worker->ways);
    worker->ways = NULL;
}

uint64_t shmrpc_ways_epoch(shmrpc_poller *poller)
{
    return load_acquire(&poller->ways_epoch);
}

int shmrpc_way_add(shmrpc_slot *worker, const char *name, size_t name_bytes, shmrpc_slot *slot,
                   int64_t timeout_ns, shmrpc_tally *tally, uint64_t epoch)
{
    if (name_bytes == 0)
        return -EINVAL;
    if (worker->ways == NULL)
        worker->ways = calloc(1, sizeof *worker->ways);
    struct ways *ways = worker->ways;
    if (ways == NULL)
        return -ENOMEM;
    if (ways->count == 0)
        ways->epoch = epoch;
    if (ways->epoch != epoch || epoch != shmrpc_ways_epoch(worker->poller))
        return -ESTALE;
    if (ways->count == ways->capacity) {
        uint32_t capacity = ways->capacity == 0 ? 8 : ways->capacity * 2;
        struct way *list = realloc(ways->list, capacity * sizeof *list);
        if (list == NULL)
            return -ENOMEM;
        ways->list = list;
        ways->capacity = capacity;
    }
    int status = methods_add(&ways->names, name, name_bytes, (int32_t)ways->count, false);
    if (status == 0)
        ways->list[ways->count++] = (struct way){slot, timeout_ns, tally};
    return status;
}

/* The way of the request that the worker has just got, or null. */
static const struct way *find_way(struct shmrpc_slot *worker)
{
    const shmrpc_message *request = &worker->message;
    struct ways *ways = worker->ways;

    if (ways == NULL || ways->count == 0 || request->kind != SHMRPC_REQUEST ||
        request->method >= 0 || (request->flags & SHMRPC_FLAG_STREAM) != 0 ||
        load_relaxed(&worker->conn->serves) != 0)
        return NULL;
    const struct method *method =
        methods_find(&ways->names, request->head, request->method_bytes);
    return method != NULL ? &ways->list[method->index] : NULL;
}

/* Whether that is a reply to send back; not if the peer stops, and somebody may know another one. */
static bool is_reply(const struct shmrpc_slot *slot, int64_t result)
{
    const shmrpc_message *reply = &slot->message;

    return result >= 0 || (result == SHMRPC_MESSAGE &&
                           (reply->status != STATUS_UNAVAILABLE || reply->body_bytes != 0));
}

/* Others read what this thread counts. */
static void count(uint64_t *number, uint64_t more)
{
    count_own((atomic_u64 *)number, more);
}

static void tally(shmrpc_tally *tally, uint32_t status, uint64_t nanoseconds)
{
    enum { CODES = sizeof tally->codes / sizeof *tally->codes };
    enum { BUCKETS = sizeof tally->buckets / sizeof *tally->buckets };
    uint32_t bits = nanoseconds == 0 ? 0 : 64 - (uint32_t)__builtin_clzll(nanoseconds);

    count(&tally->codes[status < CODES ? status : 2], 1);
    count(&tally->buckets[bits < BUCKETS ? bits : BUCKETS - 1], 1);
    count(&tally->nanoseconds, nanoseconds);
}

int64_t shmrpc_pass(shmrpc_slot *worker)
{
    for (;;) {
        int64_t status = shmrpc_next(worker);
        const struct way *way =
            status >= 0 || status == SHMRPC_MESSAGE ? find_way(worker) : NULL;
        if (way == NULL)
            return status;
        uint64_t start = clock_now_ns();
        count(&way->tally->running, 1);
        int64_t result = forward(way->slot, worker, way->timeout_ns, worker->ways->epoch);
        bool passed = is_reply(way->slot, result) && shmrpc_reply_from(worker, way->slot) == 0;
        count(&way->tally->running, (uint64_t)-1);
        if (result == -ESTALE)
            return status; /* as if there were no way; the next time that is said */
        if (!passed) {
            worker->ways->result = result;
            worker->ways->since_ns = start;
            return SHMRPC_PASSING;
        }
        tally(way->tally, way->slot->message.status, clock_now_ns() - start);
    }
}

int64_t shmrpc_passing(shmrpc_slot *worker, uint64_t *since_ns)
{
    *since_ns = worker->ways->since_ns;
    return worker->ways->result;
}

void shmrpc_ways_renew(shmrpc_poller *poller)
{
    pthread_mutex_lock(&poller->forward_lock);
    store_release(&poller->ways_epoch, load_relaxed(&poller->ways_epoch) + 1);
    pthread_mutex_unlock(&poller->forward_lock);
    poller_lock(poller);
    store_relaxed(&poller->startable, 1); /* the leader looks what there is to do */
    workers_wake_all(poller);
    poller_unlock(poller);
    poller_kick(poller);
}

uint32_t shmrpc_ways_stale(shmrpc_poller *poller)
{
    uint32_t stale = 0;

    pthread_mutex_lock(&poller->forward_lock);
    for (struct shmrpc_slot *slot = poller->forwards; slot != NULL; slot = slot->next_forward)
        stale += slot->way_epoch != 0 && slot->way_epoch != load_relaxed(&poller->ways_epoch);
    pthread_mutex_unlock(&poller->forward_lock);
    return stale;
}

int shmrpc_caller_serves(shmrpc_slot *worker)
{
    return worker->conn != NULL && load_relaxed(&worker->conn->serves) != 0;
}
