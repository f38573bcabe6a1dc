/* lending.h - blocks that travel beside messages: ours that the peer has, the peer's that we have.
 *
 *   sender                                        receiver
 *
 *   block of its arena, written
 *   frame with a block table        --- ring -->  leases: pointers into the sender's segment
 *                                                 ... used for as long as somebody likes ...
 *   the block is free again         <-- ring ---  the last use is over: frame RETURN
 *
 *   a further segment: descriptor   -- socket ->  mapped, descriptor closed
 *   nothing of it in use for long:
 *   frame WITHDRAW                  --- ring -->  let go
 *   unmapped, counts no more        <-- ring ---  RETURN that says so
 *
 * A lease is freed by whatever thread drops the last view of it, perhaps in a garbage collector's
 * finalizer, while the conn or all of shmrpc is gone. So what leases and loans need is here, apart
 * from the conn, and lives as long as one of them. Its lock and the send lock are held for moments,
 * by code that waits for nothing and calls nobody back; a finalizer may wait for them. A forked
 * child touches neither: it only lets go of mappings.
 *
 * RETURN rings no bell unless the owner's `wants` says that it waits: E and F in wake.h pair for that
 * word as they do for `arm`, which the owner writes after it.
 */
#ifndef SHMRPC_LENDING_H
#define SHMRPC_LENDING_H

#include <pthread.h>
#include <stdbool.h>

#include "arena.h"
#include "copy.h"
#include "segment.h"
#include "shmrpc.h"

struct conn;

enum {
    BLOCK_BYTES_MIN = 4096,    /* shorter buffers go with the body */
    BLOCKS_MAX = 1 << 16,      /* in one message */
    SEGMENT_STEP = 64 << 10,   /* sizes of segments are multiples of it */
    SEGMENT_BYTES_MIN = 1 << 20, /* unless the limit is smaller */
    SEGMENT_BYTES_SMALL = 64 << 20, /* up to which the arena doubles each time */
};

struct lending {
    pthread_mutex_t lock;
    atomic_u64 references; /* the conn, each lease, each loan */
    uint64_t forks;        /* in the process that made it */
    struct conn *conn;     /* lock: null after its end */

    struct arena arena; /* lock */
    struct memory *own[ARENA_SEGMENTS_MAX]; /* lock: as arena.segments */
    struct copier copier;
    uint64_t own_max;
    uint32_t own_next;          /* lock: number of the next segment */
    shmrpc_loan *loans;         /* lock: all there are */
    shmrpc_lease *leases;       /* lock: all there are, the latest first */
    uint64_t loan_count, loan_bytes; /* lock */
    uint64_t back_count, back_bytes; /* lock: leases on blocks of ours */
    atomic_u64 wanted;          /* somebody waits for room */

    struct {
        struct memory *memory;
        uint32_t number;
    } peer[ARENA_SEGMENTS_MAX]; /* leader */
    uint32_t peer_count, peer_next; /* leader */
    uint64_t peer_max;
    atomic_u64 peer_bytes; /* W: leader */
    atomic_u64 lease_count, lease_bytes;
    bool peer_trusted;

    struct memory_record record; /* leader: what has come of one on the control socket, */
    uint32_t record_bytes;       /* leader: so many bytes, */
    int record_fd;               /* leader: and its descriptor, or -1 */
};

/* A block, or a part of one, that a message has brought: the peer's, or one of ours that has come
 * back in a message. */
struct shmrpc_lease {
    struct lending *lending;
    struct memory *memory;
    const uint8_t *data;
    struct block_entry entry; /* owner: whose it is, seen from the peer */
    uint32_t uses;            /* lock: of the user, and of messages that are about to be sent */
    shmrpc_lease *previous, *next; /* lock */
};

struct shmrpc_loan {
    struct lending *lending;
    struct memory *memory;
    struct arena_place place;
    shmrpc_loan *previous, *next;
};

/* Buffers of a message, being received. */
struct received_blocks {
    shmrpc_block *blocks; /* malloc */
    uint32_t count, table_bytes;
    uint64_t inline_bytes, block_bytes;
};

/* Null if there is no memory. */
struct lending *lending_new(struct conn *conn, uint64_t own_max, uint64_t peer_max, bool trusted);
/* The conn ends, and with it the arena. */
void lending_end(struct lending *lending);

/* Leader: read the control socket, where bells and segments come. 0, -EPIPE, -EPROTO. */
int lending_read_control(struct lending *lending, int control_fd);
/* Leader: the mapping of the peer's segment with this number, or null. */
struct memory *lending_peer_memory(const struct lending *lending, uint32_t number);
/* Leader: blocks of ours have come back. 0 or -EPROTO. */
int lending_returned(struct lending *lending, const struct block_name *names, uint32_t count,
                     uint64_t now_ns);
/* Leader: the peer withdraws a segment. 0, -EPROTO if there is none, -EBUSY if somebody reads it. */
int lending_withdrawn(struct lending *lending, uint32_t number);

/* A lease on this block of the peer's that lies in this memory: 0 or -ENOMEM. */
int lending_lease(struct lending *lending, struct memory *memory, const struct block_entry *entry,
                  shmrpc_block *block);
/* A lease on a block of ours that the peer has, and sends: 0, -EPROTO or -ENOMEM. */
int lending_reclaim(struct lending *lending, const struct block_entry *entry,
                    shmrpc_block *block);
/* With the lock held: one of the latest leases, in which these bytes lie, or null. */
shmrpc_lease *lending_find_lease(const struct lending *lending, const uint8_t *data,
                                 uint64_t bytes);

/* ---- ours; with the lock held ---- */

/* Add a mapping, and pass its descriptor on. */
int lending_add(struct lending *lending, struct memory *memory, int peer_fd, uint64_t now_ns);
/* How large the next segment should be for a buffer of this size; 0 if there may be none. */
uint64_t lending_wants(const struct lending *lending, uint64_t bytes);
/* Whether a buffer of this size fits, or a segment for it may be added. */
bool lending_has_room(const struct lending *lending, uint64_t bytes);
/* Whether it could ever fit. */
bool lending_allows(const struct lending *lending, uint64_t bytes);
/* Withdraw the segments that were idle for so long. */
void lending_withdraw(struct lending *lending, uint64_t now_ns, uint64_t quiet_ns);

#endif
