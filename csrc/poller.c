/* poller.c - the registry of conns, stored messages, statistics; what threads do with it is in
 * lead.c, callers.c and workers.c.
 */
#define _GNU_SOURCE
#include "poller.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    INDEX_BITS = 20, /* of a conn id; the rest counts how often the index was used */
};

void poller_lock(struct shmrpc_poller *poller)
{
    pthread_mutex_lock(&poller->lock);
}

void poller_unlock(struct shmrpc_poller *poller)
{
    pthread_mutex_unlock(&poller->lock);
}

/* ---- stored messages ---- */

void stored_append(struct stored_list *list, struct stored *stored)
{
    stored->next = NULL;
    if (list->first == NULL)
        list->last = &list->first;
    *list->last = stored;
    list->last = &stored->next;
}

struct stored *stored_pop(struct stored_list *list)
{
    struct stored *stored = list->first;

    if (stored != NULL)
        list->first = stored->next;
    return stored;
}

void stored_free(struct stored *stored)
{
    if (stored->conn != NULL)
        conn_release(stored->conn);
    blocks_free(stored->message.blocks, stored->message.block_count);
    free(stored->ends);
    free(stored->payload);
    free(stored);
}

/* ---- making and ending ---- */

static int epoll_add(struct shmrpc_poller *poller, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};

    return epoll_ctl(poller->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int make_kick(struct shmrpc_poller *poller)
{
    poller->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (poller->kick_fd < 0)
        return -errno;
    poller->kick_owned = true;
    return epoll_add(poller, poller->kick_fd, EPOLLIN | EPOLLET, 0);
}

shmrpc_poller *shmrpc_poller_new(uint32_t workers, uint32_t max_concurrency, uint32_t mode,
                                 uint32_t spin_budget_ns)
{
    struct shmrpc_poller *poller = calloc(1, sizeof *poller);

    if (poller == NULL)
        return NULL;
    forks_watch();
    poller->forks = forks_seen();
    poller->references = 1;
    poller->kick_fd = -1;
    poller->tick_fd = -1;
    pthread_mutex_init(&poller->lock, NULL);
    pthread_mutex_init(&poller->forward_lock, NULL);
    store_relaxed(&poller->ways_epoch, 1);
    poller->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (poller->epoll_fd < 0 || (workers != 0 && make_kick(poller) < 0)) {
        int error = errno;
        shmrpc_poller_free(poller);
        errno = error;
        return NULL;
    }
    poller->client = poller->reads_always = workers == 0;
    poller->workers = workers;
    poller->max_concurrency = max_concurrency;
    poller->policy.mode = mode;
    poller->locked_policy.budget_ns = 1;
    poller->policy.budget_ns = spin_budget_ns != 0 ? spin_budget_ns : SPIN_BUDGET_NS;
    poller->more = poller->policy;
    return poller;
}

void shmrpc_poller_serve(shmrpc_poller *poller, uint32_t workers, uint32_t max_concurrency)
{
    poller_lock(poller);
    poller->workers = workers;
    poller->max_concurrency = max_concurrency;
    poller_unlock(poller);
}

void shmrpc_poller_serve_events(shmrpc_poller *poller, int reads_always)
{
    poller_lock(poller);
    poller->event_requests = true;
    poller->reads_always |= reads_always != 0;
    poller_unlock(poller);
}

int shmrpc_poller_fd(shmrpc_poller *poller)
{
    return poller->epoll_fd;
}

const uint8_t *shmrpc_poller_rests(shmrpc_poller *poller)
{
    return &poller->rests;
}

static void free_list(struct stored_list *list)
{
    struct stored *stored;

    while ((stored = stored_pop(list)) != NULL)
        stored_free(stored);
}

static void destroy(struct shmrpc_poller *poller)
{
    pthread_mutex_destroy(&poller->lock);
    pthread_mutex_destroy(&poller->forward_lock);
    methods_free(&poller->methods);
    free(poller->conns);
    free(poller->conn_uses);
    free(poller->slots);
    free(poller->hot);
    free(poller->batch.briefs);
    free(poller->batch.bytes);
    free(exchange_pointer(&poller->larger_hot, NULL));
    free(poller);
}

void poller_unref(struct shmrpc_poller *poller)
{
    poller_lock(poller);
    bool last = --poller->references == 0;
    poller_unlock(poller);
    if (last)
        destroy(poller);
}

bool poller_inherited(const struct shmrpc_poller *poller)
{
    return forks_seen() != poller->forks;
}

/* With the lock held: give back descriptors and mappings. Slots that are left keep some private
 * memory alive and nothing else. */
static void give_up(struct shmrpc_poller *poller)
{
    poller->closed = true;
    free_list(&poller->queue);
    free_list(&poller->events);
    for (uint32_t i = 0; i < poller->conn_capacity; i++) {
        struct conn *conn = poller->conns[i];
        if (conn != NULL) {
            poller->conns[i] = NULL;
            conn_destroy(conn);
            conn_release(conn);
        }
    }
    if (poller->kick_owned)
        close(poller->kick_fd);
    if (poller->epoll_fd >= 0)
        close(poller->epoll_fd);
    if (poller->tick_fd >= 0)
        close(poller->tick_fd);
    poller->kick_fd = poller->epoll_fd = poller->tick_fd = -1;
}

void shmrpc_poller_free(shmrpc_poller *poller)
{
    if (poller_inherited(poller))
        return;
    poller_lock(poller);
    if (!poller->closed)
        give_up(poller);
    poller_unlock(poller);
    poller_unref(poller);
}

void poller_end_if_unused(struct shmrpc_poller *poller)
{
    if (!poller->ending || poller->closed)
        return;
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        const struct shmrpc_slot *slot = poller->slots[i];
        if (slot != NULL && (slot->worker || slot->conn != NULL))
            return;
    }
    give_up(poller);
}

