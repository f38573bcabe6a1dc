/* callers.c - threads that wait for replies, sharing one poller without a reader thread.
 *
 *   thread                          state of its slot
 *
 *   register, send the request      WAITING
 *   nobody leads?  lead: read for all until the own reply is in, hand the role on
 *   somebody does? follow: sleep    SLEEPING -> DONE by the leader that read the reply
 *                                            -> PROMOTED by a leader that leaves
 *
 * Rule 1: who gives up the role gives it, under the lock, to a slot whose thread is inside; so
 *         there is never a waiting thread and nobody that reads.
 * Rule 2: a slot that returns to Python (-EAGAIN, -EINTR, SHMRPC_EVENTS) stays registered but
 *         neither leads nor can be promoted until shmrpc_wait.
 */
#define _GNU_SOURCE
#include "poller.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- slots ---- */

struct shmrpc_slot *slot_new(struct shmrpc_poller *poller, uint64_t conn_id, bool worker)
{
    struct shmrpc_slot *slot = calloc(1, sizeof *slot);

    if (slot == NULL)
        return NULL;
    slot->poller = poller;
    slot->worker = worker;
    slot->base = malloc(SLOT_HEAD_BYTES + STREAM_FRAME_MAX);
    poller_lock(poller);
    slot->conn = conn_id != 0 ? poller_find(poller, conn_id) : NULL;
    uint32_t index = 0;
    while (index < poller->slot_capacity && poller->slots[index] != NULL)
        index++;
    if (index == poller->slot_capacity && index < SHMRPC_PYTHON_INDEX) {
        uint32_t capacity = index == 0 ? 8 : index * 2;
        struct shmrpc_slot **slots = realloc(poller->slots, capacity * sizeof *slots);
        if (slots != NULL) {
            memset(slots + index, 0, (capacity - index) * sizeof *slots);
            poller->slots = slots;
            poller->slot_capacity = capacity;
        }
    }
    bool usable = slot->base != NULL && index < poller->slot_capacity &&
                  index < SHMRPC_PYTHON_INDEX && (conn_id == 0) == (slot->conn == NULL);
    if (usable) {
        slot->index = index;
        poller->slots[index] = slot;
        poller->references++;
        if (slot->conn != NULL)
            slot->conn->references++;
    }
    poller_unlock(poller);
    if (usable)
        return slot;
    free(slot->base);
    free(slot);
    return NULL;
}

shmrpc_slot *shmrpc_slot_new(shmrpc_poller *poller, uint64_t conn_id)
{
    return slot_new(poller, conn_id, false);
}

void slot_drop_blocks(struct shmrpc_slot *slot)
{
    if (slot->message.blocks == NULL)
        return;
    blocks_free(slot->message.blocks, slot->message.block_count);
    slot->message.blocks = NULL;
    slot->message.block_count = 0;
}

void shmrpc_slot_free(shmrpc_slot *slot)
{
    if (poller_inherited(slot->poller))
        return;
    shmrpc_abandon(slot); /* an interrupted call may still be registered */
    if (slot->worker)
        shmrpc_finish(slot);
    ways_forget(slot);
    blocks_forget(slot);
    poller_lock(slot->poller);
    slot->poller->slots[slot->index] = NULL;
    if (slot->worker)
        workers_forget(slot->poller, slot);
    else if (slot->conn != NULL)
        conn_release(slot->conn);
    poller_end_if_unused(slot->poller);
    poller_unlock(slot->poller);
    poller_unref(slot->poller);
    slot_drop_blocks(slot);
    free(slot->reply_metadata);
    free(slot->ends);
    free(slot->large);
    free(slot->base);
    free(slot);
}

shmrpc_message *shmrpc_slot_message(shmrpc_slot *slot)
{
    return &slot->message;
}

uint8_t *shmrpc_slot_view(shmrpc_slot *slot)
{
    return slot->base + SLOT_HEAD_BYTES;
}

uint64_t shmrpc_slot_view_bytes(shmrpc_slot *slot)
{
    (void)slot;
    return STREAM_FRAME_MAX;
}

bool slot_in_view(const struct shmrpc_slot *slot)
{
    return slot->message.body == slot->base + SLOT_HEAD_BYTES;
}

