/* workers.c - threads that run requests, and who reads while they do.
 *
 *   leader    reads; runs what it reads itself, and stays leader meanwhile ("away")
 *   standby   looks every TICK_NS whether the leader is away with the same request as at the last
 *             tick; if so it takes the role, and another thread stands by. Parked while the leader
 *             is reading or asleep; a leader that goes away wakes it
 *   running   lost the role while away; replies, then takes from the queue, stands by or idles
 *   idle      waits to stand by
 *
 * So a short handler costs no thread switch at all, and one that takes long or blocks keeps the
 * others waiting for two ticks at most. `workers` requests run at a time; one thread more exists,
 * which then reads on: it queues, refuses, answers pings and takes note of cancellations.
 *
 * Callers (callers.c) may wait on the same poller: handlers that call their caller back or wait
 * for items of a stream, threads of a client that also serves. A caller takes the role from a
 * worker that only reads, and leaves it to the standby ("away" without a leader). While a handler
 * waits so, its request does not count as running, or handlers that wait for each other could use
 * up all workers. On a client a request goes to the caller that leads, if one does.
 */
#define _GNU_SOURCE
#include "poller.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
    TICK_NS = 1000000,
    TICK_SLEEPS = 4, /* so many sleeps in a tick are many */
    OUTBOX_MAX = 1 << 20,    /* a peer that does not fetch its replies is not read any more */
    QUEUED_BYTES_MAX = 64 << 20,
    SPARE_THREADS = 8,
    SPAWN_NS = 100000000,
};

/* The request that this thread serves, the innermost if one is served while another waits. */
static _Thread_local struct shmrpc_slot *serving;

/* ---- admission ---- */

void workers_answer(struct shmrpc_poller *poller, struct conn *conn, uint64_t call_id,
                    uint32_t status)
{
    struct outgoing message = {.header = {
                                   .kind = SHMRPC_REPLY,
                                   .method_bytes = (uint16_t)status,
                                   .call_id = call_id,
                               }};
    atomic_u64 position;

    poller_send(poller, conn, &message, &position);
}

static bool over_limits(const struct conn *conn, uint64_t queued_max)
{
    return load_relaxed(&conn->queued) >= queued_max ||
           load_relaxed(&conn->outbox_bytes) > OUTBOX_MAX;
}

bool workers_full(const struct shmrpc_poller *poller, const struct conn *conn)
{
    if (poller->reads_always)
        return false; /* a caller reads always, or two sides that only send would wait for ever */
    /* So does a handler that waits for a reply: it may lie behind the requests that are too many.
     * Those are queued, without a place in the segment's table, or refused. */
    return over_limits(conn, poller->caller_leads ? UINT64_MAX : LAYOUT_QUEUED_MAX);
}

void workers_read_again(struct shmrpc_poller *poller, struct conn *conn)
{
    conn->resumed = true;
    poller->resumes = true;
    poller_kick(poller);
}

/* With the lock held: whether it may run or queue; STATUS_OK or why not. */
static uint32_t admit(struct shmrpc_poller *poller, const struct frame_header *header,
                      uint64_t deadline_ns)
{
    if (load_relaxed(&poller->draining) != 0 && header->kind == SHMRPC_REQUEST)
        return STATUS_UNAVAILABLE;
    if (deadline_ns != 0 && clock_now_ns() >= deadline_ns) {
        count_own(&poller->counters.calls_expired, 1);
        return STATUS_DEADLINE_EXCEEDED;
    }
    if (poller->event_requests)
        return STATUS_OK;
    if (poller->workers == 0)
        return STATUS_UNIMPLEMENTED;
    bool waits = poller->running >= poller->workers && poller->queued != 0;
    /* Those that wait count as well: each has a thread. */
    if (poller->running + poller->blocked + poller->queued >= poller->max_concurrency ||
        (waits && poller->queued_bytes + header->total_bytes > QUEUED_BYTES_MAX)) {
        count_own(&poller->counters.calls_refused, 1);
        return STATUS_RESOURCE_EXHAUSTED;
    }
    return STATUS_OK;
}

/* With the lock held: the slot's message is a request that starts now. Tells by -ENOENT that
 * nobody knows its method, by 0 that it may start. */
