/* shmrpc.h - the public C API of shmrpc: calls between two processes over shared memory.
 *
 * Glossary
 *   segment   memory that one side writes and the other only reads (layout.h)
 *   frame     one header and payload in a ring or on a socket; a message is one frame or more
 *   conn      one connection: two segments and doorbells, or one stream socket
 *   poller    the place where threads wait for one or many conns; one of them leads, that is,
 *             reads for all, the others follow
 *   slot      what one thread needs to wait: a buffer for the message it receives, its state
 *   bell      the eventfd (or socket) by which one side wakes the other
 *
 * Functions return 0, a count or a handle, or -errno:
 *   -EAGAIN     nothing yet, and the thread would sleep now: check for signals, then go on by
 *               shmrpc_wait (after shmrpc_wait_events by calling that again)
 *   -EINTR      a signal interrupted the sleep: run its handlers, then go on likewise
 *   -ETIMEDOUT  the deadline passed
 *   -ENOTCONN   the peer was gone before anything was sent: connect again and repeat
 *   -EPIPE      the peer is gone; -EPROTO: the peer broke the protocol; both end the connection
 *   -EMSGSIZE   larger than the peer accepts
 *   -ENOMEM     no memory, or a fixed table is full
 * or one of enum shmrpc_result. No function touches errno's meaning, logs or aborts.
 *
 * Threads: a poller and its conns may be used by any number of threads; a slot by one at a time.
 * Forks: nothing here may be used in a forked child but shmrpc_poller_fds, to close them. What frees
 * something does nothing there, or lets go of a mapping at most: finalizers run in the child, too.
 */
#ifndef SHMRPC_H
#define SHMRPC_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

enum shmrpc_kind {
    SHMRPC_REQUEST = 1,  /* a call that wants one reply */
    SHMRPC_REPLY = 2,    /* its end: status, metadata, result or error */
    SHMRPC_NOTIFY = 3,   /* a call that wants none */
    SHMRPC_CONTINUE = 4, /* next piece of the message before */
    SHMRPC_CANCEL = 5,   /* the caller of call_id no longer waits */
    SHMRPC_PING = 6,     /* answered by the reader itself with an empty REPLY */
    SHMRPC_ITEM = 7,     /* one message of a stream */
    SHMRPC_END = 8,      /* the caller sends no more items */
    SHMRPC_CREDIT = 9,   /* the receiver of items has room for more */
    SHMRPC_INITIAL = 10, /* metadata before the first item or the reply */
    SHMRPC_GOODBYE = 11, /* last of a server that stops: no request without a reply was started */
    SHMRPC_RETURN = 12,  /* blocks of the receiver's go back to it */
    SHMRPC_WITHDRAW = 13, /* a segment of the sender's goes: nothing of it is in use */
    SHMRPC_SERVES = 14,  /* the sender takes requests; for who passes calls on */
    SHMRPC_CLOSED = 100, /* never on the wire: this conn has ended */
    SHMRPC_ROOM = 101,   /* nor this: what waited to be sent on this conn has left, or blocks of its
                          * arena have come back */
    SHMRPC_BRIEFS = 102  /* nor this: `item_count` of them are in the batch, with `body_bytes` in
                          * all, see shmrpc_poller_batch */
};

enum shmrpc_flag {
    SHMRPC_FLAG_MORE = 1,     /* CONTINUE frames follow */
    SHMRPC_FLAG_KEYWORDS = 2, /* the body is [positional, keywords], not the positional list */
    SHMRPC_FLAG_STREAM = 4,   /* REQUEST: the caller takes ITEM frames, and may send some */
    SHMRPC_FLAG_ENDED = 8,    /* REQUEST: but sends none, as if END followed */
    SHMRPC_FLAG_CALLER = 16,  /* ITEM, CREDIT: comes from the one that made the call */
    SHMRPC_FLAG_BLOCKS = 32,  /* a block table stands before the body: see shmrpc_attach */
    SHMRPC_FLAG_ALL = 63
};