/* ---- receiving into a slot ---- */

uint64_t deadline_after(int64_t timeout_ns)
{
    if (timeout_ns < 0)
        return 0;
    uint64_t deadline = clock_now_ns() + (uint64_t)timeout_ns;
    return deadline != 0 ? deadline : 1;
}

void message_from_header(shmrpc_message *message, struct conn *conn,
                         const struct frame_header *header)
{
    bool named = header->kind == SHMRPC_REQUEST || header->kind == SHMRPC_NOTIFY;
    uint64_t deadline = header->deadline_ns;

    if (deadline != 0 && conn->relative_deadlines)
        deadline = deadline_after(deadline < INT64_MAX / 2 ? (int64_t)deadline : INT64_MAX / 2);
    *message = (shmrpc_message){
        .call_id = header->call_id,
        .conn_id = conn->id,
        .deadline_ns = deadline,
        .body_bytes = header->total_bytes - header->metadata_bytes -
                      (named ? header->method_bytes : 0u),
        .kind = header->kind,
        .flags = header->flags,
        .status = named ? 0 : header->method_bytes,
        .method_bytes = named ? header->method_bytes : 0,
        .metadata_bytes = header->metadata_bytes,
        .method = -1,
    };
    if ((header->flags & SHMRPC_FLAG_BLOCKS) != 0)
        conn_take_blocks(conn, message);
}

static void set_payload(shmrpc_message *message, const uint8_t *payload)
{
    message->head = payload;
    message->body = payload == NULL ? NULL
                                    : payload + message->method_bytes + message->metadata_bytes +
                                          message->table_bytes;
    const uint8_t *beside = payload == NULL ? NULL : message->body + message->body_bytes;
    for (uint32_t i = 0; i < message->block_count; i++) {
        if (message->blocks[i].lease != NULL)
            continue;
        message->blocks[i].data = beside;
        beside += message->blocks[i].bytes;
    }
}

int slot_receive(struct shmrpc_slot *slot, struct conn *conn, const struct frame_header *header)
{
    slot_drop_blocks(slot);
    message_from_header(&slot->message, conn, header);
    free(slot->large);
    slot->large = NULL;
    uint64_t head_bytes = (uint64_t)slot->message.method_bytes + slot->message.metadata_bytes +
                          slot->message.table_bytes;

    if (head_bytes <= SLOT_HEAD_BYTES && header->total_bytes - head_bytes <= STREAM_FRAME_MAX) {
        uint8_t *payload = slot->base + SLOT_HEAD_BYTES - head_bytes;
        conn_read(conn, header->total_bytes, payload);
        set_payload(&slot->message, payload);
        return 0;
    }
    slot->large = conn_take_payload(conn);
    if (slot->large == NULL) {
        slot->large = malloc(header->total_bytes);
        if (slot->large == NULL)
            return -ENOMEM;
        conn_read(conn, header->total_bytes, slot->large);
    }
    set_payload(&slot->message, slot->large);
    return 0;
}

void slot_take(struct shmrpc_slot *slot, struct stored *stored)
{
    slot_drop_blocks(slot);
    free(slot->large);
    free(slot->ends);
    slot->large = stored->payload;
    slot->ends = stored->ends;
    stored->payload = NULL;
    stored->ends = NULL;
    slot->message = stored->message;
    stored->message.blocks = NULL;
    stored->message.block_count = 0;
    slot->message.ends = slot->ends;
    set_payload(&slot->message, slot->large);
}

/* ---- sleeping and waking ---- */

static long futex(atomic_u32 *word, int operation, uint32_t value, const struct timespec *until)
{
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, until, NULL,
                   FUTEX_BITSET_MATCH_ANY);
}

int slot_sleep(struct shmrpc_slot *slot, uint64_t deadline_ns)
{
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                             .tv_nsec = (long)(deadline_ns % 1000000000u)};

    lock_release();
    while (load_acquire32(&slot->state) == SLOT_SLEEPING) {
        long status = futex(&slot->state, FUTEX_WAIT_BITSET, SLOT_SLEEPING,
                            deadline_ns != 0 ? &until : NULL);
        if (status < 0 && (errno == ETIMEDOUT || errno == EINTR))
            return -errno;
    }
    return 0;
}