static int find_method(struct shmrpc_poller *poller, struct shmrpc_slot *slot, bool *fast)
{
    shmrpc_message *message = &slot->message;
    struct method *method = methods_find(&poller->methods, message->head, message->method_bytes);

    if (method == NULL)
        return -ENOENT;
    method->calls++;
    message->method = method->index;
    *fast = method->fast && message->kind == SHMRPC_REQUEST && message->flags == 0 &&
            slot_in_view(slot);
    return 0;
}

/* Whether this thread serves another request of this poller around the slot's: that one waits. */
static bool serves_around(const struct shmrpc_poller *poller, const struct shmrpc_slot *slot)
{
    return slot->serves != NULL && slot->serves->poller == poller && slot->serves->running;
}

/* With the lock held: the slot's request, if it has one, is one that takes long, and has run for (at
 * least) so long already. */
static void note_long(struct shmrpc_slot *slot, uint64_t ago_ns)
{
    if (slot->running && slot->since_ns == 0)
        slot->since_ns = clock_now_ns() - ago_ns;
}

/* With the lock held. */
static void start(struct shmrpc_poller *poller, struct shmrpc_slot *slot, struct conn *conn,
                  bool fast)
{
    conn->references++;
    slot->conn = conn;
    slot->serves = serving;
    serving = slot;
    if (serves_around(poller, slot)) {
        poller->running--;
        poller->blocked++;
    }
    slot->running = true;
    slot->replied = slot->message.kind != SHMRPC_REQUEST;
    slot->call_id = slot->message.call_id;
    slot->since_ns = 0;
    poller->running++;
    count_own(&poller->counters.calls_started, 1);
    slot_finish(slot, fast ? (int64_t)slot->message.body_bytes : SHMRPC_MESSAGE);
}

/* With the lock held: say in our segment that this call is taken but not started, before the
 * peer can see that it is taken. Returns its place in the table; a notification has none. */
static uint32_t mark_queued(struct conn *conn, uint64_t call_id)
{
    uint32_t i = 0;

    store_relaxed(&conn->queued, load_relaxed(&conn->queued) + 1);
    if (!conn->is_shm || call_id == 0)
        return LAYOUT_QUEUED_MAX;
    while (i < LAYOUT_QUEUED_MAX && load_relaxed(&conn->wake.own->queued[i]) != 0)
        i++;
    if (i < LAYOUT_QUEUED_MAX)
        store_relaxed(&conn->wake.own->queued[i], call_id);
    return i;
}

static void unmark_queued(struct conn *conn, uint32_t index)
{
    store_relaxed(&conn->queued, load_relaxed(&conn->queued) - 1);
    if (index < LAYOUT_QUEUED_MAX)
        store_release(&conn->wake.own->queued[index], 0);
}

/* With the lock held. */
static int enqueue(struct shmrpc_poller *poller, struct conn *conn,
                   const struct frame_header *header)
{
    struct stored *stored = calloc(1, sizeof *stored);

    if (stored == NULL)
        return -ENOMEM;
    stored->payload = conn_take_payload(conn);
    if (stored->payload == NULL) {
        stored->payload = malloc(header->total_bytes + 1u);
        if (stored->payload == NULL) {
            free(stored);
            return -ENOMEM;
        }
        conn_read(conn, header->total_bytes, stored->payload);
    }
    message_from_header(&stored->message, conn, header);
    stored->conn = conn;
    conn->references++;
    stored->total_bytes = header->total_bytes;
    stored->queued_index = mark_queued(conn, header->call_id);
    stored->queued_ns = clock_now_ns();
    poller->queued++;
    poller->queued_bytes += header->total_bytes;
    stored_append(&poller->queue, stored);
    return 0;
}

/* With the lock held: have the parked standby wake in so many nanoseconds; 0: not at all. Setting the
 * timer and unsetting it when the leader is about to sleep again cost 0.5 us each, 4 us on virtual
 * machines; waking the standby for each request cost 17 us at 1,000 a second. Where there are
 * several sleeps in a tick (a unix socket's server: 14 instead of 4 us of CPU a request) the timer
 * stays set, and the standby wakes for all of them together, and ticks as long as that goes on. */
static void set_tick(struct shmrpc_poller *poller, long nanoseconds)
{
    const struct itimerspec when = {.it_value.tv_nsec = nanoseconds};

    poller->tick_set = nanoseconds != 0;
    poller->tick_count = poller->away_count;
    timerfd_settime(poller->tick_fd, 0, &when, NULL);
}

