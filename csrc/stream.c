/* stream.c - see stream.h. */
#include "stream.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

int stream_init(struct stream *stream, int fd)
{
    *stream = (struct stream){.fd = fd, .readable = true};
    /* Every call says itself whether it may block; this flag would answer for all. */
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    /* So that a blocking recv in a main thread ends now and then, as the sleeps in lead.c do. */
    const struct timeval tick = {.tv_usec = 50000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof tick);
    stream->in = malloc(STREAM_BUFFER_BYTES);
    stream->out = malloc(STREAM_BUFFER_BYTES);
    if (stream->in == NULL || stream->out == NULL) {
        stream_free(stream);
        return -ENOMEM;
    }
    return 0;
}

void stream_free(struct stream *stream)
{
    free(stream->in);
    free(stream->out);
    stream->in = stream->out = NULL;
}

static int from_errno(int error)
{
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR ? -EAGAIN : -EPIPE;
}

int stream_flush(struct stream *stream)
{
    while (stream->out_start != stream->out_end) {
        ssize_t sent = send(stream->fd, stream->out + stream->out_start,
                            stream->out_end - stream->out_start, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            return from_errno(errno);
        stream->out_start += (uint32_t)sent;
    }
    stream->out_start = stream->out_end = 0;
    return 0;
}

/* Keep what the kernel did not take: everything of the parts after the first `sent` bytes. */
static void keep_rest(struct stream *stream, const struct iovec *parts, int count, size_t sent)
{
    for (int i = 0; i < count; i++) {
        if (sent >= parts[i].iov_len) {
            sent -= parts[i].iov_len;
            continue;
        }
        size_t rest = parts[i].iov_len - sent;
        memcpy(stream->out + stream->out_end, (const uint8_t *)parts[i].iov_base + sent, rest);
        stream->out_end += (uint32_t)rest;
        sent = 0;
    }
}

int stream_push(struct stream *stream, const struct frame_header *header,
                const struct iovec *parts, int part_count)
{
    struct iovec all[STREAM_PARTS_MAX];
    int status = stream_flush(stream);

    if (status < 0)
        return status;
    all[0] = (struct iovec){(void *)(uintptr_t)header, FRAME_HEADER_BYTES};
    for (int i = 0; i < part_count; i++)
        all[i + 1] = parts[i];
    struct msghdr message = {.msg_iov = all, .msg_iovlen = (size_t)part_count + 1};
    ssize_t sent = sendmsg(stream->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0)
        return from_errno(errno);
    keep_rest(stream, all, part_count + 1, (size_t)sent);
    return 0;
}

/* One read into the free end of the buffer. 0, -EINTR, or -EPIPE at the end of the stream. */
static int fill(struct stream *stream, int flags)
{
    if (stream->in_start != 0) {
        memmove(stream->in, stream->in + stream->in_start, stream->in_end - stream->in_start);
        stream->in_end -= stream->in_start;
        stream->in_start = 0;
    }
    size_t space = STREAM_BUFFER_BYTES - stream->in_end;
    ssize_t received = recv(stream->fd, stream->in + stream->in_end, space, flags);
    if (received > 0) {
        stream->in_end += (uint32_t)received;
        stream->readable = (size_t)received == space;
        return 0;
    }
    stream->readable = false;
    if (received < 0 && from_errno(errno) == -EAGAIN)
        return errno == EINTR ? -EINTR : 0;
    stream->ended = true;
    return -EPIPE;
}

static bool frame_complete(const struct stream *stream, struct frame_header *header)
{
    uint32_t available = stream->in_end - stream->in_start;

    if (available < FRAME_HEADER_BYTES)
        return false;
    memcpy(header, stream->in + stream->in_start, FRAME_HEADER_BYTES);
    return header->length <= available - FRAME_HEADER_BYTES;
}

int stream_peek(struct stream *stream, struct frame_header *header)
{
    header->length = 0;
    if (frame_complete(stream, header))
        return 1;
    if (header->length > STREAM_FRAME_MAX)
        return -EPROTO;
    if (!stream->readable) /* its end stays its end, whoever looked first */
        return stream->ended ? -EPIPE : 0;
    int status = fill(stream, MSG_DONTWAIT);
    if (status < 0 && status != -EINTR)
        return status;
    header->length = 0;
    if (frame_complete(stream, header))
        return 1;
    return header->length > STREAM_FRAME_MAX ? -EPROTO : 0;
}

int stream_wait(struct stream *stream)
{
    return fill(stream, 0);
}

void stream_read(const struct stream *stream, uint64_t offset, void *destination, uint64_t count)
{
    if (count != 0)
        memcpy(destination, stream->in + stream->in_start + FRAME_HEADER_BYTES + offset, count);
}

void stream_release(struct stream *stream, uint32_t length)
{
    stream->in_start += FRAME_HEADER_BYTES + length;
    if (stream->in_start == stream->in_end)
        stream->in_start = stream->in_end = 0;
}