void slot_wake(struct shmrpc_slot *slot, uint32_t state)
{
    if (exchange32(&slot->state, state) == SLOT_SLEEPING)
        futex(&slot->state, FUTEX_WAKE, 1, NULL);
}

void slot_finish(struct shmrpc_slot *slot, int64_t result)
{
    if (load_acquire32(&slot->state) == SLOT_DONE)
        return; /* its thread may be reading the result without the lock */
    slot->result = result;
    slot_wake(slot, SLOT_DONE);
}

/* ---- what the leader does for the others ---- */

static int64_t reply_result(const struct shmrpc_slot *slot)
{
    const shmrpc_message *message = &slot->message;

    if (message->status == STATUS_OK && message->metadata_bytes == 0 && message->blocks == NULL &&
        slot_in_view(slot))
        return (int64_t)message->body_bytes;
    return SHMRPC_MESSAGE;
}

int callers_reply(struct shmrpc_poller *poller, struct shmrpc_slot *leader, struct conn *conn,
                  const struct frame_header *header)
{
    uint32_t index = (uint32_t)(header->call_id & 0xffff);
    int status = 0;

    if (leader->goal == GOAL_REPLY && leader->call_id == header->call_id &&
        leader->conn == conn) {
        /* The leader's own, as nearly always: nobody else touches its slot while it leads. */
        status = slot_receive(leader, conn, header);
        leader->call_id = 0;
        leader->result = status == 0 ? reply_result(leader) : status;
        store_release32(&leader->state, SLOT_DONE);
        conn_finish(conn, header->length, &poller->bells);
        return 0;
    }
    poller_lock(poller);
    struct shmrpc_slot *slot = index < poller->slot_capacity ? poller->slots[index] : NULL;
    if (index == SHMRPC_PYTHON_INDEX) {
        if (!events_add_brief(poller, conn, header))
            status = events_receive(poller, conn, header);
    } else if (slot != NULL && slot->goal == GOAL_REPLY && slot->conn == conn &&
               slot->call_id == header->call_id) {
        status = slot_receive(slot, conn, header);
        slot->call_id = 0;
        slot_finish(slot, status == 0 ? reply_result(slot) : status);
        status = 0;
    } else {
        count_own(&poller->counters.late_replies, 1);
    }
    poller_unlock(poller);
    conn_finish(conn, header->length, &poller->bells);
    return status;
}

void callers_lost(struct shmrpc_poller *poller, struct conn *conn, int error)
{
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        struct shmrpc_slot *slot = poller->slots[i];
        if (slot == NULL || slot->conn != conn ||
            (slot->goal != GOAL_ROOM && slot->goal != GOAL_BLOCKS &&
             (slot->goal != GOAL_REPLY || slot->call_id == 0)))
            continue;
        slot->message.outcome = conn_outcome(conn, slot->call_id, load_relaxed(&slot->position));
        slot->call_id = 0;
        slot_finish(slot, -error);
    }
}

void callers_room(struct shmrpc_poller *poller, struct conn *conn)
{
    poller_lock(poller);
    if (conn->tells_room) {
        conn->tells_room = false;
        events_note(poller, conn, SHMRPC_ROOM, 0, 0);
    }
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        struct shmrpc_slot *slot = poller->slots[i];
        if (slot != NULL && slot->goal == GOAL_ROOM && slot->conn == conn)
            slot_finish(slot, 0);
    }
    poller_unlock(poller);
}

/* ---- leading and following ---- */

/* A worker that only waits for requests is asked for the role: a reply should not have to go
 * through another thread. */
bool slot_enter(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    slot->inside = true;
    slot->alone = poller->client && poller->workers == 0 && slot->origin == NULL;
    slot->accompanied = poller->inside != 0;
    poller->inside++;
    if (poller->workers != 0)
        workers_enter(poller, slot);
    if (poller->leader == NULL || poller->away) {
        poller->leader = slot;
        poller->away = false;
        return true;
    }
    if (poller->leader->goal == GOAL_REQUEST && load_relaxed(&poller->role_wanted) == 0) {
        store_relaxed(&poller->role_wanted, 1);
        poller_kick(poller);
    }
    return false;
}

