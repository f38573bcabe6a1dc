/* lead.c - leading: reading for all threads of the poller.
 *
 * The leader's loop:
 *
 *   poll every hot conn ---- found what its slot waits for ------------------> return
 *     |  nothing new
 *   spin (pauses, then yields) within the budget, poll again; look at epoll every LOOK_NS
 *     |  budget used up
 *   arm every hot conn, fence F, look once more; epoll_wait; the conns that rang are hot again
 *
 * Hot conns are disarmed and polled in user space; cold ones are armed and cost nothing until
 * they ring. It is the way network drivers switch between polling and interrupts (NAPI).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "poller.h"

enum {
    CLOCK_STEPS = 16,     /* short spin steps between two looks at all else */
    ROUNDS_A_LOOK = 16,   /* rounds with progress between two looks at the clock */
    SIGNALS_NS = 50000000, /* a main thread goes to Python this often: a signal between its last
                            * look there and the system call would not end the sleep */
    LOOK_NS = 250000,      /* while polling, cold conns and hang-ups are looked for this often */
    COOL_NS = 1000000,    /* a conn quiet for so long is armed while others stay hot */
    EXPECTED_NS = 150000, /* what two event loops need for a call with blocks beside it, apart from
                           * their bytes: longer than a spin may hold up a loop, which looks after
                           * others in between. Without, both slept at every turn: 190 us for 17 KB
                           * where 15 KB, which are in the ring, took 14 */
    LONG_SLEEPS = 4,      /* budgets: in so long a sleep no spin would have found anything */
    LOCKED_MS = 1,        /* longest sleep with the program's lock held; epoll counts in these */
    EPOLL_BATCH = 64,
    POLL_BATCH = 64,      /* messages taken from one conn before the next has its turn */
};

/* ---- hot and cold ---- */

/* Leader: the list that reserve_hot has made has room for every conn there is. */
static void take_larger_list(struct shmrpc_poller *poller)
{
    struct hot_list *list = exchange_pointer(&poller->larger_hot, NULL);

    for (uint32_t i = 0; i < poller->hot_count; i++)
        list->conns[i] = poller->hot->conns[i];
    free(poller->hot);
    poller->hot = list;
}

void poller_heat(struct shmrpc_poller *poller, struct conn *conn)
{
    if (conn->hot)
        return;
    if (poller->hot == NULL || poller->hot_count == poller->hot->capacity)
        take_larger_list(poller);
    if (conn->is_shm) {
        wake_disarm(&conn->wake);
        poller->hot_rings++;
    }
    conn->hot = true;
    conn->last_active_ns = poller->looked_ns;
    poller->hot->conns[poller->hot_count++] = conn;
}

static void remove_hot(struct shmrpc_poller *poller, uint32_t position)
{
    struct conn *conn = poller->hot->conns[position];

    conn->hot = false;
    if (conn->is_shm)
        poller->hot_rings--;
    poller->hot->conns[position] = poller->hot->conns[--poller->hot_count];
}

/* Whether there is something that we would read, or an end to notice. */
static bool has_input(struct shmrpc_poller *poller, struct conn *conn)
{
    struct frame_header header;

    if (conn->hung_up)
        return true;
    if (workers_full(poller, conn))
        return false;
    return (conn->is_shm ? ring_peek(&conn->consumer, &header)
                         : stream_peek(&conn->stream, &header)) != 0;
}

static int flush(struct shmrpc_poller *poller, struct conn *conn)
{
    if (load_relaxed(&conn->outbox_bytes) == 0)
        return 0;
    int status = conn_flush(conn, &poller->bells);
    if (status == 0 && load_relaxed(&conn->outbox_bytes) == 0) {
        callers_room(poller, conn);
        if (load_relaxed(&conn->queued) != 0)
            workers_resume(poller);
    }
    return status;
}

/* The last look after arming (fence F): for input, and for room that was freed before we were armed
 * and therefore rang nobody. */
static bool must_stay_up(struct shmrpc_poller *poller, struct conn *conn)
{
    if (flush(poller, conn) < 0)
        conn->hung_up = true;
    return has_input(poller, conn);
}

