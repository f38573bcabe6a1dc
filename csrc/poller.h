/* poller.h - what poller.c, lead.c, callers.c and workers.c share. Not for users: see shmrpc.h.
 *
 *   poller.c    the registry of conns, events for Python, statistics
 *   lead.c      leading: polling hot conns, spinning, arming, sleeping
 *   callers.c   threads that wait for a reply: send, lead or follow, hand the role on
 *   blocks.c    buffers beside messages: attaching, loans, waiting for room in the arena
 *   events.c    messages for Python: replies to its own calls, frames of streams
 *   workers.c   threads that run requests: admission, queue, standby
 *   forward.c   requests that are passed on as calls to somebody else
 *
 * Rule 1: one thread leads at a time. Fields marked "leader" belong to it; the role changes hands
 *         only under `lock`.
 * Rule 2: a slot's state changes under `lock`, except by its own thread going to sleep.
 * Rule 3: lock order is forward_lock before poller->lock, also of another poller, before
 *         conn->send_lock; nothing blocks while holding one of them.
 */
#ifndef SHMRPC_POLLER_H
#define SHMRPC_POLLER_H

#include "conn.h"
#include "forks.h"
#include "methods.h"

/* gRPC status numbers that the core itself sends. */
enum {
    STATUS_OK = 0,
    STATUS_CANCELLED = 1,
    STATUS_DEADLINE_EXCEEDED = 4,
    STATUS_RESOURCE_EXHAUSTED = 8,
    STATUS_UNIMPLEMENTED = 12,
    STATUS_UNAVAILABLE = 14
};

/* epoll's data.u64: a conn id, with the top bit for its control socket. 0 is the kick. */
#define EPOLL_CONTROL ((uint64_t)1 << 63)

/* Results of poller_lead besides those in shmrpc.h: a queued request can start now; a caller wants
 * the role. */
enum { RESULT_QUEUED = -1100, RESULT_WANTED = -1101 };

enum slot_goal { GOAL_NONE, GOAL_REPLY, GOAL_ROOM, GOAL_BLOCKS, GOAL_EVENTS, GOAL_REQUEST };

enum slot_state {
    SLOT_IDLE,     /* waits for nothing */
    SLOT_WAITING,  /* its thread is awake, or out in Python */
    SLOT_SLEEPING, /* its thread is in futex_wait on this word */
    SLOT_DONE,     /* result is set */
    SLOT_PROMOTED  /* its thread is to lead from now on */
};

/* Bytes before a slot's view: room for method name and metadata in front of the body, so that a
 * short message is one copy and its body still lies where Python's memoryview is. */
enum { SLOT_HEAD_BYTES = 512 };

struct shmrpc_slot {
    shmrpc_message message;
    struct shmrpc_poller *poller;
    struct conn *conn; /* caller: where its calls go. worker: of its request, with a reference */
    uint8_t *base;     /* SLOT_HEAD_BYTES + the longest frame */
    uint8_t *large;    /* malloc: a message that did not fit there */
    atomic_u32 state;  /* enum slot_state; also the futex */
    uint32_t index;    /* in poller->slots, and in the low 16 bits of its call ids */
    enum slot_goal goal;
    bool worker;    /* else a caller */
    bool inside;    /* a thread waits in C with this slot */
    bool alone;     /* its own conn is all that there is to read, and replies all that comes */
    bool accompanied; /* other threads wait on the same poller */
    bool may_sleep; /* main thread: Python has just checked for signals */
    bool checked_signals; /* the same, between two shmrpc_wait_events */
    bool poked;           /* lock: shmrpc_poke came while it was out in Python */
    bool has_thread; /* worker: of its own, which is in shmrpc_next or runs a request */
    bool running;   /* worker: has a request */
    bool replied;   /* worker: its request needs no reply any more */
    uint64_t since_ns; /* worker, lock: when its request was started, once that is known: a short one
                        * costs no look at the clock. The standby notes it of one that takes long */
    uint64_t call_id;
    atomic_u64 position; /* of its request in the ring, see conn_outcome */
    uint64_t deadline_ns;
    int64_t result;
    struct shmrpc_slot *next_idle;
    struct shmrpc_slot *serves; /* worker: the request around this one, in the same thread */
    struct shmrpc_slot *blocks; /* caller: the worker whose request waits here */
    struct ways *ways;          /* worker, its own thread: see forward.c; malloc, or null */
    struct shmrpc_slot *origin; /* caller, its own thread: the worker whose request it passes on */
    struct shmrpc_slot *next_forward, *previous_forward; /* caller, origin's forward_lock */
    uint64_t way_epoch; /* caller, origin's forward_lock: as poller->ways_epoch; 0: by no way */
    bool unwanted;      /* caller, lock: nobody waits for what origin asks for */
    uint8_t *reply_metadata;    /* worker: see shmrpc_reply_metadata */
    uint32_t reply_metadata_bytes;
    uint32_t *ends;             /* of message.ends, malloc */
    bool attaches;              /* the next message that is sent has a block table: */
    struct attached *attached;  /* see blocks.c; malloc, or null */
};