/* With the lock held: the role goes to a thread that waits inside, if there is one. */
static void hand_on(struct shmrpc_poller *poller, const struct shmrpc_slot *slot)
{
    for (uint32_t i = 1; i < poller->slot_capacity && poller->inside != 0; i++) {
        struct shmrpc_slot *next = poller->slots[(slot->index + i) % poller->slot_capacity];
        if (next == NULL || !next->inside || load_acquire32(&next->state) == SLOT_DONE)
            continue;
        poller->leader = next;
        slot_wake(next, SLOT_PROMOTED);
        return;
    }
}

void callers_promote(struct shmrpc_poller *poller, const struct shmrpc_slot *leader)
{
    store_relaxed(&poller->role_wanted, 0);
    hand_on(poller, leader);
}

void callers_inherit(struct shmrpc_poller *poller, const struct shmrpc_slot *leader)
{
    poller->leader = NULL;
    callers_promote(poller, leader);
}

/* With the lock held: go out, and hand the role on. */
static void leave(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    slot->inside = false;
    poller->inside--;
    workers_leave(poller, slot);
    if (poller->leader != slot)
        return;
    poller->leader = NULL;
    hand_on(poller, slot);
    if (poller->leader == NULL && poller->workers != 0)
        workers_go_away(poller);
}

void callers_stop(struct shmrpc_poller *poller)
{
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        struct shmrpc_slot *slot = poller->slots[i];
        /* Who leads sees it by itself, and writes its own result. */
        if (slot != NULL && slot->inside && slot != poller->leader &&
            load_acquire32(&slot->state) != SLOT_DONE)
            slot_finish(slot, SHMRPC_STOPPED);
    }
}

/* Yields before a follower sleeps. Over a ring its reply is microseconds away, and a yield lets the
 * thread run that has the interpreter's lock; over a socket it is not, and few are enough.
 * 8 threads, calls/s: 0 yields 54,000, 1 yield 120,000, 16 yields 160,000. */
enum { FOLLOWER_STEPS_RING = 32, FOLLOWER_STEPS_STREAM = 4 };

/* The leader blocks in recv and does not see that there is room for what waits to be sent: push it
 * here. Input ends the wait as well, because the role may have been handed to us meanwhile. */
static int64_t push_output(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    struct pollfd socket = {.fd = slot->conn->control_fd, .events = POLLIN | POLLOUT};
    uint64_t bells = 0;

    if (poller_must_check_signals(slot))
        return -EAGAIN;
    lock_release();
    int count = poll(&socket, 1, timeout_ms_until(slot->deadline_ns));
    if (count <= 0)
        return count < 0 ? -errno : -ETIMEDOUT;
    conn_flush(slot->conn, &bells);
    if (load_relaxed(&slot->conn->outbox_bytes) == 0)
        callers_room(poller, slot->conn);
    else
        sched_yield(); /* it was input, and the leader is about to read it */
    return 0;
}

enum { SIGNALS_TICK_NS = 50000000 }; /* as SIGNALS_NS in lead.c */

/* Wait for the leader: 0 when the state has changed, or -errno. */
static int64_t follow(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    bool is_ring = slot->conn != NULL && slot->conn->is_shm;
    uint32_t steps = is_ring ? FOLLOWER_STEPS_RING : FOLLOWER_STEPS_STREAM;

    lock_release();
    for (uint32_t step = 0; step < steps; step++) {
        if (load_acquire32(&slot->state) != SLOT_WAITING)
            return 0;
        spin_step(step, 0);
    }
    if (slot->conn != NULL && load_relaxed(&poller->receiving) != 0 &&
        load_relaxed(&slot->conn->outbox_bytes) != 0)
        return push_output(poller, slot);
    if (poller_must_check_signals(slot))
        return -EAGAIN;
    if (!compare_exchange32(&slot->state, SLOT_WAITING, SLOT_SLEEPING))
        return 0;
    uint64_t until = slot->deadline_ns;
    uint64_t tick = deadline_after(SIGNALS_TICK_NS);
    bool shortened = poller_in_main_thread() && (until == 0 || until > tick);
    int status = slot_sleep(slot, shortened ? tick : until);
    if (status == -ETIMEDOUT && shortened)
        status = -EAGAIN;
    if (status < 0 && compare_exchange32(&slot->state, SLOT_SLEEPING, SLOT_WAITING))
        return status;
    return 0;
}