/* End a conn: nobody waits for it any more, and Python is told. */
static void fail_conn(struct shmrpc_poller *poller, struct conn *conn, int error)
{
    for (uint32_t i = 0; i < poller->hot_count; i++)
        if (poller->hot->conns[i] == conn)
            remove_hot(poller, i);
    epoll_ctl(poller->epoll_fd, EPOLL_CTL_DEL, conn->control_fd, NULL);
    if (conn->own_bell_fd >= 0 && conn->own_bell_fd != poller->kick_fd)
        epoll_ctl(poller->epoll_fd, EPOLL_CTL_DEL, conn->own_bell_fd, NULL);

    poller_lock(poller);
    if (error != EPIPE)
        store_relaxed(&conn->ended_here, 1);
    store_release(&conn->error, (uint64_t)error);
    /* After the error: a peer that sees the end may rely on it that nothing queued starts. */
    shutdown(conn->control_fd, SHUT_RDWR);
    callers_lost(poller, conn, error);
    const shmrpc_message closed = {.kind = SHMRPC_CLOSED, .status = (uint32_t)error};
    events_add(poller, conn, &closed, NULL);
    if (poller->client) { /* it keeps its conn, to tell what became of its calls */
        workers_retire(poller);
    } else {
        poller_unregister(poller, conn);
    }
    poller_unlock(poller);
    forwards_unwanted(poller, conn, 0);
    if (poller->client)
        return;
    poller_lock(poller);
    conn_release(conn);
    poller_unlock(poller);
}

/* ---- polling ---- */

static int dispatch(struct shmrpc_poller *poller, struct shmrpc_slot *slot, struct conn *conn,
                    const struct frame_header *header)
{
    switch (header->kind) {
    case SHMRPC_REPLY:
        return callers_reply(poller, slot, conn, header);
    case SHMRPC_REQUEST:
    case SHMRPC_NOTIFY:
        workers_request(poller, slot, conn, header);
        return 0;
    case SHMRPC_PING:
        conn_finish(conn, header->length, &poller->bells);
        workers_answer(poller, conn, header->call_id, STATUS_OK);
        return 0;
    case SHMRPC_CANCEL:
        conn_finish(conn, header->length, &poller->bells);
        workers_cancel(poller, conn, header->call_id);
        return 0;
    case SHMRPC_ITEM:
    case SHMRPC_END:
    case SHMRPC_CREDIT:
    case SHMRPC_INITIAL:
        return events_stream(poller, conn, header);
    case SHMRPC_RETURN:
    case SHMRPC_WITHDRAW:
        return blocks_frame(poller, conn, header);
    case SHMRPC_SERVES:
        conn_finish(conn, header->length, &poller->bells);
        store_relaxed(&conn->serves, 1);
        return 0;
    case SHMRPC_GOODBYE:
        conn_finish(conn, header->length, &poller->bells);
        store_relaxed(&conn->said_goodbye, 1);
        return -EPIPE;
    default: /* of a later version: not ours to understand, nobody else's problem */
        conn_finish(conn, header->length, &poller->bells);
        count_own(&poller->counters.frames_dropped, 1);
        return 0;
    }
}

/* What the slot waits for is there, or something to do for its thread: 1 and *result. Changes
 * nothing: it is also asked before a sleep, and once more after it was given up. */
static int finished(struct shmrpc_poller *poller, struct shmrpc_slot *slot, int64_t *result)
{
    if (load_relaxed(&poller->stopping) != 0) {
        *result = SHMRPC_STOPPED;
        return 1;
    }
    if (load_acquire32(&slot->state) == SLOT_DONE) {
        *result = slot->result;
        return 1;
    }
    if (slot->goal != GOAL_REQUEST) {
        /* A stream that never runs dry must not keep requests waiting, nor they the stream. */
        bool queued = poller->client && load_relaxed(&poller->startable) != 0;
        if (queued && (!poller->served_last || load_relaxed(&poller->event_count) == 0)) {
            *result = SHMRPC_QUEUED;
            return 1;
        }
        if (load_relaxed(&poller->spawn_wanted) != 0) {
            *result = SHMRPC_SPAWN;
            return 1;
        }
    }
    if (load_relaxed(&poller->event_count) != 0) {
        *result = SHMRPC_EVENTS;
        return 1;
    }
    if (slot->goal == GOAL_REQUEST) {
        *result = load_relaxed(&poller->role_wanted) != 0 ? RESULT_WANTED
                  : load_relaxed(&poller->startable) != 0 ? RESULT_QUEUED
                                                          : 0;
        return *result != 0;
    }
    if (slot->goal == GOAL_ROOM && load_relaxed(&slot->conn->outbox_bytes) == 0) {
        *result = 0;
        return 1;
    }
    return 0;
}