/* A message that waits in private memory: an event for Python or a queued request. */
struct stored {
    struct stored *next;
    struct conn *conn; /* with a reference; null if it has ended */
    shmrpc_message message;
    uint8_t *payload;
    uint32_t queued_index; /* in the segment's queued table */
    uint64_t queued_ns;    /* when it was queued */
    uint32_t *ends;        /* ITEM: see message.ends */
    uint32_t end_capacity, payload_capacity;
    uint32_t total_bytes; /* queued: as poller->queued_bytes counts it */
};

struct stored_list {
    struct stored *first, **last;
};

struct counters {
    atomic_u64 spins_hit, spins_missed, yields, sleeps, wakeups_sent;
    atomic_u64 frames_received, frames_dropped, late_replies;
    atomic_u64 calls_started, calls_refused, calls_expired;
    atomic_u64 calls_queued, queued_ns;
};

/* Plain messages for Python: nothing is allocated for them. They are older than any event. */
struct batch {
    shmrpc_brief *briefs; /* null: messages are events */
    uint8_t *bytes;
    uint32_t count, used;
    bool open;      /* lock: messages may be added */
    bool is_event;  /* lock: it is for shmrpc_take, which closes it; else for shmrpc_poll */
    bool has_items; /* lock: items may be added as well */
};

struct hot_list {
    uint32_t capacity;
    struct conn *conns[];
};

struct shmrpc_poller {
    pthread_mutex_t lock;
    int epoll_fd, kick_fd;
    uint64_t forks; /* in the process that made it */
    bool kick_owned, client;
    uint32_t workers, max_concurrency; /* lock: workers == 0 serves nothing */

    struct conn **conns; /* lock: by index, null where free */
    uint64_t *conn_uses; /* lock: by index, how often it was given out; part of the id */
    uint32_t conn_capacity, conn_count;

    uint32_t references; /* lock: the owner and every slot */
    bool ending;         /* lock: it goes with the last slot of a conn or worker */
    bool closed;         /* lock: the owner has given it up, there are no conns any more */
    struct shmrpc_slot **slots; /* lock: by index */
    uint32_t slot_capacity, inside;
    uint64_t call_sequence; /* lock */
    struct shmrpc_slot *leader; /* lock */

    bool away;             /* lock: the leader is out in Python, or it was a caller and is gone */
    uint64_t away_count;   /* lock: how many times it went */
    struct shmrpc_slot *standby, *idle; /* lock */
    bool standby_parked;                /* lock */
    int tick_fd;         /* lock: timer that wakes the parked standby; -1 until one parks */
    bool tick_set;       /* lock: it is to wake it if the leader stays away */
    bool tick_is_wake;   /* lock: it wakes it now */
    uint64_t tick_count; /* lock: away_count when it was set */
    uint64_t slept_ns;   /* lock: when the leader slept last */
    uint32_t worker_threads, running, queued; /* lock */
    uint32_t spawning;     /* lock: threads that were asked for and have not come */
    uint64_t spawned_ns;   /* lock: when one was asked for last */
    uint32_t blocked;      /* lock: requests whose thread waits for something on this poller */
    bool event_requests;   /* lock: requests are events */
    bool reads_always;     /* set before there are conns: see workers_full */
    bool event_loop;       /* set before there are conns: one thread sends, leads and polls */
    struct batch batch;    /* leader, lock */
    bool holding;          /* leader: an event loop takes a batch, and what it sends is held: */
    struct conn *held;     /* leader: conns that have something of that */
    uint64_t armed_ns;     /* leader: when poller_arm armed, 0 if something has come since */
    bool spun;             /* leader: poller_poll, when nothing came */
    bool asked;            /* leader: the policy was, since poller_arm */
    bool sent;             /* leader: a short item, and nothing has come since */
    uint8_t rests;         /* leader: see shmrpc_poller_rests */
    bool retired;          /* lock: a client's conn has ended, its workers end */
    uint64_t queued_bytes;                    /* lock */
    bool resumes;                             /* lock: a conn has its `resumed` set */
    struct stored_list queue, events;         /* lock */
    atomic_u64 event_count;
    atomic_u64 receiving;    /* W: leader: it blocks in recv, where no kick reaches it */
    atomic_u64 room_waiters; /* somebody has called shmrpc_flush */
    struct methods methods;  /* lock */
    atomic_u64 draining, stopping;
    atomic_u64 role_wanted; /* W: under lock: a caller waits for a leading worker's role */
    atomic_u64 spawn_wanted; /* W: under lock: a leading caller is to ask for another worker */
    atomic_u64 startable;   /* W: under lock, leader: perhaps a queued request can start now */