/* Results of waiting that are neither a count nor an errno. */
enum shmrpc_result {
    SHMRPC_MESSAGE = -1001, /* the slot's message needs a look at its fields */
    SHMRPC_EVENTS = -1002,  /* messages that no slot waits for: shmrpc_take them */
    SHMRPC_SPAWN = -1003,   /* a worker is needed and none is idle: start another, then go on */
    SHMRPC_STOPPED = -1004, /* the poller was stopped */
    SHMRPC_QUEUED = -1005,  /* a caller on a client: shmrpc_next_queued has a request to serve */
    SHMRPC_GROW = -1006,    /* the arena needs a further segment: shmrpc_arena_add, then again */
    SHMRPC_FULL = -1007,    /* the arena may not grow: shmrpc_wait_blocks, then again */
    SHMRPC_PASSING = -1008  /* a request that shmrpc_pass has passed on needs a look */
};

/* What became of a call whose connection ended. */
enum shmrpc_outcome {
    SHMRPC_UNKNOWN = 0,    /* it may have run */
    SHMRPC_NOT_SENT = 1,   /* it never left this process */
    SHMRPC_NOT_STARTED = 2 /* the peer's own segment shows, or it said, that it never started it */
};

enum { SHMRPC_METHOD_MAX = 255, SHMRPC_PYTHON_INDEX = 65535, SHMRPC_RUNNING_MAX = 4096,
       SHMRPC_LOANED = 1 << 30 };

typedef struct shmrpc_poller shmrpc_poller;
typedef struct shmrpc_slot shmrpc_slot;
typedef struct shmrpc_lease shmrpc_lease;
typedef struct shmrpc_loan shmrpc_loan;

/* A buffer that came beside a message's body. */
typedef struct shmrpc_block {
    const uint8_t *data;
    uint64_t bytes;
    shmrpc_lease *lease; /* null: it lies in the message itself, and goes with it */
    uint32_t loaned; /* it lies in a loan of ours, to which its owner may write: copy it */
} shmrpc_block;

/* A received message, copied out of shared memory. Valid until the slot receives the next. */
typedef struct shmrpc_message {
    uint64_t call_id;
    uint64_t conn_id;
    uint64_t deadline_ns; /* absolute CLOCK_MONOTONIC; 0 = none */
    uint64_t body_bytes;
    const uint8_t *head; /* method name, then metadata */
    const uint8_t *body;
    uint32_t kind;
    uint32_t flags;
    uint32_t status; /* replies: gRPC status number. CLOSED: errno */
    uint32_t method_bytes;
    uint32_t metadata_bytes;
    int32_t method;  /* requests: index given by shmrpc_method_add */
    int32_t outcome;    /* after -EPIPE or -EPROTO: enum shmrpc_outcome */
    uint32_t cancelled; /* requests: set while the handler runs if the caller gave up */
    uint32_t item_count;  /* ITEM: how many lie in the body, one behind the other */
    const uint32_t *ends; /* ITEM: where each of them ends; null if there is one */
    uint32_t block_count; /* with SHMRPC_FLAG_BLOCKS: buffers beside the body, which is without them */
    uint32_t table_bytes; /* between metadata and body */
    shmrpc_block *blocks; /* goes with the message, but for leases that shmrpc_lease_take took */
} shmrpc_message;

/* A plain message: a request for a known method without metadata and other flags
 * than KEYWORDS, or a reply with status OK and no metadata to one of Python's calls. After
 * shmrpc_poller_brief_items also short items of one stream that follow each other. */
typedef struct shmrpc_brief {
    uint64_t conn_id;
    uint64_t call_id;
    uint64_t deadline_ns; /* as in shmrpc_message; ITEM: how long the last one is */
    int32_t method;       /* as in shmrpc_message; replies: -1; ITEM: how many they are */
    uint16_t kind;
    uint16_t flags;
    uint32_t start, end; /* where its body lies in the batch's bytes: right behind the one before */
} shmrpc_brief;

enum { SHMRPC_BATCH_BRIEFS = 256, SHMRPC_BATCH_BYTES = 65536 };