static int64_t wait_inside(struct shmrpc_poller *poller, struct shmrpc_slot *slot, bool leads)
{
    for (;;) {
        if (leads) {
            if (slot->conn != NULL && load_relaxed(&slot->conn->error) == 0)
                poller_heat(poller, slot->conn); /* a reply is on its way: poll from the start */
            return poller_lead(poller, slot);
        }
        int64_t status = follow(poller, slot);
        if (status < 0)
            return status;
        if (load_acquire32(&slot->state) == SLOT_DONE)
            return slot->result;
        leads = compare_exchange32(&slot->state, SLOT_PROMOTED, SLOT_WAITING);
    }
}

static bool goes_on(int64_t result)
{
    return result == -EAGAIN || result == -EINTR || result == SHMRPC_EVENTS ||
           result == SHMRPC_SPAWN || result == SHMRPC_QUEUED;
}

int64_t slot_wait(struct shmrpc_poller *poller, struct shmrpc_slot *slot, bool leads)
{
    int64_t result = wait_inside(poller, slot, leads);
    struct outgoing cancel = {.header = {.kind = SHMRPC_CANCEL}};
    atomic_u64 position;

    poller_lock(poller);
    leave(poller, slot);
    if (load_acquire32(&slot->state) == SLOT_DONE)
        result = slot->result; /* it came while we gave up */
    else
        store_release32(&slot->state, SLOT_WAITING); /* also if promoted: leave handed that on */
    if ((result == -ETIMEDOUT || result == -ECANCELED) && slot->goal == GOAL_REPLY)
        cancel.header.call_id = slot->call_id;
    if (!goes_on(result) || slot->goal == GOAL_EVENTS) {
        slot->goal = GOAL_NONE;
        slot->call_id = 0;
    }
    poller_unlock(poller);
    if (cancel.header.call_id != 0)
        poller_send(poller, slot->conn, &cancel, &position);
    if (slot->origin != NULL && !goes_on(result))
        forward_end(slot);
    return result;
}

/* The earlier of two deadlines, of which 0 is none: ours and that of the request we serve. */
static uint64_t earlier(uint64_t a, uint64_t b)
{
    return a == 0 || (b != 0 && b < a) ? b : a;
}

void slot_begin(struct shmrpc_slot *slot, enum slot_goal goal, uint64_t deadline_ns)
{
    slot->goal = goal;
    slot->deadline_ns = deadline_ns;
    slot->may_sleep = false;
    store_release32(&slot->state, SLOT_WAITING);
}

/* ---- calls ---- */

static int after_sending(struct shmrpc_poller *poller, struct conn *conn, int status)
{
    if (status == 0 && load_relaxed(&poller->room_waiters) != 0)
        callers_room(poller, conn);
    if ((status == -EPIPE || status == -EPROTO) && load_relaxed(&conn->error) == 0) {
        store_relaxed(&conn->ended_here, 1);
        shutdown(conn->control_fd, SHUT_RDWR); /* the leader will see it and end the conn */
    }
    return status;
}

int poller_send(struct shmrpc_poller *poller, struct conn *conn, struct outgoing *message,
                atomic_u64 *position)
{
    uint64_t bells = 0;
    int status = conn_send(conn, message, position, &bells);

    count_add(&poller->counters.wakeups_sent, bells);
    if (!conn->is_shm)
        full_fence(); /* outbox_bytes before room_waiters and receiving; shm has fence E */
    return after_sending(poller, conn, status);
}

int slot_send(struct shmrpc_slot *slot, struct outgoing *message, int body, atomic_u64 *position)
{
    if (slot->attaches)
        return blocks_send(slot, message, body, position);
    return poller_send(slot->poller, slot->conn, message, position);
}