/* With the lock held. */
static void wake_standby(struct shmrpc_poller *poller)
{
    if (poller->standby_parked) {
        set_tick(poller, 1);
        poller->tick_set = false; /* nothing may unset it */
        poller->tick_is_wake = true;
    } else {
        slot_wake(poller->standby, SLOT_WAITING);
    }
}

static void wake_idle(struct shmrpc_poller *poller)
{
    struct shmrpc_slot *slot = poller->idle;

    if (slot != NULL) {
        poller->idle = slot->next_idle;
        slot_wake(slot, SLOT_WAITING);
    }
}

/* With the lock held: the threads there are, and those that were asked for and are on their way.
 * One that has not come after SPAWN_NS could not be started. */
static uint32_t expected_threads(struct shmrpc_poller *poller)
{
    if (poller->spawning != 0 && clock_now_ns() - poller->spawned_ns > SPAWN_NS)
        poller->spawning = 0;
    return poller->worker_threads + poller->spawning;
}

/* With the lock held: whether one more thread may be started. There is one more than requests that
 * run or wait, so that somebody reads. */
static bool may_spawn(struct shmrpc_poller *poller)
{
    return expected_threads(poller) <= poller->workers + poller->blocked;
}

/* With the lock held: somebody is asked to start one. */
static int64_t spawn(struct shmrpc_poller *poller)
{
    poller->spawning++;
    poller->spawned_ns = clock_now_ns();
    return SHMRPC_SPAWN;
}

/* With the lock held: whether one of them may end, because more handlers waited once. Some are kept:
 * the next handler that waits is likely to need them again. */
static bool has_surplus(const struct shmrpc_poller *poller)
{
    return poller->worker_threads > poller->workers + poller->blocked + 1 + SPARE_THREADS;
}

/* With the lock held: whether a client's worker leaves requests to the threads that wait for
 * replies: one of them leads, or is about to. */
static bool left_to_callers(const struct shmrpc_poller *poller)
{
    return poller->client && poller->inside != 0;
}

/* With the lock held: where the first queued request hangs whose caller fetches its replies. The
 * others wait, or the replies of a caller that does not would fill our memory. */
static struct stored **first_ready(struct shmrpc_poller *poller)
{
    struct stored **link = &poller->queue.first;

    while (*link != NULL && load_relaxed(&(*link)->conn->outbox_bytes) > OUTBOX_MAX &&
           load_relaxed(&(*link)->conn->error) == 0)
        link = &(*link)->next;
    return link;
}

/* With the lock held: if a request waits in the queue, make sure that somebody runs it. True: the
 * leader, at its next look. */
static bool find_runner(struct shmrpc_poller *poller)
{
    if (*first_ready(poller) == NULL)
        return false;
    if (poller->running >= poller->workers && !left_to_callers(poller))
        return false; /* who ends next, takes it */
    store_relaxed(&poller->startable, 1);
    if (poller->client || (poller->leader != NULL && poller->leader->goal == GOAL_REQUEST &&
                           !poller->away))
        return true;
    if (poller->standby != NULL) {
        wake_standby(poller);
    } else if (poller->idle != NULL) {
        wake_idle(poller);
    } else if (load_relaxed(&poller->spawn_wanted) == 0 && may_spawn(poller)) {
        spawn(poller);
        store_relaxed(&poller->spawn_wanted, 1); /* which the leading caller sees */
    }
    return load_relaxed(&poller->spawn_wanted) != 0;
}

/* The same for who does not lead: the leader may be asleep. */
static void find_runner_and_kick(struct shmrpc_poller *poller)
{
    if (find_runner(poller))
        poller_kick(poller);
}

void workers_resume(struct shmrpc_poller *poller)
{
    poller_lock(poller);
    find_runner(poller);
    poller_unlock(poller);
}