static bool events_full(const struct shmrpc_poller *poller)
{
    return load_relaxed(&poller->event_count) >= EVENTS_MAX;
}

/* Take what a conn has, at most a batch. Returns how many messages, and stops at a request for
 * the slot. A negative number: the conn has ended. */
static int poll_conn(struct shmrpc_poller *poller, struct shmrpc_slot *slot, struct conn *conn)
{
    struct frame_header header;
    int count = 0;
    int status = 0;

    while (count < POLL_BATCH && !workers_full(poller, conn) && !events_full(poller)) {
        status = conn_receive(conn, &header, &poller->bells);
        if (status <= 0)
            break;
        count++;
        if ((header.flags & SHMRPC_FLAG_BLOCKS) != 0)
            count_add(&poller->beside, conn->received.block_bytes);
        status = dispatch(poller, slot, conn, &header);
        if (status < 0)
            break;
        if (slot->goal == GOAL_REQUEST && load_acquire32(&slot->state) == SLOT_DONE)
            break;
    }
    if (status >= 0)
        status = flush(poller, conn);
    if (status == 0 && conn->hung_up && count == 0 && !events_full(poller))
        status = conn->control_error != 0 ? conn->control_error : -EPIPE;
    if (status < 0) {
        fail_conn(poller, conn, -status);
        return -1;
    }
    count_own(&poller->counters.frames_received, (uint64_t)count);
    return count;
}

/* One round over the hot conns, each next round starting with the next conn. Returns whether
 * anything happened. */
static bool poll_hot(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    bool progress = false;

    for (uint32_t i = 0; i < poller->hot_count; i++) {
        uint32_t position = (poller->cursor + i) % poller->hot_count;
        struct conn *conn = poller->hot->conns[position];
        if (conn->is_shm && !conn->hung_up && ring_empty(&conn->consumer) &&
            load_relaxed(&conn->outbox_bytes) == 0)
            continue; /* most of many, most of the time */
        int count = poll_conn(poller, slot, conn);

        if (count < 0)
            return true;
        if (count == 0)
            continue;
        progress = true;
        conn->last_active_ns = poller->looked_ns;
        bool done = slot->goal == GOAL_REQUEST && load_acquire32(&slot->state) == SLOT_DONE;
        if (done || events_full(poller)) {
            poller->cursor = position + 1;
            break;
        }
    }
    return progress;
}

/* Drop stream sockets with nothing left to read, and rings quiet for COOL_NS. */
static void cool(struct shmrpc_poller *poller, bool rings)
{
    for (uint32_t i = poller->hot_count; i-- > 0;) {
        struct conn *conn = poller->hot->conns[i];
        if (!conn->is_shm) {
            if (!has_input(poller, conn)) {
                conn_watch_input(conn, !workers_full(poller, conn));
                remove_hot(poller, i);
            }
        } else if (rings && poller->policy.mode != WAIT_SPIN &&
                   poller->looked_ns - conn->last_active_ns > COOL_NS) {
            wake_arm(&conn->wake);
            wake_arm_fence();
            if (must_stay_up(poller, conn))
                wake_disarm(&conn->wake);
            else
                remove_hot(poller, i);
        }
    }
}

/* ---- epoll ---- */

static void control_event(struct conn *conn)
{
    if (conn->is_shm)
        conn_read_control(conn);
    else
        conn->stream.readable = true;
}

/* With the lock held: poll those again that were full of queued requests. */
static void resume(struct shmrpc_poller *poller)
{
    if (!poller->resumes)
        return;
    poller->resumes = false;
    for (uint32_t i = 0; i < poller->conn_capacity; i++) {
        struct conn *conn = poller->conns[i];
        if (conn == NULL || !conn->resumed)
            continue;
        conn->resumed = false;
        if (load_relaxed(&conn->error) != 0)
            continue; /* a client keeps it, and it is over all the same */
        conn->stream.readable = true;
        poller_heat(poller, conn);
    }
}