static void set_deadline(struct outgoing *message, const struct conn *conn, uint64_t deadline_ns)
{
    if (deadline_ns != 0 && conn->relative_deadlines) {
        uint64_t now = clock_now_ns();
        deadline_ns = deadline_ns > now ? deadline_ns - now : 1;
    }
    message->header.deadline_ns = deadline_ns;
}

int64_t slot_call(struct shmrpc_slot *slot, struct outgoing *message, int64_t timeout_ns)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    if (slot->origin != NULL && slot->unwanted) {
        poller_unlock(poller);
        shmrpc_detach(slot);
        forward_end(slot);
        return -ECANCELED;
    }
    slot_begin(slot, GOAL_REPLY, earlier(deadline_after(timeout_ns), shmrpc_inherited_deadline()));
    store_relaxed(&slot->position, UINT64_MAX); /* not sent */
    slot->result = -ECANCELED; /* what forwards_unwanted ends it with */
    slot->call_id = ++poller->call_sequence << 16 | slot->index;
    message->header.call_id = slot->call_id;
    bool leads = slot_enter(poller, slot);
    poller_unlock(poller);

    if (slot->deadline_ns != 0)
        set_deadline(message, slot->conn, slot->deadline_ns);
    int status = slot_send(slot, message, 2, &slot->position);
    if (status >= 0)
        return slot_wait(poller, slot, leads);

    poller_lock(poller);
    leave(poller, slot);
    slot->goal = GOAL_NONE;
    slot->call_id = 0;
    slot->message.outcome = SHMRPC_NOT_SENT;
    poller_unlock(poller);
    if (slot->origin != NULL)
        forward_end(slot);
    return status;
}

int64_t shmrpc_call_with(shmrpc_slot *slot, const shmrpc_name *name, uint32_t flags,
                         const char *metadata, size_t metadata_bytes, const char *body,
                         size_t body_bytes, int64_t timeout_ns)
{
    struct outgoing message = {
        .header = {.kind = SHMRPC_REQUEST,
                   .flags = (uint8_t)flags,
                   .method_bytes = (uint16_t)name->bytes,
                   .metadata_bytes = (uint32_t)metadata_bytes},
        .parts = {{(void *)(uintptr_t)name->text, name->bytes},
                  {(void *)(uintptr_t)metadata, metadata_bytes},
                  {(void *)(uintptr_t)body, body_bytes}},
    };

    return conn_hung_up(slot->conn) ? -ENOTCONN : slot_call(slot, &message, timeout_ns);
}

int64_t shmrpc_call(shmrpc_slot *slot, const shmrpc_name *name, const char *body,
                    size_t body_bytes, int64_t timeout_ns)
{
    return shmrpc_call_with(slot, name, 0, NULL, 0, body, body_bytes, timeout_ns);
}

int64_t shmrpc_wait(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    slot->may_sleep = true;
    bool leads = slot_enter(poller, slot);
    poller_unlock(poller);
    return slot_wait(poller, slot, leads);
}

void shmrpc_abandon(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;
    struct outgoing message = {.header = {.kind = SHMRPC_CANCEL}};
    atomic_u64 position;

    poller_lock(poller);
    if (slot->goal == GOAL_REPLY && !poller->closed)
        message.header.call_id = slot->call_id;
    slot->goal = GOAL_NONE;
    if (!slot->worker)
        slot->call_id = 0;
    poller_unlock(poller);
    if (message.header.call_id != 0)
        poller_send(poller, slot->conn, &message, &position);
    if (slot->origin != NULL)
        forward_end(slot);
}

enum { HOLD_MAX = 8 }; /* more at once would leave the other side waiting, not working */

/* As poller_send, in an event loop: what is sent while it takes a batch reaches the peer some messages
 * at a time. Each time the peer's CPU has to fetch the position anew, and wants to see more than one
 * message for that. */