/* With the lock held: the message for Python, as take_request. */
static uint32_t pass_on(struct shmrpc_poller *poller, struct conn *conn,
                        const struct frame_header *header)
{
    bool is_brief = events_add_brief(poller, conn, header);
    int result = is_brief ? 0 : events_receive(poller, conn, header);

    conn_finish(conn, header->length, &poller->bells);
    if (is_brief) {
        count_own(&poller->counters.calls_started, 1);
        return STATUS_OK;
    }
    if (result < 0)
        return STATUS_RESOURCE_EXHAUSTED;
    /* `last` is the first member of the event that was just added. */
    struct stored *stored = (struct stored *)poller->events.last;
    struct method *method =
        methods_find(&poller->methods, stored->payload, stored->message.method_bytes);
    stored->message.method = method != NULL ? method->index : -1;
    if (method != NULL)
        method->calls++;
    count_own(&poller->counters.calls_started, 1);
    return STATUS_OK;
}

/* With the lock held: take the message into the slot and start it, or queue it. Returns a status
 * to answer with; the message is consumed in any case. */
static uint32_t take_request(struct shmrpc_poller *poller, struct shmrpc_slot *slot,
                             struct conn *conn, const struct frame_header *header)
{
    bool starts = slot->goal == GOAL_REQUEST && poller->running < poller->workers &&
                  poller->queue.first == NULL && /* not before those that came earlier */
                  !left_to_callers(poller);
    bool fast = false;
    int result = starts ? slot_receive(slot, conn, header) : enqueue(poller, conn, header);

    if (result == 0 && starts)
        result = find_method(poller, slot, &fast);
    /* Taken, for the peer's eyes, before anything of it runs: see conn_outcome. */
    conn_finish(conn, header->length, &poller->bells);
    if (result == -ENOENT)
        return STATUS_UNIMPLEMENTED;
    if (result < 0) {
        count_own(&poller->counters.calls_refused, 1);
        return STATUS_RESOURCE_EXHAUSTED;
    }
    if (header->kind == SHMRPC_REQUEST && (header->flags & SHMRPC_FLAG_STREAM) != 0)
        events_note(poller, conn, SHMRPC_REQUEST, header->call_id, header->flags);
    if (starts)
        start(poller, slot, conn, fast);
    else
        find_runner(poller);
    return STATUS_OK;
}

void workers_request(struct shmrpc_poller *poller, struct shmrpc_slot *slot, struct conn *conn,
                     const struct frame_header *header)
{
    uint64_t deadline_ns = header->deadline_ns;

    if (deadline_ns > 1 && conn->relative_deadlines)
        deadline_ns = 0; /* it began to count when it arrived here; 1 had passed when it was sent */
    poller_lock(poller);
    uint32_t status = admit(poller, header, deadline_ns);
    if (status == STATUS_OK && poller->event_requests)
        status = pass_on(poller, conn, header);
    else if (status == STATUS_OK)
        status = take_request(poller, slot, conn, header);
    else
        conn_finish(conn, header->length, &poller->bells);
    poller_unlock(poller);
    if (status == STATUS_OK)
        return;
    if (header->kind == SHMRPC_REQUEST)
        workers_answer(poller, conn, header->call_id, status);
    else
        count_add(&poller->counters.frames_dropped, 1);
}

void workers_cancel(struct shmrpc_poller *poller, struct conn *conn, uint64_t call_id)
{
    uint32_t flags = 0;

    poller_lock(poller);
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        struct shmrpc_slot *slot = poller->slots[i];
        if (slot != NULL && slot->running && slot->conn == conn && slot->call_id == call_id) {
            store_release32((atomic_u32 *)&slot->message.cancelled, 1);
            flags |= slot->message.flags;
        }
    }
    for (struct stored *stored = poller->queue.first; stored != NULL; stored = stored->next) {
        if (stored->conn == conn && stored->message.call_id == call_id) {
            stored->message.cancelled = 1; /* dropped when its turn comes */
            flags |= stored->message.flags;
        }
    }
    if ((flags & SHMRPC_FLAG_STREAM) != 0 || poller->event_requests)
        events_note(poller, conn, SHMRPC_CANCEL, call_id, flags);
    poller_unlock(poller);
    forwards_unwanted(poller, conn, call_id);
}

bool workers_run(const struct shmrpc_poller *poller, const struct conn *conn)
{
    for (uint32_t i = 0; i < poller->slot_capacity; i++)
        if (poller->slots[i] != NULL && poller->slots[i]->running && poller->slots[i]->conn == conn)
            return true;
    return conn->unanswered;
}