/* Map a new segment of ours for writing, before it is sealed and its descriptor goes to the peer.
 * Null and errno if that fails. */
void *shmrpc_segment_map(int fd, uint32_t ring_bytes);
void shmrpc_segment_unmap(void *segment, uint32_t ring_bytes);

/* How to reach the peer. When shmrpc_conn_add succeeds, control_fd, the bells and own_segment
 * belong to the poller; peer_segment_fd stays the caller's, who can close it. */
typedef struct shmrpc_conn_options {
    int control_fd;       /* stream socket to the peer */
    int own_bell_fd;      /* shm: eventfd that the peer rings; -1 = it rings by control_fd */
    int peer_bell_fd;     /* shm: eventfd that we ring; -1 = ring by control_fd */
    void *own_segment;    /* shm: from shmrpc_segment_map; stream: null */
    int peer_segment_fd;  /* shm: is mapped; stream: -1 */
    uint32_t own_ring_bytes;
    uint32_t peer_ring_bytes;
    uint32_t max_message_bytes;      /* that we accept */
    uint32_t peer_max_message_bytes; /* that the peer accepts */
    uint64_t arena_max_bytes;        /* of our blocks in shared memory; 0 = none */
    uint64_t peer_arena_max_bytes;   /* of the peer's */
    int peer_trusted;       /* same uid: its segment need not be sealed */
    int relative_deadlines; /* the peer's clock is not ours (tcp) */
} shmrpc_conn_options;

typedef struct shmrpc_stats {
    uint64_t spins_hit, spins_missed, yields, sleeps, wakeups_sent;
    uint64_t frames_received, frames_dropped, late_replies;
    uint64_t calls_started, calls_refused, calls_expired;
    uint64_t running, queued, conns, outbox_bytes;
    uint64_t calls_queued, queued_ns;  /* calls that have waited for a worker; how long, all together */
    uint64_t oldest_queued_ns;         /* how long the first of those that wait has waited */
    uint64_t ring_bytes, ring_used;    /* of all rings, both directions */
    uint64_t fullest_ring_percent;
} shmrpc_stats;

/* Blocks of one conn. */
typedef struct shmrpc_arena_stats {
    uint64_t max_bytes, bytes, used_bytes; /* our arena: allowed, there, in use */
    uint64_t lent_blocks, lent_bytes;      /* of that, what the peer has */
    uint64_t oldest_ns;                    /* how long it has had one of them */
    uint64_t loans, loan_bytes;            /* of that, what shmrpc_loan_new gave out here */
    uint64_t returned, returned_bytes;     /* of that, what came back in messages, and is in use */
    uint64_t peer_bytes;                   /* of the peer's arena, mapped here */
    uint64_t leases, leased_bytes;         /* what came in messages, of either arena, and is in use */
} shmrpc_arena_stats;
/* A request that runs. */
typedef struct shmrpc_running {
    uint64_t call_id, conn_id;
    uint64_t since_ns; /* CLOCK_MONOTONIC; 0: no longer than some milliseconds */
    uint64_t deadline_ns;
    int32_t method;
} shmrpc_running;

/* A method name as it goes into requests. */
typedef struct shmrpc_name {
    uint32_t bytes;
    char text[256];
} shmrpc_name;

/* Poller. `workers` = 0 for a client, which has one conn; else the number of requests that may run
 * at a time, and `max_concurrency` how many there may be before the next is refused. A request whose
 * thread waits for a call, an item or credit on this poller counts for the latter only.
 * `mode`: 0 auto, 1 spin, 2 block. Null and errno if it can't be made. */
shmrpc_poller *shmrpc_poller_new(uint32_t workers, uint32_t max_concurrency, uint32_t mode,
                                 uint32_t spin_budget_ns);
/* Give the poller up: closes and unmaps everything. No thread may be inside or come later. Slots
 * that are left may be freed afterwards: the order in which a garbage collector frees them does
 * not matter. */
void shmrpc_poller_free(shmrpc_poller *poller);
/* Its connection is over and everybody has been told: close and unmap as soon as the last slot of a
 * connection or worker is freed, also while something still refers to the poller. */