    pthread_mutex_t forward_lock;
    struct shmrpc_slot *forwards; /* forward_lock: callers that pass on requests of this poller */
    atomic_u64 ways_epoch; /* W: forward_lock: how often the workers' ways were made invalid */

    struct hot_list *hot; /* leader: conns to poll */
    uint32_t hot_count, cursor;
    atomic_pointer larger_hot; /* struct hot_list *, for the leader to take */
    uint32_t hot_rings; /* leader: how many of them are worth spinning for */
    struct spin_policy policy; /* leader */
    struct spin_policy more;   /* leader: an event loop's, for bytes: see loop_policy */
    uint64_t expected_ns;      /* leader: until when an answer to large values may be on the way */
    atomic_u64 beside;         /* bytes in blocks that were sent or received since the last spin */
    struct spin_policy locked_policy; /* leader: whether it pays to sleep with the program's lock */
    uint64_t looked_ns;        /* leader: when epoll was looked at last */
    uint32_t rounds;           /* leader: see keep_looking */
    uint64_t coarse_ns;        /* leader: the coarse clock in keep_looking */
    uint64_t bells;            /* leader: rung since they were counted last */
    bool served_last;          /* leader: the last caller that led was asked to serve */
    bool caller_leads;         /* leader: it waits for more than requests */
    struct counters counters;
};

/* ---- lead.c ---- */

