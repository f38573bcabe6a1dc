/* conn.h - one connection: rings or a stream underneath, messages above.
 *
 * Sending is for any thread (send_lock); receiving is for the thread that leads the poller.
 * Sending never blocks: what does not fit now goes to the outbox, a queue of ready-made frames in
 * private memory that whoever leads flushes when there is room.
 */
#ifndef SHMRPC_CONN_H
#define SHMRPC_CONN_H

#include <pthread.h>
#include <stdbool.h>

#include "lending.h"
#include "ring.h"
#include "shmrpc.h"
#include "stream.h"
#include "wake.h"

struct outbox {
    uint8_t *frames; /* [start, end): header and payload of each frame, no padding */
    size_t start, end, capacity;
    uint64_t span; /* what its frames will take in the ring */
};

/* A message that arrives in pieces. */
struct partial {
    struct frame_header header; /* of its first frame */
    uint8_t *payload;
    uint32_t received, capacity;
};

struct conn {
    uint64_t id;
    bool is_shm;
    bool hot;    /* leader: in the poller's list of conns to poll */
    bool in_held;           /* leader: in the poller's list of conns that hold, */
    uint32_t held;          /* leader: so many messages */
    struct conn *next_held; /* leader */
    bool hung_up; /* leader: the peer is gone, its last frames are still to be read */
    int control_error; /* leader: 0, or the -errno that reading the control socket ended with */
    atomic_u64 error; /* 0, or the errno that ended it */
    atomic_u64 ended_here; /* we ended it, the peer may live */
    atomic_u64 said_goodbye; /* W: leader: the peer starts none of our requests any more */
    atomic_u64 serves;       /* W: leader: the peer has said that it takes requests */
    uint32_t references; /* poller lock: registry, slots, running and queued requests */
    bool destroyed;      /* poller lock: the poller was given up, only this struct is left */
    atomic_u64 queued;   /* W: under the poller's lock: requests taken and not started */

    struct ring_producer producer;
    struct ring_consumer consumer;
    uint64_t space_checked; /* leader: our head when we last looked whether the peer wants space */
    struct wake wake;
    struct stream stream;
    struct partial partial;
    struct received_blocks received; /* leader: of the message just received */
    struct lending *lending; /* null without shared memory */
    uint64_t returns_unread; /* lending->lock: bytes of them since the peer was told to read them */

    pthread_mutex_t send_lock; /* producer, stream.out*, outbox */
    struct outbox outbox;
    atomic_u64 outbox_bytes; /* W: holder of send_lock. R: anyone, as a hint */

    int control_fd, own_bell_fd;
    uint32_t own_ring_bytes, peer_ring_bytes;
    uint32_t max_message_bytes, peer_max_message_bytes;
    uint32_t frame_max; /* longest payload of a frame that we send */
    bool relative_deadlines;
    bool wants_room;   /* send_lock: asked to be woken when there is room */
    bool ignores_input; /* send_lock: a stream that is full: its input does not wake us */
    bool tells_room;   /* poller lock: an event is wanted when the outbox is empty, */
    bool tells_blocks; /* poller lock: or when blocks of ours have come back */
    bool unanswered;   /* poller lock: a request of it ended without a reply */
    bool resumed;      /* poller lock: was full of queued requests, and is not any more */
    uint64_t pushed; /* send_lock: ring space of all frames that left so far */
    int epoll_fd;
    uint64_t epoll_data; /* of control_fd in epoll */
    uint64_t last_active_ns;   /* leader */
    atomic_u64 last_send_tick; /* coarse clock at the last conn_hung_up */
};

/* What a message is made of, for sending. */
struct outgoing {
    struct frame_header header; /* length and total_bytes are filled in */
    struct iovec parts[3];      /* method name, metadata, body */
    uint64_t block_bytes;       /* beside them, in blocks */
};

int conn_init(struct conn *conn, const shmrpc_conn_options *options, int epoll_fd);
/* Closes and unmaps. */
void conn_destroy(struct conn *conn);
/* The same for a conn that came to nothing: what the caller gave stays the caller's. */
void conn_abandon(struct conn *conn);

/* Whether the peer has hung up: a system call. */
bool conn_peer_left(struct conn *conn);
/* Whether the peer is known or, after a pause of some milliseconds, found to have hung up. */
bool conn_hung_up(struct conn *conn);
/* Send a message: 0 if it left, 1 if some of it waits in the outbox, -EMSGSIZE, -ENOMEM, -EPIPE,
 * -EPROTO. *position is where its last frame starts in the ring, see conn_outcome; it is stored before
 * the peer can see the message.
 * Adds the bells it rang to *bells. */
int conn_send(struct conn *conn, struct outgoing *message, atomic_u64 *position, uint64_t *bells);
/* For a thread that sends several messages at once: between conn_hold and conn_publish those of
 * conn_send_held lie in the ring and the peer does not see them, unless another message follows
 * them. */
void conn_hold(struct conn *conn);
int conn_send_held(struct conn *conn, struct outgoing *message, atomic_u64 *position);
void conn_publish(struct conn *conn, bool holds_on, uint64_t *bells);
/* Give a block back to the peer, or tell it that a segment is let go; rings only if it waits for that.
 * Called with the lending's lock held. */
void conn_return(struct conn *conn, struct block_name name);
/* Tell the peer that a segment of ours goes: 0, or -errno. */
int conn_withdraw(struct conn *conn, uint32_t number);
/* Send what waits in the outbox as far as there is room: 0, or -errno. */
int conn_flush(struct conn *conn, uint64_t *bells);

/* Streams: whether input wakes the leader. Not while we don't read it: epoll would never sleep. */
void conn_watch_input(struct conn *conn, bool watch);

/* Next complete message: 1 with its header (length is that of its last frame), 0 if there is none yet, -EPROTO, -EPIPE. Its payload
 * stays where it is until conn_finish. Takes at most CONN_PIECES_MAX pieces at a time. */
int conn_receive(struct conn *conn, struct frame_header *header, uint64_t *bells);
/* Copy the payload of the message just received. */
void conn_read(const struct conn *conn, uint32_t total, void *destination);
/* Take over the payload if it is in private memory already (it came in pieces), else null. */
uint8_t *conn_take_payload(struct conn *conn);
/* Take over the blocks that came with it. */
void conn_take_blocks(struct conn *conn, shmrpc_message *message);
void blocks_free(shmrpc_block *blocks, uint32_t count);
/* Leader: read the control socket of a ring. */
void conn_read_control(struct conn *conn);
/* Consume it, and give back the blocks that nobody took; on a ring the peer sees now that we took it. */
void conn_finish(struct conn *conn, uint32_t length, uint64_t *bells);

/* After the peer's death: what became of a call whose request ended at `position`. */
int conn_outcome(struct conn *conn, uint64_t call_id, uint64_t position);

enum { CONN_PIECES_MAX = 64 };

#endif
