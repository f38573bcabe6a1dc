/* layout.h - what is in shared memory: one segment per side, written by that side alone.
 *
 * A connection has two segments. Each side maps its own read-write and the peer's read-only, so
 * every word below has exactly one writer, and no word of ours can be forged by the peer.
 *
 *   byte  word               written by the owner                 read by the peer
 *   ----  -----------------  -----------------------------------  --------------------------------
 *      0  magic, version     once, before the descriptor leaves   once, when it attaches
 *    128  tail               end of the frames it has sent        to find new frames
 *    256  head               end of the peer's frames it took     to find free space, and after
 *                                                                 the owner's death what it took
 *    384  arm                epoch << 1 | asleep                  after publishing, to ring
 *    392  space              position << 1 | wanted               after freeing space, to ring
 *    400  wants              1 while it waits for its blocks      after giving one back, to ring
 *    512  queued[448]        calls taken but not started yet      only after the owner's death
 *   4096  ring[ring_bytes]   frames                               frames
 *
 * Rule 1: tail and head count bytes from the start of the connection and never wrap; the offset in
 *         the ring is `index & (ring_bytes - 1)`; used space is `tail - head`, always <= ring_bytes.
 * Rule 2: sizes are agreed on the socket and kept in private memory. Nothing in a segment says how
 *         large anything is, so nothing the peer writes there can move us out of bounds.
 * Rule 3: every word of the peer's is loaded once into a local, checked, and only the local used.
 * Rule 4: a frame's header starts at a multiple of 8; header and payload may continue at the
 *         ring's start. A frame is visible when `tail` has passed its end, never in part.
 */
#ifndef SHMRPC_LAYOUT_H
#define SHMRPC_LAYOUT_H

#include <stddef.h>

#include "atomics.h"

#define LAYOUT_MAGIC 0x31637072u /* "rpc1" */
#define LAYOUT_VERSION 1u
#define LAYOUT_HEADER_BYTES 4096u
#define LAYOUT_QUEUED_MAX 448u
#define LAYOUT_FRAME_ALIGN 8u

struct segment_shm {
    uint32_t magic;
    uint32_t version;
    uint8_t pad0[120];

    atomic_u64 tail; /* W: owner, as producer. R: peer (acquire, fence B/C). Own line. */
    uint8_t pad1[120];

    atomic_u64 head; /* W: owner, as consumer of the peer's ring. R: peer (fence D/A). Own line. */
    uint8_t pad2[120];

    atomic_u64 arm;   /* W: owner, when it goes to sleep and wakes. R: peer (fence E/F). */
    atomic_u64 space; /* W: owner, when its frames did not fit. R: peer (fence G/H). */
    atomic_u64 wants; /* W: owner, when its arena is full. R: peer (fence E/F). All three are */
    uint8_t pad3[104]; /* rare and share a line that stays clean in the peer's cache. */

    atomic_u64 queued[LAYOUT_QUEUED_MAX]; /* W: owner. R: peer, after the owner's death. */

    uint8_t ring[]; /* W: owner. R: peer, between head and tail. */
};

_Static_assert(offsetof(struct segment_shm, magic) == 0, "layout diagram");
_Static_assert(offsetof(struct segment_shm, version) == 4, "layout diagram");
_Static_assert(offsetof(struct segment_shm, tail) == 128, "layout diagram");
_Static_assert(offsetof(struct segment_shm, head) == 256, "layout diagram");
_Static_assert(offsetof(struct segment_shm, arm) == 384, "layout diagram");
_Static_assert(offsetof(struct segment_shm, space) == 392, "layout diagram");
_Static_assert(offsetof(struct segment_shm, wants) == 400, "layout diagram");
_Static_assert(offsetof(struct segment_shm, queued) == 512, "layout diagram");
_Static_assert(offsetof(struct segment_shm, ring) == LAYOUT_HEADER_BYTES, "layout diagram");
_Static_assert(sizeof(struct segment_shm) == LAYOUT_HEADER_BYTES, "layout diagram");