void shmrpc_poller_end(shmrpc_poller *poller);
/* Let a client serve requests as well: its workers take them, or threads that wait for replies. */
void shmrpc_poller_serve(shmrpc_poller *poller, uint32_t workers, uint32_t max_concurrency);
/* Let requests and notifications come as events, with message.method set, for one thread that does
 * all: an event loop. Nothing counts or bounds those that run but that thread itself. With
 * `reads_always` a conn is read also while much waits to be sent on it: that of a side that calls,
 * or two that only send would wait for each other. */
void shmrpc_poller_serve_events(shmrpc_poller *poller, int reads_always);
/* A descriptor that is readable while something waits for shmrpc_poll, after shmrpc_arm. */
int shmrpc_poller_fd(shmrpc_poller *poller);
/* Have plain messages put into a batch: SHMRPC_BATCH_BRIEFS briefs, and their bodies in
 * SHMRPC_BATCH_BYTES bytes. Both are the poller's. Null if there is no memory. With `is_event`
 * shmrpc_take gives them, as one message of kind SHMRPC_BRIEFS, else shmrpc_poll. */
shmrpc_brief *shmrpc_poller_batch(shmrpc_poller *poller, int is_event);
uint8_t *shmrpc_poller_batch_bytes(shmrpc_poller *poller);
/* Put short items of streams into the batch, too, for who cares for their bytes alone. */
void shmrpc_poller_brief_items(shmrpc_poller *poller);
/* Refuse new requests with UNAVAILABLE from now on; those running and queued go on. */
void shmrpc_poller_drain(shmrpc_poller *poller);
/* End every wait with SHMRPC_STOPPED, now and later, and cancel the requests that run. */
void shmrpc_poller_stop(shmrpc_poller *poller);
void shmrpc_poller_stats(shmrpc_poller *poller, shmrpc_stats *stats);
/* The requests that run in workers: how many were written, `count` at most (there may be more than
 * SHMRPC_RUNNING_MAX, which nobody looks through). */
uint32_t shmrpc_poller_running(shmrpc_poller *poller, shmrpc_running *running, uint32_t count);
/* counts[i] = how many requests for the method with index i were started; others stay. */
void shmrpc_method_counts(shmrpc_poller *poller, uint64_t *counts, uint32_t count);
/* Requests for `name` get message.method = index and, if fast, a count instead of SHMRPC_MESSAGE.
 * The empty name stands for every method that was not added. */
int shmrpc_method_add(shmrpc_poller *poller, const char *name, size_t name_bytes, int32_t index,
                      int fast);

/* Conn: its id (never 0), or -errno; on error the descriptors are still the caller's. */
int64_t shmrpc_conn_add(shmrpc_poller *poller, const shmrpc_conn_options *options);
/* End it as if the peer had hung up. Waiters get -EPIPE, the leader sees SHMRPC_CLOSED. */
int shmrpc_conn_shutdown(shmrpc_poller *poller, uint64_t conn_id);
/* After shmrpc_poller_drain and shmrpc_poller_stop, and before shmrpc_conn_shutdown: tell the peer
 * that its requests without a reply were not started and will not be. Not if one of them runs, or
 * ended without a reply: its outcome stays unknown, -EBUSY. */
int shmrpc_conn_goodbye(shmrpc_poller *poller, uint64_t conn_id);
/* The descriptors a poller holds (at most `count` are written): for a forked child to close. */
int shmrpc_poller_fds(shmrpc_poller *poller, int *fds, int count);
/* 0 while it lives, else the -errno that ended it. */
int shmrpc_conn_status(shmrpc_poller *poller, uint64_t conn_id);

/* Slot of one thread that calls; conn_id is the conn that its calls go to (0: none, it is for
 * events alone). Null if there is no memory or no such conn. */