/* Wait for bells and control sockets: the number of events, or -errno. */
static int look(struct shmrpc_poller *poller, int timeout_ms)
{
    struct epoll_event events[EPOLL_BATCH];
    int count = epoll_wait(poller->epoll_fd, events, EPOLL_BATCH, timeout_ms);

    if (count < 0)
        return -errno;
    if (count == 0)
        return 0;
    poller_lock(poller);
    resume(poller);
    for (int i = 0; i < count; i++) {
        uint64_t data = events[i].data.u64;
        struct conn *conn = data != 0 ? poller_find(poller, data & ~EPOLL_CONTROL) : NULL;
        if (conn == NULL || load_relaxed(&conn->error) != 0)
            continue;
        if ((data & EPOLL_CONTROL) != 0)
            control_event(conn);
        poller_heat(poller, conn);
    }
    poller_unlock(poller);
    return count;
}

int timeout_ms_until(uint64_t deadline_ns)
{
    if (deadline_ns == 0)
        return -1;
    uint64_t now = clock_now_ns();
    if (deadline_ns <= now)
        return 0;
    uint64_t milliseconds = (deadline_ns - now + 999999) / 1000000;
    return milliseconds < 1000000 ? (int)milliseconds : 1000000;
}

/* Arm what is hot, make sure that nothing came in meanwhile, and let it go cold. */
static bool arm_all(struct shmrpc_poller *poller)
{
    bool input = false;

    for (uint32_t i = 0; i < poller->hot_count; i++)
        if (poller->hot->conns[i]->is_shm)
            wake_arm(&poller->hot->conns[i]->wake);
    wake_arm_fence();
    for (uint32_t i = 0; i < poller->hot_count && !input; i++)
        input = must_stay_up(poller, poller->hot->conns[i]);
    if (input) {
        for (uint32_t i = 0; i < poller->hot_count; i++)
            if (poller->hot->conns[i]->is_shm)
                wake_disarm(&poller->hot->conns[i]->wake);
        return false;
    }
    while (poller->hot_count != 0)
        remove_hot(poller, poller->hot_count - 1);
    return true;
}

bool poller_in_main_thread(void)
{
    static _Thread_local uint64_t asked; /* 0: never. Who forks is the main thread of the child */
    static _Thread_local bool is_main;

    if (asked != forks_seen() + 1) {
        asked = forks_seen() + 1;
        is_main = syscall(SYS_gettid) == getpid();
    }
    return is_main;
}

bool poller_must_check_signals(struct shmrpc_slot *slot)
{
    if (!poller_in_main_thread())
        return false;
    bool checked = slot->may_sleep;
    slot->may_sleep = false;
    return !checked;
}

/* A caller on its only socket needs no epoll: blocking in recv itself is answered some ten
 * microseconds sooner (measured: 37 against 65 us a round trip). Not where other conns or kicks
 * have to be heard, because requests are served; not with a deadline, and not with output waiting;
 * output that comes to wait later is its sender's to push, see callers.c. */
static bool may_receive(struct shmrpc_poller *poller, const struct shmrpc_slot *slot)
{
    if (slot->goal != GOAL_REPLY || !slot->alone || slot->conn->is_shm ||
        slot->deadline_ns != 0 || has_input(poller, slot->conn))
        return false;
    store_relaxed(&poller->receiving, 1);
    full_fence(); /* receiving before outbox_bytes, see poller_send */
    if (load_relaxed(&slot->conn->outbox_bytes) == 0)
        return true;
    store_relaxed(&poller->receiving, 0);
    return false;
}

static int64_t receive_once(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    lock_release();
    int status = stream_wait(&slot->conn->stream);

    store_relaxed(&poller->receiving, 0);
    count_own(&poller->counters.sleeps, 1);
    if (status == -EPIPE)
        slot->conn->hung_up = true;
    poller_heat(poller, slot->conn);
    return status == -EINTR && poller_in_main_thread() ? -EINTR : 0;
}

/* Sleep for a moment with the program's lock held: who lets go of it here is back in milliseconds
 * only, while a peer that is awake or to be woken answers in less than 0.1 ms. As look. */
static int doze_locked(struct shmrpc_poller *poller)
{
    if (spin_policy_begin(&poller->locked_policy) == 0) {
        spin_policy_slept(&poller->locked_policy, false, UINT64_MAX);
        return 0;
    }
    int count = look(poller, LOCKED_MS);
    if (count == 0)
        spin_policy_slept(&poller->locked_policy, true, UINT64_MAX);
    else
        spin_policy_hit(&poller->locked_policy, false, 0);
    return count;
}

/* Sleep until something rings: 0 to poll again, or the errno to return. `spun_from_ns` is when the
 * spin before began, 0 if there was none. */