void workers_cancel_all(struct shmrpc_poller *poller)
{
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        struct shmrpc_slot *slot = poller->slots[i];
        if (slot != NULL && slot->running)
            store_release32((atomic_u32 *)&slot->message.cancelled, 1);
    }
}

uint32_t shmrpc_poller_running(shmrpc_poller *poller, shmrpc_running *running, uint32_t count)
{
    uint32_t used = 0;

    poller_lock(poller);
    for (uint32_t i = 0; i < poller->slot_capacity && used < count; i++) {
        const struct shmrpc_slot *slot = poller->slots[i];
        if (slot == NULL || !slot->running)
            continue;
        running[used++] = (shmrpc_running){
            .call_id = slot->call_id,
            .conn_id = slot->message.conn_id,
            .since_ns = slot->since_ns,
            .deadline_ns = slot->message.deadline_ns,
            .method = slot->message.method,
        };
    }
    poller_unlock(poller);
    return used;
}

/* ---- the queue ---- */

/* With the lock held: take that one out. */
static struct stored *pop_queued(struct shmrpc_poller *poller)
{
    struct stored **link = first_ready(poller);
    struct stored *stored = *link;

    if (stored == NULL)
        return NULL;
    *link = stored->next;
    if (stored->next == NULL)
        poller->queue.last = link;
    return stored;
}

void workers_retire(struct shmrpc_poller *poller)
{
    struct stored *stored;

    poller->retired = true;
    while ((stored = stored_pop(&poller->queue)) != NULL) {
        bool call = stored->message.kind == SHMRPC_REQUEST;
        count_add(call ? &poller->counters.calls_expired : &poller->counters.frames_dropped, 1);
        unmark_queued(stored->conn, stored->queued_index);
        stored_free(stored);
    }
    poller->queued = 0;
    poller->queued_bytes = 0;
    store_relaxed(&poller->startable, 0);
    workers_wake_all(poller);
}

/* With the lock held (and given up for moments): start the next queued request that is still
 * wanted, if fewer than `workers` run. */
static bool start_queued(struct shmrpc_poller *poller, struct shmrpc_slot *slot, uint32_t workers)
{
    struct stored *stored;

    store_relaxed(&poller->startable, 0);
    while (poller->running < workers && (stored = pop_queued(poller)) != NULL) {
        struct conn *conn = stored->conn;
        shmrpc_message *message = &stored->message;
        bool call = message->kind == SHMRPC_REQUEST;
        uint64_t now_ns = clock_now_ns();
        bool late = message->deadline_ns != 0 && now_ns >= message->deadline_ns;
        bool gone = call && (load_relaxed(&conn->error) != 0 || message->cancelled != 0);
        bool fast;

        count_own(&poller->counters.calls_queued, 1);
        count_own(&poller->counters.queued_ns, now_ns - stored->queued_ns);
        poller->queued--;
        poller->queued_bytes -= stored->total_bytes;
        if (over_limits(conn, LAYOUT_QUEUED_MAX))
            workers_read_again(poller, conn);
        unmark_queued(conn, stored->queued_index);
        slot_take(slot, stored);
        uint32_t status = STATUS_OK;
        if (late || gone) {
            count_own(&poller->counters.calls_expired, 1);
            status = STATUS_DEADLINE_EXCEEDED;
        } else if (find_method(poller, slot, &fast) < 0) {
            status = STATUS_UNIMPLEMENTED;
        }
        if (status == STATUS_OK) {
            start(poller, slot, conn, false);
            slot->since_ns = now_ns;
            find_runner_and_kick(poller); /* those behind it need not wait until it ends */
        } else if (call) {
            poller_unlock(poller); /* the reference in `stored` keeps the conn */
            workers_answer(poller, conn, slot->message.call_id, status);
            poller_lock(poller);
            if ((slot->message.flags & SHMRPC_FLAG_STREAM) != 0) {
                events_note(poller, conn, SHMRPC_CANCEL, slot->message.call_id,
                            slot->message.flags);
                poller_kick(poller); /* we need not be the one that leads */
            }
        }
        stored_free(stored);
        if (status == STATUS_OK)
            return true;
    }
    return false;
}

/* ---- roles ---- */

void workers_go_away(struct shmrpc_poller *poller)
{
    /* Somebody has to keep an eye on that. */
    poller->away = true;
    poller->away_count++;
    if (poller->standby_parked && !poller->tick_set && !poller->tick_is_wake)
        set_tick(poller, TICK_NS);
}