shmrpc_slot *shmrpc_slot_new(shmrpc_poller *poller, uint64_t conn_id);
/* Slot of one thread that runs requests. */
shmrpc_slot *shmrpc_worker_new(shmrpc_poller *poller);
void shmrpc_slot_free(shmrpc_slot *slot);
shmrpc_message *shmrpc_slot_message(shmrpc_slot *slot);
/* Where bodies of short messages always lie, and how long they may be. */
uint8_t *shmrpc_slot_view(shmrpc_slot *slot);
uint64_t shmrpc_slot_view_bytes(shmrpc_slot *slot);

/* Send a request and wait for its reply. Returns the body's length if it has status OK, no
 * metadata and lies in the slot's view; SHMRPC_MESSAGE for any other reply. timeout_ns < 0: none.
 * In a thread that serves a request with a deadline, that deadline bounds the call as well. */
int64_t shmrpc_call(shmrpc_slot *slot, const shmrpc_name *name, const char *body,
                    size_t body_bytes, int64_t timeout_ns);
/* The same with flags and metadata. */
int64_t shmrpc_call_with(shmrpc_slot *slot, const shmrpc_name *name, uint32_t flags,
                         const char *metadata, size_t metadata_bytes, const char *body,
                         size_t body_bytes, int64_t timeout_ns);
/* Go on waiting after -EAGAIN, -EINTR, SHMRPC_EVENTS, SHMRPC_SPAWN or SHMRPC_QUEUED. */
int64_t shmrpc_wait(shmrpc_slot *slot);
/* Give up waiting; the peer is told. The reply, if it still comes, is dropped and counted. */
void shmrpc_abandon(shmrpc_slot *slot);

/* Send without waiting for a reply. `call_id` with SHMRPC_PYTHON_INDEX in its low 16 bits brings
 * the reply as an event. *position says where the frame lies, for shmrpc_outcome_of; it is
 * stored before the peer can see the frame, by another thread too. Returns 0, or 1 if part of it
 * waits in this process for room. */
int shmrpc_send(shmrpc_slot *slot, uint32_t kind, uint32_t flags, uint64_t call_id,
                const shmrpc_name *name, uint32_t status, const char *metadata,
                size_t metadata_bytes, const char *body, size_t body_bytes, uint64_t deadline_ns,
                uint64_t *position);
/* The ways of plain messages: shmrpc_send for a REQUEST with no deadline but the inherited one, and
 * for a REPLY with status OK. The former returns -errno, or four times the request's position, plus
 * 2 if there was a deadline, plus 1 if part of it waits in this process for room. */
int64_t shmrpc_send_request(shmrpc_slot *slot, uint64_t call_id, const shmrpc_name *name,
                            const char *body, size_t body_bytes);
int shmrpc_send_reply(shmrpc_slot *slot, uint64_t call_id, const char *body, size_t body_bytes);
/* Send one small ITEM: shmrpc_send for the way that every message of a stream takes. */
int shmrpc_send_item(shmrpc_slot *slot, uint32_t flags, uint64_t call_id, const char *body,
                     size_t body_bytes);
/* Wait until what was sent has left this process: 0 or -errno as shmrpc_call. */
int64_t shmrpc_flush(shmrpc_slot *slot, int64_t timeout_ns);
/* For an event loop: 0 if all that was sent on the slot's conn has left this process, else 1, and
 * SHMRPC_ROOM comes as an event when it has. */
int shmrpc_want_room(shmrpc_slot *slot);
/* Wait until there are events: SHMRPC_EVENTS, or 0 after shmrpc_poke, or -errno. timeout_ns 0
 * looks once. */
int64_t shmrpc_wait_events(shmrpc_slot *slot, int64_t timeout_ns);
/* For an event loop, in its one thread: take what is there, or comes within spin_ns if the policy
 * thinks that spinning pays. The number of briefs in the batch, which are older than any event, and
 * above its 16 bits how many bytes their bodies have; SHMRPC_EVENTS, 0 if nothing came after
 * spinning or -EAGAIN without. */
int64_t shmrpc_poll(shmrpc_slot *slot, uint32_t spin_ns);
/* When the batch was taken, before the loop does anything else: let the peers see what was sent
 * meanwhile by shmrpc_send_request and shmrpc_send_reply. */