static int64_t sleep_once(struct shmrpc_poller *poller, struct shmrpc_slot *slot,
                          uint64_t spun_from_ns)
{
    bool spun = spun_from_ns != 0;
    int64_t result;

    if (poller_must_check_signals(slot))
        return -EAGAIN;
    if (may_receive(poller, slot))
        return receive_once(poller, slot);
    if (!arm_all(poller) || finished(poller, slot, &result))
        return 0;
    uint64_t start = clock_now_ns();
    workers_sleep(poller, start);
    int timeout_ms = timeout_ms_until(slot->deadline_ns);
    bool shortened = poller_in_main_thread() && (timeout_ms < 0 || timeout_ms > SIGNALS_NS / 1000000);
    if (shortened)
        timeout_ms = SIGNALS_NS / 1000000;
    int count = 0;
    if (slot->goal == GOAL_REPLY && timeout_ms != 0 && lock_held())
        count = doze_locked(poller);
    if (count == 0) {
        lock_release();
        count = look(poller, timeout_ms);
    }
    poller->looked_ns = clock_now_ns();
    count_own(&poller->counters.sleeps, 1);
    /* A reply that came soon after the spin was worth it: its sender had to be woken, and both sides
     * would else sleep at every turn. A request that came after the spin was not: nobody knows when
     * the next one comes, and at a steady rate they all come so late. */
    uint64_t began_ns = spun && slot->goal == GOAL_REQUEST ? spun_from_ns : start;
    spin_policy_slept(&poller->policy, spun, poller->looked_ns - began_ns);
    if (count < 0 && count != -EINTR)
        return count;
    if (count == 0 && shortened)
        return -EAGAIN;
    return count == -EINTR && poller_in_main_thread() ? -EINTR : 0;
}

/* While there is always something to do, nobody sleeps and nobody would look at epoll: for cold
 * conns, hang-ups, kicks. Look at the clock in every ROUNDS_A_LOOK rounds, or when the coarse clock
 * has moved because the rounds are long. Returns the time if it looked at that, else 0. */
static uint64_t keep_looking(struct shmrpc_poller *poller)
{
    uint64_t coarse = clock_coarse_ns();

    if (++poller->rounds % ROUNDS_A_LOOK != 0 && coarse == poller->coarse_ns)
        return 0;
    poller->coarse_ns = coarse;
    uint64_t now = clock_now_ns();
    if (now - poller->looked_ns >= LOOK_NS) {
        look(poller, 0);
        poller->looked_ns = now;
        cool(poller, true);
    }
    return now;
}

/* ---- leading ---- */

struct lead {
    uint64_t entered_ns; /* the first time that the clock was read */
    uint64_t spin_start_ns, spin_budget_ns;
    uint32_t spin_step, patience, handovers;
    uint64_t beside_ns; /* longer than the budget, for blocks under way */
    uint64_t yielded_ns; /* when the last yield returned */
    bool spinning;
    bool looked; /* at epoll, since the deadline */
};

/* Whether there is nothing in any hot ring that we would take. */
static bool rings_empty(const struct shmrpc_poller *poller)
{
    for (uint32_t i = 0; i < poller->hot_count; i++) {
        const struct conn *conn = poller->hot->conns[i];
        if (conn->is_shm && !ring_empty(&conn->consumer) && !workers_full(poller, conn))
            return false;
    }
    return true;
}