void shmrpc_poller_end(shmrpc_poller *poller)
{
    if (poller_inherited(poller))
        return;
    poller_lock(poller);
    poller->ending = true;
    poller_end_if_unused(poller);
    poller_unlock(poller);
}

void poller_kick(struct shmrpc_poller *poller)
{
    static const uint64_t one = 1;
    ssize_t written = write(poller->kick_fd, &one, sizeof one);

    (void)written; /* at its limit the eventfd is readable anyway */
}

void shmrpc_poller_drain(shmrpc_poller *poller)
{
    store_release(&poller->draining, 1);
}

void shmrpc_poller_stop(shmrpc_poller *poller)
{
    poller_lock(poller);
    store_release(&poller->stopping, 1);
    workers_cancel_all(poller);
    workers_wake_all(poller);
    callers_stop(poller);
    poller_kick(poller);
    poller_unlock(poller);
    forwards_unwanted(poller, NULL, 0);
}

shmrpc_brief *shmrpc_poller_batch(shmrpc_poller *poller, int is_event)
{
    struct batch *batch = &poller->batch;

    poller_lock(poller);
    if (batch->bytes == NULL)
        batch->bytes = malloc(SHMRPC_BATCH_BYTES);
    if (batch->bytes != NULL && batch->briefs == NULL) {
        batch->briefs = calloc(SHMRPC_BATCH_BRIEFS, sizeof *batch->briefs);
        batch->is_event = batch->open = batch->briefs != NULL && is_event != 0;
        if (!is_event)
            poller->event_loop = true;
    }
    poller_unlock(poller);
    return batch->briefs;
}

void shmrpc_poller_brief_items(shmrpc_poller *poller)
{
    poller_lock(poller);
    poller->batch.has_items = true;
    poller_unlock(poller);
}

uint8_t *shmrpc_poller_batch_bytes(shmrpc_poller *poller)
{
    return poller->batch.bytes;
}

int shmrpc_method_add(shmrpc_poller *poller, const char *name, size_t bytes, int32_t index,
                      int fast)
{
    poller_lock(poller);
    int status = methods_add(&poller->methods, name, bytes, index, fast != 0);
    poller_unlock(poller);
    return status;
}

/* What is in the ring of `writer` for `reader`. One of the indexes is the peer's, and may be anything;
 * both move meanwhile. */
static void count_ring(shmrpc_stats *stats, const struct segment_shm *writer,
                       const struct segment_shm *reader, uint64_t bytes)
{
    uint64_t head = load_relaxed(&reader->head), tail = load_relaxed(&writer->tail);
    uint64_t used = tail - head > UINT64_MAX / 2 ? 0 : tail - head;

    if (used > bytes)
        used = bytes;
    stats->ring_bytes += bytes;
    stats->ring_used += used;
    if (used * 100 / bytes > stats->fullest_ring_percent)
        stats->fullest_ring_percent = used * 100 / bytes;
}