void shmrpc_publish(shmrpc_poller *poller);
/* Not 0 while spinning would not pay: then who is busy does better to arm than to poll again in
 * between, and who sends by shmrpc_send_item need not poll for an answer. The poller's. */
const uint8_t *shmrpc_poller_rests(shmrpc_poller *poller);
/* Ask to be woken through shmrpc_poller_fd: 1, or 0 if there is something to poll instead. */
int shmrpc_arm(shmrpc_slot *slot);
/* End the wait of another thread's slot in shmrpc_wait_events with 0. */
void shmrpc_poke(shmrpc_slot *slot);
/* Next event into the slot: 1, or 0 if there is none. The one taken before is over, and so is what
 * a batch had. */
int shmrpc_take(shmrpc_slot *slot);
/* What became of a call that was sent by shmrpc_send on the slot's conn: enum shmrpc_outcome. */
int shmrpc_outcome_of(shmrpc_slot *slot, uint64_t call_id, uint64_t position);

/* Worker: wait for the next request. Returns its body's length with message.method set if the
 * method is fast; SHMRPC_MESSAGE for other requests, notifications and CLOSED. */
int64_t shmrpc_next(shmrpc_slot *slot);
/* After SHMRPC_QUEUED: start the next queued request in a worker's slot, in the thread that waits
 * with another: SHMRPC_MESSAGE, or 0 if somebody else took it. Then, in the same thread,
 * shmrpc_finish; then go on waiting. */
int64_t shmrpc_next_queued(shmrpc_slot *slot);
/* The slot's request is over: shmrpc_next does the same. One that has no reply gets one without a
 * body: status 1 (CANCELLED), or 4 after its deadline; not if its caller has cancelled it, nor the
 * former after shmrpc_poller_drain. */
void shmrpc_finish(shmrpc_slot *slot);
/* Let another thread serve the request that shmrpc_next_queued has started in this one: a stream,
 * which may depend on what this thread does next. The other thread calls shmrpc_adopt first. */
void shmrpc_disown(shmrpc_slot *slot);
void shmrpc_adopt(shmrpc_slot *slot);
/* Absolute deadline of the request that this thread serves; 0 = none. */
uint64_t shmrpc_inherited_deadline(void);
/* Metadata that goes with the reply to the slot's request, whatever it will be; an error for which
 * it leaves no room goes without. Copied. Nothing happens if there is no request, or a reply. */
int shmrpc_reply_metadata(shmrpc_slot *slot, const char *metadata, size_t metadata_bytes);
/* Reply OK to the slot's request, then shmrpc_next. -EMSGSIZE: not sent, reply otherwise. */
int64_t shmrpc_reply_next(shmrpc_slot *slot, const char *body, size_t body_bytes);
/* Reply to the slot's request; once. */
int shmrpc_reply(shmrpc_slot *slot, uint32_t status, const char *body, size_t body_bytes);
/* ---- passing on: requests of one poller as calls on another, for who stands between ---- */

/* Pass the request that `worker` serves in this thread on, from where it lies, as a call on the slot's
 * conn, which is of another poller: the same method, flags, metadata, body and buffers, and the
 * earlier of its deadline and timeout_ns. Buffers are copied once, into the arena of the slot's conn
 * if they were not short, unless shmrpc_attach was called before. As shmrpc_call_with; SHMRPC_GROW or
 * SHMRPC_FULL if a buffer finds no room: nothing was sent, attach them and repeat; -ECANCELED when the
 * request is cancelled or its caller is gone: then the peer is told. */
int64_t shmrpc_forward(shmrpc_slot *slot, shmrpc_slot *worker, int64_t timeout_ns);
/* Reply to the worker's request what `slot` has received after shmrpc_forward, from where it lies:
 * status, metadata, body and buffers, as above; but what comes back of the request's buffers is not
 * copied, it is the caller's own. Gives the request's buffers back before, and the reply's after that. */
int shmrpc_reply_from(shmrpc_slot *worker, shmrpc_slot *slot);