/* Some steps of spinning; false when it is time to sleep. *now is the time, if it was read. */
static bool spin_on(struct shmrpc_poller *poller, const struct shmrpc_slot *slot,
                    struct lead *lead, uint64_t *now)
{
    if (!lead->spinning) {
        lead->spinning = true;
        lead->spin_step = lead->handovers = 0;
        lead->patience = spin_policy_patience(&poller->policy);
        lead->spin_start_ns = *now = clock_now_ns();
        /* Who has just looked for signals sleeps at once, lest it miss one that comes meanwhile. */
        bool may_spin = !slot->may_sleep || poller->policy.mode == WAIT_SPIN;
        bool spins = poller->hot_rings != 0 && may_spin;
        lead->spin_budget_ns = spins ? spin_policy_begin(&poller->policy) : 0;
        if (load_relaxed(&poller->beside) != 0)
            lead->beside_ns = spin_beside_ns(exchange(&poller->beside, 0));
        if (lead->spin_budget_ns != 0 && poller->policy.mode == WAIT_AUTO)
            lead->spin_budget_ns += lead->beside_ns;
    }
    if (lead->spin_budget_ns == 0)
        return false;
    bool yielded = false;
    for (uint32_t i = 0; i < CLOCK_STEPS && !yielded; i++) {
        yielded = spin_step(lead->spin_step++, lead->patience) != 0;
        if (!rings_empty(poller))
            return true;
    }
    count_own(&poller->counters.yields, yielded);
    *now = clock_now_ns();
    if (yielded && lead->yielded_ns != 0 && *now - lead->yielded_ns > HANDOVER_NS)
        lead->handovers++;
    lead->yielded_ns = *now;
    if (*now - poller->looked_ns >= LOOK_NS) {
        look(poller, 0);
        poller->looked_ns = *now;
        cool(poller, true);
    }
    if (*now - lead->spin_start_ns > SPIN_BUDGET_NS)
        lock_release(); /* who spins for ever is no better than who sleeps, to the other threads */
    /* Who has the CPU for long may be the peer, which reads and copies what is beside. */
    bool crowded = lead->handovers >= HANDOVERS_MAX && lead->beside_ns == 0 &&
                   poller->policy.mode != WAIT_SPIN;
    if (!crowded && *now - lead->spin_start_ns < lead->spin_budget_ns)
        return true;
    count_own(&poller->counters.spins_missed, 1);
    return false;
}

/* What the time says about going on: 0, -ETIMEDOUT, or -EAGAIN for a main thread that has not been
 * to Python for long. The last look before a deadline counts: it also serves who does not wait. */
static int64_t check_time(struct shmrpc_poller *poller, const struct shmrpc_slot *slot,
                          struct lead *lead, uint64_t now)
{
    if (lead->entered_ns == 0)
        lead->entered_ns = now;
    if (slot->deadline_ns != 0 && now >= slot->deadline_ns) {
        if (lead->looked)
            return -ETIMEDOUT;
        look(poller, 0);
        lead->looked = true;
    }
    return poller_in_main_thread() && now - lead->entered_ns > SIGNALS_NS ? -EAGAIN : 0;
}

int64_t poller_lead(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    struct lead lead = {0};
    int64_t result = 0;

    poller->caller_leads = slot->goal != GOAL_REQUEST;
    if (slot->accompanied)
        lock_release(); /* they can't go on without that lock when their replies are there */
    if (!slot->alone)
        keep_looking(poller); /* what it waits for may be there already, each time */
    do {
        bool progress = poll_hot(poller, slot);
        if (finished(poller, slot, &result))
            break;
        uint64_t now = 0;
        if (progress) {
            lead.spinning = false;
            now = keep_looking(poller);
        } else if (!spin_on(poller, slot, &lead, &now)) {
            result = check_time(poller, slot, &lead, clock_now_ns());
            if (result != 0 || lead.looked)
                continue;
            cool(poller, false);
            result = sleep_once(poller, slot, lead.spin_budget_ns != 0 ? lead.spin_start_ns : 0);
            lead.spinning = false;
            continue;
        }
        if (now != 0)
            result = check_time(poller, slot, &lead, now);
    } while (result == 0);
    if (result == SHMRPC_SPAWN)
        store_relaxed(&poller->spawn_wanted, 0);
    poller->served_last = result == SHMRPC_QUEUED;
    if (lead.spinning && lead.spin_step != 0 && result >= 0) {
        spin_policy_hit(&poller->policy, lead.spin_step > lead.patience,
                        clock_now_ns() - lead.spin_start_ns);
        count_own(&poller->counters.spins_hit, 1);
    }
    count_add(&poller->counters.wakeups_sent, poller->bells);
    poller->bells = 0;
    return result;
}

/* ---- for event loops ---- */

/* Where bytes travel, what comes without our having sent anything says nothing about answers: the
 * rest of a message follows at once, and the next message, perhaps, in a millisecond. */
static struct spin_policy *loop_policy(struct shmrpc_poller *poller)
{
    return poller->batch.has_items && !poller->sent ? &poller->more : &poller->policy;
}

static void note_rest(struct shmrpc_poller *poller)
{
    poller->rests = poller->expected_ns == 0 && spin_policy_rests(loop_policy(poller));
}

/* Where bytes travel a loop that is busy does not spin, and has to learn from its sleeps: from one
 * that was longer than a spin and what it takes to wake both sides. */