/* Lead until the slot's goal is met. The caller holds the role and not the lock. */
int64_t poller_lead(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
/* The same without sleeping, for an event loop: see shmrpc_poll. */
int64_t poller_poll(struct shmrpc_poller *poller, struct shmrpc_slot *slot, uint32_t spin_ns);
/* Arm everything: false if there is something to poll. */
bool poller_arm(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
/* An item was sent on this conn by an event loop, which takes items in its batch. */
void poller_sent(struct shmrpc_poller *poller, struct conn *conn);
/* Poll this conn from now on; leader only. */
void poller_heat(struct shmrpc_poller *poller, struct conn *conn);

/* In an event loop, whose only thread is the leader, after it has sent something: an answer is on its
 * way, poll for it. Whether the conn was not polled before. */
static inline bool poller_expect(struct shmrpc_poller *poller, struct conn *conn)
{
    /* Elsewhere `hot` may be written by another thread, which leads. */
    if (!poller->event_loop || !conn->is_shm || conn->hot || load_relaxed(&conn->error) != 0)
        return false;
    poller_heat(poller, conn);
    conn->last_active_ns = clock_now_ns(); /* the last look may be long ago */
    return true;
}

/* A main thread must go back to Python once before each sleep, to run signal handlers: a signal
 * that came since it left Python would not interrupt the sleep. */
bool poller_must_check_signals(struct shmrpc_slot *slot);
bool poller_in_main_thread(void);
/* For epoll and poll: -1 without a deadline. */
int timeout_ms_until(uint64_t deadline_ns);

/* ---- poller.c ---- */

/* Give up a reference; the last one frees it. */
void poller_unref(struct shmrpc_poller *poller);
/* With the lock held: if it is to end and nobody can be inside any more, close and unmap. */
void poller_end_if_unused(struct shmrpc_poller *poller);
/* Whether this is a forked child of the process that made it: then none of its locks may be taken. */
bool poller_inherited(const struct shmrpc_poller *poller);
/* Wake the leader out of epoll. */
void poller_kick(struct shmrpc_poller *poller);
void poller_lock(struct shmrpc_poller *poller);
void poller_unlock(struct shmrpc_poller *poller);
/* With the lock held: the conn with this id, or null. */
struct conn *poller_find(struct shmrpc_poller *poller, uint64_t conn_id);
/* With the lock held: it is found no more. */
void poller_unregister(struct shmrpc_poller *poller, const struct conn *conn);
/* With the lock held: give up a reference. */
void conn_release(struct conn *conn);
void stored_append(struct stored_list *list, struct stored *stored);
struct stored *stored_pop(struct stored_list *list);
void stored_free(struct stored *stored);
uint64_t deadline_after(int64_t timeout_ns);

/* ---- events.c ---- */

/* So many may wait to be taken; then nothing is read, and senders wait in turn. */
enum { EVENTS_MAX = 16384 };

/* With the lock held: the message, whose payload is taken over, for Python. */
int events_add(struct shmrpc_poller *poller, const struct conn *conn,
               const shmrpc_message *message, uint8_t *payload);
/* With the lock held: something without a payload has happened to this call. */
int events_note(struct shmrpc_poller *poller, const struct conn *conn, uint32_t kind,
                uint64_t call_id, uint32_t flags);
/* With the lock held: the message that conn_receive has found, for Python; not consumed. */
int events_receive(struct shmrpc_poller *poller, struct conn *conn,
                   const struct frame_header *header);
/* Put it into the batch if it is plain and no event is older: nothing happens otherwise. Not
 * consumed. */
bool events_add_brief(struct shmrpc_poller *poller, struct conn *conn,
                      const struct frame_header *header);
/* With the lock held: the batch, if it has anything, is the slot's message from now on. */
bool events_take_batch(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
/* A frame of a stream has arrived. Consumes it. */
int events_stream(struct shmrpc_poller *poller, struct conn *conn,
                  const struct frame_header *header);

/* ---- callers.c ---- */

/* Takes over the blocks that came with it. */
void message_from_header(shmrpc_message *message, struct conn *conn,
                         const struct frame_header *header);
/* Copy the message that conn_receive has found into the slot. 0 or -ENOMEM. */
int slot_receive(struct shmrpc_slot *slot, struct conn *conn, const struct frame_header *header);
/* Move a stored message into the slot. */
void slot_take(struct shmrpc_slot *slot, struct stored *stored);
/* The blocks of the slot's message that nobody took are given back. */
void slot_drop_blocks(struct shmrpc_slot *slot);
/* Whether the body lies in the view that Python has. */
bool slot_in_view(const struct shmrpc_slot *slot);
/* With the lock held: set result and wake the slot's thread, unless its wait has ended already. */
void slot_finish(struct shmrpc_slot *slot, int64_t result);
/* With the lock held: set the state and wake the slot's thread if it sleeps. */
void slot_wake(struct shmrpc_slot *slot, uint32_t state);
/* A REPLY has arrived: for a waiting slot, for Python, or too late. Consumes it. */
int callers_reply(struct shmrpc_poller *poller, struct shmrpc_slot *leader, struct conn *conn,
                  const struct frame_header *header);
/* The outbox of this conn is empty: wake who waits for that. */
void callers_room(struct shmrpc_poller *poller, struct conn *conn);
/* Send; rings, counts and wakes whom it concerns. As conn_send. */
int poller_send(struct shmrpc_poller *poller, struct conn *conn, struct outgoing *message,
                atomic_u64 *position);
/* The same with the slot's attached buffers, if it has any; parts[body] is the message's body. */
int slot_send(struct shmrpc_slot *slot, struct outgoing *message, int body, atomic_u64 *position);
/* With the lock held: the slot waits from now on. */
void slot_begin(struct shmrpc_slot *slot, enum slot_goal goal, uint64_t deadline_ns);
/* With the lock held: come in, and take the role if nobody is using it. */
bool slot_enter(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
/* Wait until the slot's goal is met. */
int64_t slot_wait(struct shmrpc_poller *poller, struct shmrpc_slot *slot, bool leads);
/* With the lock held: the conn has ended with this errno. */
void callers_lost(struct shmrpc_poller *poller, struct conn *conn, int error);
/* Sleep until *state is not SLOT_SLEEPING: 0, -ETIMEDOUT, -EINTR. */
int slot_sleep(struct shmrpc_slot *slot, uint64_t deadline_ns);
/* With the lock held: the slot's worker leads, and a caller wants the role: hand it over. */
void callers_promote(struct shmrpc_poller *poller, const struct shmrpc_slot *leader);
/* With the lock held: the leading worker ends; who waits inside has to read by itself. */
void callers_inherit(struct shmrpc_poller *poller, const struct shmrpc_slot *leader);
/* Send this request and wait for its reply: as shmrpc_call_with. */
int64_t slot_call(struct shmrpc_slot *slot, struct outgoing *message, int64_t timeout_ns);
/* With the lock held: end every wait, because the poller stops. */
void callers_stop(struct shmrpc_poller *poller);
struct shmrpc_slot *slot_new(struct shmrpc_poller *poller, uint64_t conn_id, bool worker);

/* ---- blocks.c ---- */

int blocks_send(struct shmrpc_slot *slot, struct outgoing *message, int body,
                atomic_u64 *position);
/* The slot's next message carries the buffers of this one, if it has any, each copied once, unless
 * buffers are attached already. They have to stay until it was sent. 0, or as shmrpc_attach; then
 * nothing is attached. */
int blocks_pass(struct shmrpc_slot *slot, const shmrpc_message *message);
/* The same for the worker's next message and the reply that `slot` has got to the worker's request. What
 * comes back of the request is not copied: it goes back as the caller's own blocks. */
int blocks_pass_back(struct shmrpc_slot *worker, const struct shmrpc_slot *slot);
/* RETURN or WITHDRAW has arrived. Consumes it. */
int blocks_frame(struct shmrpc_poller *poller, struct conn *conn,
                 const struct frame_header *header);
/* The slot goes. */
void blocks_forget(struct shmrpc_slot *slot);

/* ---- forward.c ---- */

/* The call that the slot's origin was passed on by has ended: nobody may interrupt it any more. */
void forward_end(struct shmrpc_slot *slot);
/* Without locks: nobody waits for this request of the conn's any more, for any of its requests if
 * call_id is 0, or for any at all if conn is null. End the calls by which they were passed on. */
void forwards_unwanted(struct shmrpc_poller *poller, const struct conn *conn, uint64_t call_id);
/* With the poller's lock held: the worker has ways that are not valid any more. */
bool ways_stale(const struct shmrpc_poller *poller, const struct shmrpc_slot *worker);
/* The worker goes. */
void ways_forget(struct shmrpc_slot *worker);

/* ---- workers.c ---- */

/* A REQUEST or NOTIFY has arrived: start it in the leader's slot, queue or refuse it. Consumes
 * it. */
void workers_request(struct shmrpc_poller *poller, struct shmrpc_slot *slot, struct conn *conn,
                    const struct frame_header *header);
void workers_cancel(struct shmrpc_poller *poller, struct conn *conn, uint64_t call_id);
/* Whether no more requests may be taken from this conn now. */
bool workers_full(const struct shmrpc_poller *poller, const struct conn *conn);
/* With the lock held: the leader returns to Python, or leaves altogether. */
void workers_go_away(struct shmrpc_poller *poller);
/* The leader is there, and about to sleep: nobody needs to look whether it stays away. */
void workers_sleep(struct shmrpc_poller *poller, uint64_t now_ns);
/* With the lock held: this caller's thread waits from now on, so that the request it serves here
 * does not count as running; and goes on. */
void workers_enter(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
void workers_leave(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
/* With the lock held: have the leader look at this conn again. */
void workers_read_again(struct shmrpc_poller *poller, struct conn *conn);
/* Leader: a conn takes replies again, for which its queued requests have waited. */
void workers_resume(struct shmrpc_poller *poller);
/* With the lock held: a worker's slot goes, whatever it was doing. */
void workers_forget(struct shmrpc_poller *poller, struct shmrpc_slot *slot);
/* With the lock held: whether a request of this conn runs, or has run and got no reply. */
bool workers_run(const struct shmrpc_poller *poller, const struct conn *conn);
/* With the lock held: tell all requests that run that nobody waits for them any more. */
void workers_cancel_all(struct shmrpc_poller *poller);
/* With the lock held: a client's conn has ended. Its workers end, what is queued is dropped. */
void workers_retire(struct shmrpc_poller *poller);
/* With the lock held: wake every worker, to see that the poller stops. */
void workers_wake_all(struct shmrpc_poller *poller);
/* Reply without a body from the core itself. */
void workers_answer(struct shmrpc_poller *poller, struct conn *conn, uint64_t call_id,
                    uint32_t status);

#endif