/* What one worker has counted of the calls that it has passed on by a way. */
typedef struct shmrpc_tally {
    uint64_t codes[17];   /* that have ended, by status */
    uint64_t buckets[40]; /* the same, by the bit length of their nanoseconds */
    uint64_t nanoseconds; /* all together */
    uint64_t running;     /* that have not */
} shmrpc_tally;

/* A worker's ways: from now on its shmrpc_pass passes unary calls of this method on, by shmrpc_forward
 * with this slot and timeout, and sends back what comes. The slot is for this alone, and stays, as
 * the tally does, until shmrpc_ways_clear. In the worker's thread. `epoch` is shmrpc_ways_epoch from
 * before it was looked up where the way goes. 0, -EINVAL, -ENOMEM; -ESTALE if ways of that time, or
 * others that the worker has, are not valid any more. */
int shmrpc_way_add(shmrpc_slot *worker, const char *name, size_t name_bytes, shmrpc_slot *slot,
                   int64_t timeout_ns, shmrpc_tally *tally, uint64_t epoch);
uint64_t shmrpc_ways_epoch(shmrpc_poller *poller);
void shmrpc_ways_clear(shmrpc_slot *worker);
/* As shmrpc_next, but it comes back only with what goes no way; not with a peer's that serves, whose
 * calls may be called back. SHMRPC_PASSING: a call that went one ended with anything but a reply
 * that could be sent back; see shmrpc_passing. -ESTALE: after shmrpc_ways_renew; clear. */
int64_t shmrpc_pass(shmrpc_slot *worker);
/* After SHMRPC_PASSING: the result of shmrpc_forward. *since_ns is when it was called. */
int64_t shmrpc_passing(shmrpc_slot *worker, uint64_t *since_ns);
/* Make the ways of all workers invalid: none of them passes anything on by one from now on, and
 * each comes back from shmrpc_pass soon. */
void shmrpc_ways_renew(shmrpc_poller *poller);
/* How many calls are under way by ways that were made invalid. */
uint32_t shmrpc_ways_stale(shmrpc_poller *poller);
/* Whether the caller of the worker's request has said that it serves (SHMRPC_SERVES). */
int shmrpc_caller_serves(shmrpc_slot *worker);

/* ---- blocks: large buffers beside a message's body ----
 *
 * A value's buffers travel in blocks of their sender's arena, which the receiver reads where they
 * lie and gives back when it has let go of them. Over sockets, and where the arena can't hold them,
 * they follow the body, so that users see no difference.
 */

/* The next message sent with this slot (by shmrpc_call_with, shmrpc_send, shmrpc_send_item,
 * shmrpc_reply) has SHMRPC_FLAG_BLOCKS, and carries this buffer beside its body, after those
 * attached before. Null begins anew, with none. A buffer in a loan of the conn's arena is sent as
 * it is; so is one in a block that came on this conn, whether it is the peer's or has come back; any other is copied into the arena, or, if it goes with the body, when the message is
 * sent: it has to stay until then. 0; 1 if it goes with the body; 2 if it lies in a loan; SHMRPC_GROW,
 * SHMRPC_FULL, -ENOMEM, -EMSGSIZE. */
int shmrpc_attach(shmrpc_slot *slot, const void *data, uint64_t bytes);
/* The same, but it goes with the body: 1, -ENOMEM, -EMSGSIZE. */
int shmrpc_attach_inline(shmrpc_slot *slot, const void *data, uint64_t bytes);
/* As shmrpc_attach, for a buffer that is going into a block at once or not at all: its number among
 * those attached, with SHMRPC_LOANED if it lies in a loan. Below 0 if that can't be done without
 * waiting or growing, and then none is attached any more. */
int shmrpc_attach_now(shmrpc_slot *slot, const void *data, uint64_t bytes);
/* There will be no such message. */
void shmrpc_detach(shmrpc_slot *slot);
/* What the attached buffers add to an item's size where streams count bytes: all of what goes with
 * the body, a 32nd of what lies in blocks. */