static int loop_send(struct shmrpc_poller *poller, struct conn *conn, struct outgoing *message,
                     atomic_u64 *position)
{
    uint64_t bells = 0;

    if (!poller->holding || !conn->is_shm)
        return poller_send(poller, conn, message, position);
    if (!conn->in_held) {
        conn->in_held = true;
        conn->held = 0;
        conn->next_held = poller->held;
        poller->held = conn;
        conn_hold(conn);
    }
    int status = conn_send_held(conn, message, position);
    if (status != 0 || ++conn->held == HOLD_MAX) {
        conn->held = 0;
        conn_publish(conn, true, &bells);
        count_add(&poller->counters.wakeups_sent, bells);
    }
    return after_sending(poller, conn, status);
}

/* Let the peers see what is held. */
static void publish(struct shmrpc_poller *poller)
{
    struct conn *conn;
    uint64_t bells = 0;

    poller->holding = false;
    while ((conn = poller->held) != NULL) {
        poller->held = conn->next_held;
        conn->in_held = false;
        conn_publish(conn, false, &bells);
    }
    count_add(&poller->counters.wakeups_sent, bells);
}

void shmrpc_publish(shmrpc_poller *poller)
{
    publish(poller);
}

int shmrpc_send(shmrpc_slot *slot, uint32_t kind, uint32_t flags, uint64_t call_id,
                const shmrpc_name *name, uint32_t status, const char *metadata,
                size_t metadata_bytes, const char *body, size_t body_bytes, uint64_t deadline_ns,
                uint64_t *position)
{
    uint32_t name_bytes = name != NULL ? name->bytes : 0;
    struct outgoing message = {
        .header = {.kind = (uint8_t)kind,
                   .flags = (uint8_t)flags,
                   .method_bytes = (uint16_t)(name != NULL ? name_bytes : status),
                   .call_id = call_id,
                   .metadata_bytes = (uint32_t)metadata_bytes},
        .parts = {{name != NULL ? (void *)(uintptr_t)name->text : NULL, name_bytes},
                  {(void *)(uintptr_t)metadata, metadata_bytes},
                  {(void *)(uintptr_t)body, body_bytes}},
    };

    if (!slot->worker && conn_hung_up(slot->conn))
        return -ENOTCONN;
    set_deadline(&message, slot->conn, deadline_ns);
    int result = slot_send(slot, &message, 2, (atomic_u64 *)position);
    if (kind == SHMRPC_REQUEST || kind == SHMRPC_PING)
        poller_expect(slot->poller, slot->conn);
    return result;
}

int64_t shmrpc_send_request(shmrpc_slot *slot, uint64_t call_id, const shmrpc_name *name,
                            const char *body, size_t body_bytes)
{
    struct outgoing message = {
        .header = {.kind = SHMRPC_REQUEST,
                   .method_bytes = (uint16_t)name->bytes,
                   .call_id = call_id},
        .parts = {{(void *)(uintptr_t)name->text, name->bytes},
                  {(void *)(uintptr_t)body, body_bytes}},
    };
    uint64_t deadline_ns = shmrpc_inherited_deadline();
    atomic_u64 position;

    if (conn_hung_up(slot->conn))
        return -ENOTCONN;
    if (deadline_ns != 0)
        set_deadline(&message, slot->conn, deadline_ns);
    int status = loop_send(slot->poller, slot->conn, &message, &position);
    poller_expect(slot->poller, slot->conn);
    if (status < 0)
        return status;
    return (int64_t)(load_relaxed(&position) << 2) | (deadline_ns != 0 ? 2 : 0) | status;
}

int shmrpc_send_reply(shmrpc_slot *slot, uint64_t call_id, const char *body, size_t body_bytes)
{
    struct outgoing message = {
        .header = {.kind = SHMRPC_REPLY, .call_id = call_id},
        .parts = {{(void *)(uintptr_t)body, body_bytes}},
    };
    atomic_u64 position;

    return loop_send(slot->poller, slot->conn, &message, &position);
}

int shmrpc_send_item(shmrpc_slot *slot, uint32_t flags, uint64_t call_id, const char *body,
                     size_t body_bytes)
{
    struct outgoing message = {
        .header = {.kind = SHMRPC_ITEM, .flags = (uint8_t)flags, .call_id = call_id},
        .parts = {{(void *)(uintptr_t)body, body_bytes}},
    };
    atomic_u64 position;
    int status = slot_send(slot, &message, 0, &position);

    if (status >= 0 && slot->poller->batch.has_items)
        poller_sent(slot->poller, slot->conn);
    return status;
}

