/* stream.h - frames over a stream socket, with the same contract as a ring.
 *
 * Frames lie back to back, without padding. What the kernel does not take of a frame is kept here,
 * so that a frame is accepted whole or not at all.
 */
#ifndef SHMRPC_STREAM_H
#define SHMRPC_STREAM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "layout.h"

enum { STREAM_BUFFER_BYTES = 65536, STREAM_PARTS_MAX = 5 };
#define STREAM_FRAME_MAX (STREAM_BUFFER_BYTES - FRAME_HEADER_BYTES)

struct stream {
    int fd;
    uint8_t *in;     /* received: [in_start, in_end) is not consumed yet */
    uint8_t *out;    /* accepted: [out_start, out_end) is not with the kernel yet */
    uint32_t in_start, in_end;
    uint32_t out_start, out_end;
    bool readable; /* the socket may have more than we read */
    bool ended;    /* the peer has closed its end */
};

int stream_init(struct stream *stream, int fd);
void stream_free(struct stream *stream);

/* As ring_push. -EAGAIN, or -EPIPE when the peer is gone. */
int stream_push(struct stream *stream, const struct frame_header *header,
                const struct iovec *parts, int part_count);
/* Hand kept bytes to the kernel: 0 when none are left, -EAGAIN, -EPIPE. */
int stream_flush(struct stream *stream);
/* As ring_peek; reads from the socket at most once, and only if it may be readable. */
int stream_peek(struct stream *stream, struct frame_header *header);
/* Block until there is something to read, and read it. 0, -EINTR, or -EPIPE at the end. */
int stream_wait(struct stream *stream);
void stream_read(const struct stream *stream, uint64_t offset, void *destination, uint64_t count);
void stream_release(struct stream *stream, uint32_t length);

#endif