uint64_t shmrpc_attached_weight(shmrpc_slot *slot);
/* The same of a message that was received. */
uint64_t shmrpc_message_weight(const shmrpc_message *message);

/* Take a block's lease out of the slot's message: null if it has none. */
shmrpc_lease *shmrpc_lease_take(shmrpc_slot *slot, uint32_t index);
/* Nothing uses the block any more: give it back, without a system call unless its owner waits for
 * it. Any thread, any time, also after the conn and the poller are gone; in a forked child it only
 * lets go of the memory. `data` is ignored: it makes this fit as a finalizer of the data. */
void shmrpc_lease_free(shmrpc_lease *lease, const void *data);

/* Memory in the arena of the slot's conn, for who wants to send what it writes there without a
 * copy: 0, SHMRPC_GROW, SHMRPC_FULL, -ENOMEM, or -EOPNOTSUPP if there is no arena that could hold
 * it. It can be sent any number of times. */
int shmrpc_loan_new(shmrpc_slot *slot, uint64_t bytes, shmrpc_loan **loan, uint8_t **data);
/* As shmrpc_lease_free. The peer may have the block still. Returns 1 if somebody in this process
 * waits for room in the arena, who is to be told by shmrpc_tell_blocks, else 0. */
int shmrpc_loan_free(shmrpc_loan *loan, const void *data);

/* After SHMRPC_GROW: how large a segment to add for a buffer of this size; 0: none any more. */
uint64_t shmrpc_arena_wants(shmrpc_slot *slot, uint64_t bytes);
/* Map a new segment of ours for writing, before it is sealed: null and errno if that fails. */
void *shmrpc_memory_map(int fd, uint64_t bytes);
void shmrpc_memory_unmap(void *memory);
/* Add it to the arena of the slot's conn, and pass the descriptor on. 0; the memory is the conn's
 * then. Or -errno, also if the peer can't take a descriptor now. */
int shmrpc_arena_add(shmrpc_slot *slot, void *memory, int peer_fd);
/* Wait until a buffer of this size may fit, as shmrpc_flush waits for the outbox. timeout_ns 0 takes
 * in what the peer has given back, and looks once. */
int64_t shmrpc_wait_blocks(shmrpc_slot *slot, uint64_t bytes, int64_t timeout_ns);
/* For an event loop: 0 if it may fit now, else 1, and SHMRPC_ROOM comes as an event. */
int shmrpc_want_blocks(shmrpc_slot *slot, uint64_t bytes);
/* Who waits for room in this conn's arena looks again. Any thread; nothing if the conn is gone. */
void shmrpc_tell_blocks(shmrpc_poller *poller, uint64_t conn_id);
/* Give segments back to the system of which nothing was in use for so long, and have read what the peer
 * has given back without a bell. Returns how many bytes our arena and the peer's have left, or -EPIPE. */
int64_t shmrpc_arena_trim(shmrpc_poller *poller, uint64_t conn_id, uint64_t quiet_ns);
/* 0 or -EPIPE. */
int shmrpc_arena_stats_of(shmrpc_poller *poller, uint64_t conn_id, shmrpc_arena_stats *stats);

/* Bare rings, without calls, threads or sleeping: the floor that benchmarks compare with. The
 * memory holds two segments; side 0 or 1. */
typedef struct shmrpc_bare shmrpc_bare;
size_t shmrpc_bare_bytes(uint32_t ring_bytes);
shmrpc_bare *shmrpc_bare_new(void *memory, uint32_t ring_bytes, int side);
void shmrpc_bare_free(shmrpc_bare *bare);
int shmrpc_bare_send(shmrpc_bare *bare, const char *body, size_t body_bytes);
int64_t shmrpc_bare_receive(shmrpc_bare *bare, uint8_t *body, size_t capacity);

/* cffi: end */

/* For programs that hold a lock of their own (Python's) around some of the calls above: whether this
 * thread has it, and to let go of it, which is done before each wait that is no short spin. To be
 * set before any of them. */
void shmrpc_use_lock(int (*held)(void), void (*release)(void));

#endif