void shmrpc_poller_stats(shmrpc_poller *poller, shmrpc_stats *stats)
{
    struct counters *counters = &poller->counters;

    poller_lock(poller);
    *stats = (shmrpc_stats){
        .spins_hit = load_relaxed(&counters->spins_hit),
        .spins_missed = load_relaxed(&counters->spins_missed),
        .yields = load_relaxed(&counters->yields),
        .sleeps = load_relaxed(&counters->sleeps),
        .wakeups_sent = load_relaxed(&counters->wakeups_sent),
        .frames_received = load_relaxed(&counters->frames_received),
        .frames_dropped = load_relaxed(&counters->frames_dropped),
        .late_replies = load_relaxed(&counters->late_replies),
        .calls_started = load_relaxed(&counters->calls_started),
        .calls_refused = load_relaxed(&counters->calls_refused),
        .calls_expired = load_relaxed(&counters->calls_expired),
        .running = poller->running + poller->blocked,
        .queued = poller->queued,
        .conns = poller->conn_count,
        .calls_queued = load_relaxed(&counters->calls_queued),
        .queued_ns = load_relaxed(&counters->queued_ns),
    };
    if (poller->queue.first != NULL)
        stats->oldest_queued_ns = clock_now_ns() - poller->queue.first->queued_ns;
    for (uint32_t i = 0; i < poller->conn_capacity; i++) {
        const struct conn *conn = poller->conns[i];
        if (conn == NULL)
            continue;
        stats->outbox_bytes += load_relaxed(&conn->outbox_bytes);
        if (conn->is_shm) {
            count_ring(stats, conn->wake.own, conn->wake.peer, conn->own_ring_bytes);
            count_ring(stats, conn->wake.peer, conn->wake.own, conn->peer_ring_bytes);
        }
    }
    poller_unlock(poller);
}

void shmrpc_method_counts(shmrpc_poller *poller, uint64_t *counts, uint32_t count)
{
    poller_lock(poller);
    for (uint32_t i = 0; i < poller->methods.capacity; i++) {
        const struct method *method = &poller->methods.table[i];
        if (method->bytes != 0 && method->index >= 0 && (uint32_t)method->index < count)
            counts[method->index] = method->calls;
    }
    poller_unlock(poller);
}

/* ---- the registry ---- */

struct conn *poller_find(struct shmrpc_poller *poller, uint64_t conn_id)
{
    uint64_t index = conn_id & ((1u << INDEX_BITS) - 1);

    if (index >= poller->conn_capacity || poller->conns[index] == NULL ||
        poller->conns[index]->id != conn_id)
        return NULL;
    return poller->conns[index];
}

static int grow_registry(struct shmrpc_poller *poller)
{
    uint32_t capacity = poller->conn_capacity == 0 ? 1 : poller->conn_capacity * 2;

    if (capacity > 1u << INDEX_BITS)
        return -ENOMEM;
    struct conn **conns = realloc(poller->conns, capacity * sizeof *conns);
    if (conns == NULL)
        return -ENOMEM;
    poller->conns = conns;
    uint64_t *uses = realloc(poller->conn_uses, capacity * sizeof *uses);
    if (uses == NULL)
        return -ENOMEM;
    poller->conn_uses = uses;
    for (uint32_t i = poller->conn_capacity; i < capacity; i++) {
        conns[i] = NULL;
        uses[i] = 0;
    }
    poller->conn_capacity = capacity;
    return 0;
}

/* Registering is where memory may run out: heating a conn later must not fail, because its bell has
 * rung for this sleep already. */
static int reserve_hot(struct shmrpc_poller *poller)
{
    struct hot_list *list =
        malloc(sizeof *list + poller->conn_capacity * sizeof(struct conn *));

    if (list == NULL)
        return -ENOMEM;
    list->capacity = poller->conn_capacity;
    free(exchange_pointer(&poller->larger_hot, list));
    return 0;
}

static int register_conn(struct shmrpc_poller *poller, struct conn *conn)
{
    uint32_t index = 0;

    while (index < poller->conn_capacity && poller->conns[index] != NULL)
        index++;
    if (index == poller->conn_capacity) {
        int status = grow_registry(poller);
        if (status == 0 && (status = reserve_hot(poller)) < 0)
            poller->conn_capacity = index; /* the next one tries again */
        if (status < 0)
            return status;
    }
    poller->conns[index] = conn;
    poller->conn_count++;
    conn->id = ++poller->conn_uses[index] << INDEX_BITS | index;
    return 0;
}

void poller_unregister(struct shmrpc_poller *poller, const struct conn *conn)
{
    poller->conns[conn->id & ((1u << INDEX_BITS) - 1)] = NULL;
    poller->conn_count--;
}