/* A frame: this header, then `length` payload bytes, then zero to seven bytes of padding.
 *
 *   byte  field
 *      0  length          u32  payload bytes in this frame
 *      4  kind            u8   enum shmrpc_kind
 *      5  flags           u8   SHMRPC_FLAG_*
 *      6  method_bytes    u16  requests: length of the method name; replies: status (gRPC number)
 *      8  call_id         u64  chosen by the caller, echoed in the reply
 *     16  deadline_ns     u64  absolute CLOCK_MONOTONIC (relative on tcp); 0 = none
 *     24  metadata_bytes  u32  length of the metadata
 *     28  total_bytes     u32  payload bytes of the whole message (more than length if in pieces)
 *     32  payload: method name, metadata, body
 *
 * A message longer than one frame may carry goes out as a first frame with FLAG_MORE and CONTINUE
 * frames, nothing between them on that connection; the last has no FLAG_MORE.
 */
struct frame_header {
    uint32_t length;
    uint8_t kind;
    uint8_t flags;
    uint16_t method_bytes;
    uint64_t call_id;
    uint64_t deadline_ns;
    uint32_t metadata_bytes;
    uint32_t total_bytes;
};

#define FRAME_HEADER_BYTES 32u

_Static_assert(sizeof(struct frame_header) == FRAME_HEADER_BYTES, "frame diagram");
_Static_assert(offsetof(struct frame_header, kind) == 4, "frame diagram");
_Static_assert(offsetof(struct frame_header, flags) == 5, "frame diagram");
_Static_assert(offsetof(struct frame_header, method_bytes) == 6, "frame diagram");
_Static_assert(offsetof(struct frame_header, call_id) == 8, "frame diagram");
_Static_assert(offsetof(struct frame_header, deadline_ns) == 16, "frame diagram");
_Static_assert(offsetof(struct frame_header, metadata_bytes) == 24, "frame diagram");
_Static_assert(offsetof(struct frame_header, total_bytes) == 28, "frame diagram");

/* The block table before the body of a message with SHMRPC_FLAG_BLOCKS: this, then `count` entries.
 * The bytes of entries in segment BLOCK_INLINE follow the body, in order; their offset, index,
 * generation and owner are 0. An entry of BLOCK_YOURS is a part of a block of the receiver's, which
 * the sender has at this moment: the receiver reads it where it wrote it.
 */
struct block_table {
    uint32_t count;
    uint32_t reserved; /* 0 */
};

struct block_entry {
    uint64_t offset; /* in the segment */
    uint64_t bytes;
    uint32_t segment; /* number, as its record on the control socket gave it */
    uint32_t index, generation; /* by which it is given back */
    uint32_t owner; /* BLOCK_MINE, BLOCK_YOURS */
};

#define BLOCK_TABLE_BYTES 8u
#define BLOCK_ENTRY_BYTES 32u
#define BLOCK_INLINE UINT32_MAX
#define BLOCK_MINE 0u
#define BLOCK_YOURS 1u

_Static_assert(sizeof(struct block_table) == BLOCK_TABLE_BYTES, "block table");
_Static_assert(sizeof(struct block_entry) == BLOCK_ENTRY_BYTES, "block table");

/* One block in the payload of RETURN. With index BLOCK_INLINE the segment `generation` that was
 * withdrawn is let go. */
struct block_name {
    uint32_t index, generation;
};

/* A further segment, sent over the control socket with its descriptor. Bells on the same socket
 * are bytes of any other value than a record's first. */
struct memory_record {
    uint8_t mark; /* MEMORY_MARK */
    uint8_t reserved[3];
    uint32_t number;
    uint64_t bytes;
};

#define MEMORY_MARK 1u
#define MEMORY_RECORD_BYTES 16u

_Static_assert(sizeof(struct memory_record) == MEMORY_RECORD_BYTES, "memory record");

/* Bytes that a frame with this payload length takes in a ring. */
static inline uint64_t frame_span(uint32_t length)
{
    return ((uint64_t)FRAME_HEADER_BYTES + length + (LAYOUT_FRAME_ALIGN - 1)) &
           ~(uint64_t)(LAYOUT_FRAME_ALIGN - 1);
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian and copied as they lie in memory"
#endif

#endif