void workers_sleep(struct shmrpc_poller *poller, uint64_t now_ns)
{
    poller_lock(poller);
    if (poller->tick_set && now_ns - poller->slept_ns > TICK_NS / TICK_SLEEPS)
        set_tick(poller, 0);
    poller->slept_ns = now_ns;
    poller_unlock(poller);
}

/* With the lock held on entry and exit: sleep until woken or until the deadline. */
static void doze(struct shmrpc_poller *poller, struct shmrpc_slot *slot, uint64_t deadline_ns)
{
    store_release32(&slot->state, SLOT_SLEEPING);
    poller_unlock(poller);
    while (slot_sleep(slot, deadline_ns) == -EINTR)
        ; /* signals are the main thread's business */
    poller_lock(poller);
    store_release32(&slot->state, SLOT_WAITING);
}

/* With the lock held: whether there is the timer for it; without, the standby ticks on. */
static bool can_park(struct shmrpc_poller *poller)
{
    if (poller->tick_fd < 0)
        poller->tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    return poller->tick_fd >= 0;
}

/* With the lock held on entry and exit: sleep until the timer wakes the standby. True if it did so
 * because the leader stays away. */
static bool park(struct shmrpc_poller *poller)
{
    uint64_t ticks;
    ssize_t count;

    poller->standby_parked = true;
    poller_unlock(poller);
    lock_release();
    do
        count = read(poller->tick_fd, &ticks, sizeof ticks);
    while (count < 0 && errno == EINTR); /* signals are the main thread's business */
    poller_lock(poller);
    bool stays_away = !poller->tick_is_wake && poller->away &&
                      poller->away_count == poller->tick_count;
    poller->standby_parked = poller->tick_set = poller->tick_is_wake = false;
    return stays_away;
}

static bool must_end(const struct shmrpc_poller *poller)
{
    return load_relaxed(&poller->stopping) != 0 || poller->retired;
}

/* With the lock held: watch the leader. True when it stays away too long; false when there is a
 * request to run, or the poller stops. On a client requests are for the caller that leads, and
 * the standby runs them only when it takes the role itself. */
static bool stand_by(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    uint64_t seen = poller->away_count;
    bool takes = false;

    poller->standby = slot;
    while (!must_end(poller) && !ways_stale(poller, slot) && !takes) {
        if (!poller->client && load_relaxed(&poller->startable) != 0)
            break;
        if (!poller->away && poller->away_count == seen && can_park(poller)) {
            takes = park(poller);
            continue; /* and tick, if requests have come */
        }
        bool away = poller->away;
        seen = poller->away_count;
        doze(poller, slot, clock_now_ns() + TICK_NS);
        takes = away && poller->away && poller->away_count == seen;
    }
    poller->standby = NULL;
    return takes && !must_end(poller);
}

static void idle(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    slot->next_idle = poller->idle;
    poller->idle = slot;
    doze(poller, slot, 0);
}

void workers_wake_all(struct shmrpc_poller *poller)
{
    while (poller->idle != NULL)
        wake_idle(poller);
    if (poller->standby != NULL)
        wake_standby(poller);
}

static void drop_reply_metadata(struct shmrpc_slot *slot)
{
    free(slot->reply_metadata);
    slot->reply_metadata = NULL;
    slot->reply_metadata_bytes = 0;
}

/* With the lock held: the slot's request is over. */
static void finish_request(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    if (!slot->running)
        return;
    shmrpc_detach(slot); /* while it has a conn */
    slot_drop_blocks(slot);
    slot->running = false;
    if (!slot->replied)
        slot->conn->unanswered = true;
    slot->message.call_id = 0; /* who still knows that call learns that it is over */
    poller->running--;
    if (serves_around(poller, slot)) {
        poller->running++;
        poller->blocked--;
    }
    conn_release(slot->conn);
    slot->conn = NULL;
    if (serving == slot)
        serving = slot->serves;
    drop_reply_metadata(slot);
}

void workers_forget(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    if (!poller->closed)
        finish_request(poller, slot);
    else if (slot->running)
        conn_release(slot->conn);
    if (serving == slot)
        serving = slot->serves;
    poller->worker_threads -= slot->has_thread;
    if (has_surplus(poller))
        wake_idle(poller);
    if (poller->leader == slot) {
        callers_inherit(poller, slot);
        if (poller->leader == NULL)
            workers_go_away(poller);
    }
}