static int watch_conn(struct shmrpc_poller *poller, struct conn *conn)
{
    conn->epoll_data = conn->id | EPOLL_CONTROL;
    int status = epoll_add(poller, conn->control_fd, EPOLLIN | EPOLLRDHUP, conn->epoll_data);

    if (status == 0 && conn->own_bell_fd >= 0)
        status = epoll_add(poller, conn->own_bell_fd, EPOLLIN | EPOLLET, conn->id);
    if (status == 0 && poller->kick_fd < 0) {
        /* A client has one conn, whose bell wakes the leader as well as a kick of its own. */
        poller->kick_fd = conn->own_bell_fd;
        if (poller->kick_fd < 0)
            status = make_kick(poller);
    }
    return status;
}

int64_t shmrpc_conn_add(shmrpc_poller *poller, const shmrpc_conn_options *options)
{
    struct conn *conn = calloc(1, sizeof *conn);

    if (conn == NULL)
        return -ENOMEM;
    int status = conn_init(conn, options, poller->epoll_fd);
    if (status < 0) {
        free(conn);
        return status;
    }
    poller_lock(poller);
    status = register_conn(poller, conn);
    if (status == 0) {
        status = watch_conn(poller, conn);
        if (status < 0)
            poller_unregister(poller, conn);
    }
    int64_t id = (int64_t)conn->id;
    poller_unlock(poller);
    if (status == 0)
        return id;
    conn_abandon(conn);
    free(conn);
    return status;
}

void conn_release(struct conn *conn)
{
    if (--conn->references != 0)
        return;
    if (!conn->destroyed)
        conn_destroy(conn);
    free(conn);
}

int shmrpc_conn_shutdown(shmrpc_poller *poller, uint64_t conn_id)
{
    poller_lock(poller);
    struct conn *conn = poller_find(poller, conn_id);
    if (conn != NULL) {
        if (conn->producer.holds) { /* what was sent before is to arrive */
            uint64_t bells = 0;
            conn_publish(conn, true, &bells);
        }
        /* Who is gone before that has left a segment that nobody changes any more. */
        if (load_relaxed(&conn->error) == 0 && !conn_peer_left(conn))
            store_relaxed(&conn->ended_here, 1);
        shutdown(conn->control_fd, SHUT_RDWR); /* epoll tells the leader, as if the peer did it */
    }
    poller_unlock(poller);
    return conn != NULL ? 0 : -EPIPE;
}

int shmrpc_conn_goodbye(shmrpc_poller *poller, uint64_t conn_id)
{
    struct outgoing message = {.header = {.kind = SHMRPC_GOODBYE}};
    atomic_u64 position;

    poller_lock(poller);
    struct conn *conn = poller_find(poller, conn_id);
    int status = conn == NULL ? -EPIPE : workers_run(poller, conn) ? -EBUSY : 0;
    if (status == 0)
        conn->references++;
    poller_unlock(poller);
    if (status < 0)
        return status;
    status = poller_send(poller, conn, &message, &position);
    poller_lock(poller);
    conn_release(conn);
    poller_unlock(poller);
    return status < 0 ? status : 0;
}

int shmrpc_conn_status(shmrpc_poller *poller, uint64_t conn_id)
{
    poller_lock(poller);
    const struct conn *conn = poller_find(poller, conn_id);
    int status = conn != NULL ? -(int)load_relaxed(&conn->error) : -EPIPE;
    poller_unlock(poller);
    return status;
}

int shmrpc_outcome_of(shmrpc_slot *slot, uint64_t call_id, uint64_t position)
{
    struct conn *conn = slot->conn;
    int outcome = SHMRPC_UNKNOWN;

    poller_lock(slot->poller);
    if (conn != NULL && !conn->destroyed)
        outcome = conn_outcome(conn, call_id, position);
    poller_unlock(slot->poller);
    return outcome;
}

int shmrpc_poller_fds(shmrpc_poller *poller, int *fds, int count)
{
    int used = 0;

    for (uint32_t i = 0; i < poller->conn_capacity; i++) {
        const struct conn *conn = poller->conns[i];
        if (conn == NULL)
            continue;
        const int all[] = {conn->control_fd, conn->own_bell_fd,
                           conn->is_shm && !conn->wake.bell_socket ? conn->wake.peer_bell : -1};
        for (int k = 0; k < 3; k++)
            if (all[k] >= 0 && used < count)
                fds[used++] = all[k];
    }
    if (poller->kick_owned && !poller->closed && used < count)
        fds[used++] = poller->kick_fd;
    if (poller->tick_fd >= 0 && used < count)
        fds[used++] = poller->tick_fd;
    if (!poller->closed && used < count)
        fds[used++] = poller->epoll_fd;
    return used;
}