static void note_sleep(struct shmrpc_poller *poller, struct spin_policy *policy, uint64_t slept_ns)
{
    bool in_vain = poller->batch.has_items && slept_ns > LONG_SLEEPS * (uint64_t)policy->budget_ns;

    spin_policy_slept(policy, poller->spun || in_vain, slept_ns);
}

/* Spin until a ring has something, for so long: whether one has. */
static bool spin_for(struct shmrpc_poller *poller, struct spin_policy *policy, uint32_t budget_ns)
{
    uint32_t patience = spin_policy_patience(policy);
    uint64_t start = clock_now_ns();
    uint64_t now = start;
    uint32_t step = 0;

    while (now - start < budget_ns) {
        for (uint32_t i = 0; i < CLOCK_STEPS; i++) {
            uint32_t yielded = (uint32_t)spin_step(step++, patience);
            count_own(&poller->counters.yields, yielded);
            if (!rings_empty(poller)) {
                spin_policy_hit(policy, step > patience, clock_now_ns() - start);
                count_own(&poller->counters.spins_hit, 1);
                return true;
            }
            if (yielded != 0)
                break;
        }
        now = clock_now_ns();
    }
    count_own(&poller->counters.spins_missed, 1);
    return false;
}

/* Whether large values went to a peer, or came from it, so lately that its answer may be on the way. */
static bool expects_answer(struct shmrpc_poller *poller)
{
    if (poller->expected_ns != 0 && clock_now_ns() >= poller->expected_ns)
        poller->expected_ns = 0;
    return poller->expected_ns != 0;
}

int64_t poller_poll(struct shmrpc_poller *poller, struct shmrpc_slot *slot, uint32_t spin_ns)
{
    struct spin_policy *policy = loop_policy(poller);
    int64_t result;

    if (poller->hot_rings == 0) { /* woken through epoll, or sockets, which nobody else looks at */
        look(poller, 0);
        poller->looked_ns = clock_now_ns();
        if (poller->armed_ns != 0)
            note_sleep(poller, policy, poller->looked_ns - poller->armed_ns);
        poller->armed_ns = 0;
        poller->spun = false;
    } else {
        keep_looking(poller);
    }
    if (poll_hot(poller, slot))
        poller->sent = false;
    result = poller->hot_count != 0 ? -EAGAIN : 0;
    if (poller->batch.count == 0 && !finished(poller, slot, &result) && spin_ns != 0 &&
        poller->hot_rings != 0) {
        bool expects = expects_answer(poller);
        uint32_t budget = expects ? policy->budget_ns : (uint32_t)spin_policy_begin(policy);
        if (budget != 0 && policy->mode == WAIT_AUTO && load_relaxed(&poller->beside) != 0) {
            uint64_t beside_ns = spin_beside_ns(exchange(&poller->beside, 0));
            poller->expected_ns = clock_now_ns() + EXPECTED_NS + beside_ns;
            expects = true;
        }
        poller->asked = true;
        bool found = budget != 0 && spin_for(poller, policy, budget < spin_ns ? budget : spin_ns);
        poller->spun = budget != 0;
        result = expects ? -EAGAIN : 0;
        if (found) {
            poller->expected_ns = 0;
            result = 0;
            poll_hot(poller, slot);
            poller->sent = false;
            finished(poller, slot, &result);
        }
    }
    count_add(&poller->counters.wakeups_sent, poller->bells);
    poller->bells = 0;
    note_rest(poller);
    return result;
}

bool poller_arm(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    int64_t result;

    cool(poller, false);
    if (!arm_all(poller) || finished(poller, slot, &result))
        return false;
    poller->armed_ns = clock_now_ns();
    if (!poller->asked)
        spin_policy_rested(loop_policy(poller));
    poller->asked = false;
    note_rest(poller);
    count_own(&poller->counters.sleeps, 1);
    return true;
}

void poller_sent(struct shmrpc_poller *poller, struct conn *conn)
{
    if (!poller->sent && poller->armed_ns != 0) { /* the sleep that has begun waits for an answer */
        spin_policy_rested(&poller->policy);
        poller->armed_ns = clock_now_ns();
        poller->spun = false;
    }
    poller->sent = true;
    note_rest(poller);
    if (!poller->rests && poller_expect(poller, conn))
        poller->armed_ns = 0;
}