void workers_enter(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    if (serving != NULL && serving->poller == poller && serving->running) {
        slot->blocks = serving;
        note_long(serving, 0);
        poller->running--;
        poller->blocked++;
    }
    if (slot->blocks != NULL || poller->client)
        find_runner_and_kick(poller); /* there is one more to run it, or that may */
    if (!poller->client && slot->conn != NULL && over_limits(slot->conn, LAYOUT_QUEUED_MAX))
        workers_read_again(poller, slot->conn);
}

void workers_leave(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    if (slot->blocks == NULL)
        return;
    slot->blocks = NULL;
    poller->blocked--;
    poller->running++; /* perhaps beyond `workers` for a while */
    if (has_surplus(poller))
        wake_idle(poller); /* it ends, and wakes the next one */
}

/* With the lock held: this worker leads, and goes out to Python. A caller that waits for the role
 * gets it: nobody knows how long that takes. */
static void step_out(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    if (load_relaxed(&poller->role_wanted) != 0)
        callers_promote(poller, slot);
    if (poller->leader == slot)
        workers_go_away(poller);
    else
        note_long(slot, 0); /* the standby does not watch who does not lead */
}

/* With the lock held: lead. What that ended with for the worker, or RESULT_QUEUED: to look again
 * what there is to do. */
static int64_t lead(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    poller->leader = slot;
    poller->away = false;
    poller_unlock(poller);
    int64_t result = poller_lead(poller, slot);
    poller_lock(poller);
    if (result == RESULT_WANTED)
        callers_promote(poller, slot);
    if (result == RESULT_WANTED || result == RESULT_QUEUED || result == SHMRPC_STOPPED)
        return RESULT_QUEUED;
    step_out(poller, slot);
    return result;
}

/* With the lock held: this worker is about to lead, and nobody stands by. Who relieved a standby that
 * went to run a request may find the role free, and take that instead. Wakes a thread that idles;
 * true if there is none, and all the others run requests, so that none will come by itself. */
static bool lacks_standby(struct shmrpc_poller *poller)
{
    if (poller->standby != NULL)
        return false;
    if (poller->idle != NULL) {
        wake_idle(poller);
        return false;
    }
    return poller->worker_threads > 1 && may_spawn(poller) &&
           poller->running + poller->blocked + 1 >= expected_threads(poller);
}

/* With the lock held: find something to run for this worker. */
static int64_t find_work(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    for (;;) {
        if (must_end(poller)) {
            if (poller->leader == slot)
                callers_inherit(poller, slot);
            return SHMRPC_STOPPED;
        }
        if (ways_stale(poller, slot)) {
            if (poller->leader == slot)
                step_out(poller, slot);
            return -ESTALE;
        }
        if (has_surplus(poller))
            wake_idle(poller); /* who sees the same, and ends */
        if ((!left_to_callers(poller) || poller->leader == slot) &&
            start_queued(poller, slot, poller->workers)) {
            if (poller->leader == slot)
                step_out(poller, slot);
            return slot->result;
        }
        if (must_end(poller))
            continue; /* it gave up the lock for moments */
        if (poller->leader == slot || poller->leader == NULL) {
            if (lacks_standby(poller)) {
                poller->leader = slot;
                step_out(poller, slot);
                return spawn(poller);
            }
            int64_t result = lead(poller, slot);
            if (result != RESULT_QUEUED)
                return result;
        } else if (poller->standby == NULL) {
            bool takes = stand_by(poller, slot);
            if (must_end(poller))
                continue;
            if (takes) {
                if (poller->leader != NULL)
                    note_long(poller->leader, TICK_NS);
                poller->leader = slot;
                poller->away = false;
            } else if (ways_stale(poller, slot)) {
                continue;
            }
            if (poller->idle == NULL && may_spawn(poller)) {
                if (takes)
                    step_out(poller, slot);
                return spawn(poller);
            }
            wake_idle(poller);
        } else if (has_surplus(poller)) {
            poller->worker_threads--;
            slot->has_thread = false;
            return SHMRPC_STOPPED;
        } else {
            idle(poller, slot);
        }
    }
}