int64_t shmrpc_flush(shmrpc_slot *slot, int64_t timeout_ns)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    slot_begin(slot, GOAL_ROOM, deadline_after(timeout_ns));
    store_relaxed(&poller->room_waiters, 1); /* stays set: flushing is rare, asking is not */
    bool leads = slot_enter(poller, slot);
    poller_unlock(poller);
    full_fence(); /* room_waiters before outbox_bytes, see poller_send */
    int64_t error = (int64_t)load_relaxed(&slot->conn->error);
    if (error != 0 || load_relaxed(&slot->conn->outbox_bytes) == 0) {
        poller_lock(poller);
        slot_finish(slot, -error);
        poller_unlock(poller);
    }
    return slot_wait(poller, slot, leads);
}

int64_t shmrpc_wait_events(shmrpc_slot *slot, int64_t timeout_ns)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    if (slot->poked) {
        slot->poked = false;
        poller_unlock(poller);
        return 0;
    }
    slot_begin(slot, GOAL_EVENTS, deadline_after(timeout_ns));
    slot->may_sleep = slot->checked_signals;
    slot->checked_signals = false;
    bool leads = slot_enter(poller, slot);
    poller_unlock(poller);
    int64_t result = slot_wait(poller, slot, leads);
    slot->checked_signals = result == -EAGAIN;
    return result;
}

int shmrpc_want_room(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;
    struct conn *conn = slot->conn;

    poller_lock(poller);
    conn->tells_room = true;
    store_relaxed(&poller->room_waiters, 1);
    poller_unlock(poller);
    full_fence(); /* room_waiters before outbox_bytes, see poller_send */
    if (load_relaxed(&conn->outbox_bytes) != 0 && load_relaxed(&conn->error) == 0)
        return 1;
    poller_lock(poller);
    conn->tells_room = false;
    poller_unlock(poller);
    return 0;
}

int64_t shmrpc_poll(shmrpc_slot *slot, uint32_t spin_ns)
{
    struct shmrpc_poller *poller = slot->poller;

    if (poller->holding)
        publish(poller);
    poller_lock(poller);
    slot_begin(slot, GOAL_EVENTS, 0);
    bool leads = slot_enter(poller, slot);
    poller->batch.count = poller->batch.used = 0;
    poller->batch.open = leads && poller->batch.briefs != NULL;
    poller_unlock(poller);
    int64_t result = leads ? poller_poll(poller, slot, spin_ns) : -EAGAIN;
    poller_lock(poller);
    poller->batch.open = false;
    if (poller->batch.count != 0)
        result = (int64_t)poller->batch.used << 16 | poller->batch.count;
    poller->holding = poller->batch.count > 1;
    slot->goal = GOAL_NONE;
    leave(poller, slot);
    poller_unlock(poller);
    return result;
}

int shmrpc_arm(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    slot_begin(slot, GOAL_EVENTS, 0);
    bool leads = slot_enter(poller, slot);
    poller_unlock(poller);
    bool armed = leads && poller_arm(poller, slot);
    poller_lock(poller);
    slot->goal = GOAL_NONE;
    leave(poller, slot);
    poller_unlock(poller);
    return armed;
}

void shmrpc_poke(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    if (slot->goal != GOAL_EVENTS) {
        slot->poked = true; /* it is out in Python: its next wait ends at once */
    } else {
        slot_finish(slot, 0);
        if (poller->leader == slot)
            poller_kick(poller);
    }
    poller_unlock(poller);
}

int shmrpc_take(shmrpc_slot *slot)
{
    struct shmrpc_poller *poller = slot->poller;

    poller_lock(poller);
    bool taken = events_take_batch(poller, slot);
    struct stored *stored = taken ? NULL : stored_pop(&poller->events);
    if (stored != NULL) {
        store_relaxed(&poller->event_count, load_relaxed(&poller->event_count) - 1);
        slot_take(slot, stored);
        stored_free(stored);
        taken = true;
    } else {
        slot_drop_blocks(slot); /* what the last one had and nobody took is not kept until the next */
    }
    poller_unlock(poller);
    return taken;
}