/* ---- the public calls ---- */

/* A caller that is not told would wait for ever. */
static void answer_if_nobody_has(struct shmrpc_slot *slot)
{
    const shmrpc_message *message = &slot->message;

    if (!slot->running || slot->replied || slot->poller->closed ||
        load_acquire32((const atomic_u32 *)&message->cancelled) != 0)
        return;
    bool late = message->deadline_ns != 0 && clock_now_ns() >= message->deadline_ns;
    if (!late && load_relaxed(&slot->poller->draining) != 0)
        return; /* we stop, not the caller: it loses the connection, and may repeat the call */
    shmrpc_reply(slot, late ? STATUS_DEADLINE_EXCEEDED : STATUS_CANCELLED, NULL, 0);
}

void shmrpc_finish(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    answer_if_nobody_has(slot);
    poller_lock(poller);
    if (!poller->closed) {
        finish_request(poller, slot);
        find_runner_and_kick(poller);
    }
    poller_unlock(poller);
}

int64_t shmrpc_next(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    answer_if_nobody_has(slot);
    poller_lock(poller);
    if (!slot->has_thread) {
        slot->has_thread = true;
        poller->worker_threads++;
        poller->spawning -= poller->spawning != 0;
    }
    finish_request(poller, slot);
    slot->goal = GOAL_REQUEST;
    store_release32(&slot->state, SLOT_WAITING);
    int64_t result = find_work(poller, slot);
    poller_unlock(poller);
    return result;
}

shmrpc_slot *shmrpc_worker_new(shmrpc_poller *poller)
{
    return slot_new(poller, 0, true);
}

int64_t shmrpc_next_queued(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    /* The thread is there anyway, and what it waits for may depend on this request. */
    bool starts = !must_end(poller) && start_queued(poller, slot, UINT32_MAX);
    int64_t result = starts ? slot->result : 0;
    poller_unlock(poller);
    return result;
}

void shmrpc_disown(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    if (serves_around(poller, slot)) {
        poller->running++;
        poller->blocked--;
    }
    if (serving == slot)
        serving = slot->serves;
    slot->serves = NULL;
    poller_unlock(poller);
}

void shmrpc_adopt(shmrpc_slot *slot)
{
    serving = slot;
}

uint64_t shmrpc_inherited_deadline(void)
{
    return serving != NULL ? serving->message.deadline_ns : 0;
}

int shmrpc_reply_metadata(shmrpc_slot *slot, const char *metadata, size_t metadata_bytes)
{
    if (!slot->running || slot->replied)
        return 0; /* or it would go with the next one */
    uint8_t *copy = malloc(metadata_bytes + 1);
    if (copy == NULL)
        return -ENOMEM;
    memcpy(copy, metadata, metadata_bytes);
    free(slot->reply_metadata);
    slot->reply_metadata = copy;
    slot->reply_metadata_bytes = (uint32_t)metadata_bytes;
    return 0;
}

int shmrpc_reply(shmrpc_slot *slot, uint32_t status, const char *body, size_t body_bytes)
{
    struct outgoing message = {
        .header = {.kind = SHMRPC_REPLY,
                   .method_bytes = (uint16_t)status,
                   .call_id = slot->call_id,
                   .metadata_bytes = slot->reply_metadata_bytes},
        .parts = {{slot->reply_metadata, slot->reply_metadata_bytes},
                  {(void *)(uintptr_t)body, body_bytes}},
    };
    atomic_u64 position;

    if (!slot->running || slot->replied || status != STATUS_OK)
        shmrpc_detach(slot);
    if (!slot->running || slot->replied)
        return 0;
    int result = slot_send(slot, &message, 1, &position);
    if (result == -EMSGSIZE && status != STATUS_OK && slot->reply_metadata_bytes != 0) {
        drop_reply_metadata(slot);
        return shmrpc_reply(slot, status, body, body_bytes);
    }
    slot->replied = result != -EMSGSIZE && result != -ENOMEM;
    return result < 0 ? result : 0;
}

int64_t shmrpc_reply_next(shmrpc_slot *slot, const char *body, size_t body_bytes)
{
    int status = shmrpc_reply(slot, STATUS_OK, body, body_bytes);

    if (status == -EMSGSIZE || status == -ENOMEM)
        return status;
    return shmrpc_next(slot);
}
