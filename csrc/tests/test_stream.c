/* test_stream.c - frames over a socket: full sockets, pieces of any size, garbage, ends. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "stream.h"
#include "support.h"

struct streams {
    struct stream sender, receiver;
    int fds[2];
};

static void streams_open(struct streams *streams, int buffer_bytes)
{
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, streams->fds) == 0);
    if (buffer_bytes != 0)
        setsockopt(streams->fds[0], SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof buffer_bytes);
    REQUIRE(stream_init(&streams->sender, streams->fds[0]) == 0);
    REQUIRE(stream_init(&streams->receiver, streams->fds[1]) == 0);
}

static void streams_close(struct streams *streams)
{
    stream_free(&streams->sender);
    stream_free(&streams->receiver);
    for (int i = 0; i < 2; i++)
        if (streams->fds[i] >= 0)
            close(streams->fds[i]);
}

static int push(struct stream *stream, uint32_t length, uint64_t id)
{
    struct frame_header header = {.length = length, .kind = 1, .call_id = id};
    uint8_t *payload = malloc(length + 1u);
    uint32_t first = length / 3;

    fill(payload, length, id);
    struct iovec parts[3] = {
        {payload, first}, {payload + first, 0}, {payload + first, length - first}};
    int status = stream_push(stream, &header, parts, 3);
    free(payload);
    return status;
}

/* Wait for a frame: as epoll would, say that the socket may be readable. */
static int peek(struct stream *stream, struct frame_header *header)
{
    stream->readable = true;
    return stream_peek(stream, header);
}

static void take(struct stream *stream, uint32_t length, uint64_t id)
{
    struct frame_header header;
    int status;

    while ((status = peek(stream, &header)) == 0) {
    }
    REQUIRE(status == 1);
    CHECK_EQUAL(header.length, length);
    CHECK(header.call_id == id);
    uint8_t *copy = malloc(length + 1u);
    stream_read(stream, 0, copy, length);
    CHECK(filled(copy, length, id));
    free(copy);
    stream_release(stream, length);
}

TEST(frames_of_every_size)
{
    struct streams streams;
    struct frame_header header;

    streams_open(&streams, 0);
    CHECK_EQUAL(stream_peek(&streams.receiver, &header), 0);
    for (uint32_t length = 0; length < 300; length++) {
        CHECK_EQUAL(push(&streams.sender, length, length), 0);
        take(&streams.receiver, length, length);
    }
    for (uint32_t length = STREAM_FRAME_MAX - 8; length <= STREAM_FRAME_MAX; length++) {
        CHECK_EQUAL(push(&streams.sender, length, length), 0);
        take(&streams.receiver, length, length);
    }
    CHECK_EQUAL(peek(&streams.receiver, &header), 0);
    streams_close(&streams);
}

/* A socket that takes little: a frame is accepted whole or not at all, and nothing is lost. */
TEST(partial_sends)
{
    struct streams streams;
    struct random random = {harness_seed()};
    uint32_t lengths[2000];
    unsigned sent = 0, taken = 0;

    streams_open(&streams, 4096);
    for (unsigned i = 0; i < 2000; i++)
        lengths[i] = (uint32_t)random_below(&random, i % 4 ? 500 : STREAM_FRAME_MAX + 1);
    while (taken < 2000) {
        if (sent < 2000 && random_below(&random, 3) != 0) {
            int status = push(&streams.sender, lengths[sent], sent);
            CHECK(status == 0 || status == -EAGAIN);
            sent += status == 0;
        } else {
            struct frame_header header;
            int status = peek(&streams.receiver, &header);
            REQUIRE(status >= 0);
            if (status == 1) {
                take(&streams.receiver, lengths[taken], taken);
                taken++;
            }
            status = stream_flush(&streams.sender);
            CHECK(status == 0 || status == -EAGAIN);
        }
    }
    streams_close(&streams);
}

static void send_bytes(int fd, const void *bytes, size_t count)
{
    REQUIRE(send(fd, bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)count);
}

TEST(byte_by_byte)
{
    struct streams streams;
    struct frame_header header = {.length = 10, .call_id = 3}, got;
    uint8_t frame[FRAME_HEADER_BYTES + 10];

    streams_open(&streams, 0);
    memcpy(frame, &header, FRAME_HEADER_BYTES);
    fill(frame + FRAME_HEADER_BYTES, 10, 3);
    for (unsigned i = 0; i < sizeof frame; i++) {
        CHECK_EQUAL(peek(&streams.receiver, &got), 0);
        send_bytes(streams.fds[0], frame + i, 1);
    }
    take(&streams.receiver, 10, 3);
    streams_close(&streams);
}

TEST(impossible_lengths)
{
    static const uint32_t lengths[] = {STREAM_FRAME_MAX + 1, STREAM_BUFFER_BYTES, 1u << 31,
                                       UINT32_MAX - 31, UINT32_MAX};

    for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct streams streams;
        struct frame_header header = {.length = lengths[i]}, got;
        streams_open(&streams, 0);
        send_bytes(streams.fds[0], &header, FRAME_HEADER_BYTES);
        CHECK_EQUAL(peek(&streams.receiver, &got), -EPROTO);
        CHECK_EQUAL(peek(&streams.receiver, &got), -EPROTO);
        streams_close(&streams);
    }
}

/* The end comes after everything that was sent before it, and is final. */
TEST(end_of_the_stream)
{
    for (unsigned cut = 0; cut <= FRAME_HEADER_BYTES + 10; cut++) {
        struct streams streams;
        struct frame_header header = {.length = 10, .call_id = 1}, got;
        uint8_t frame[FRAME_HEADER_BYTES + 10];
        int status;

        streams_open(&streams, 0);
        memcpy(frame, &header, FRAME_HEADER_BYTES);
        fill(frame + FRAME_HEADER_BYTES, 10, 1);
        CHECK_EQUAL(push(&streams.sender, 100, 9), 0);
        send_bytes(streams.fds[0], frame, cut);
        close(streams.fds[0]);
        streams.fds[0] = -1;
        take(&streams.receiver, 100, 9);
        if (cut == sizeof frame)
            take(&streams.receiver, 10, 1);
        while ((status = peek(&streams.receiver, &got)) == 0) {
        }
        CHECK_EQUAL(status, -EPIPE);
        CHECK_EQUAL(peek(&streams.receiver, &got), -EPIPE);
        streams_close(&streams);
    }
}

TEST(sending_to_nobody)
{
    struct streams streams;

    streams_open(&streams, 4096);
    while (push(&streams.sender, 5000, 1) == 0) {
    }
    close(streams.fds[1]);
    streams.fds[1] = -1;
    CHECK_EQUAL(stream_flush(&streams.sender), -EPIPE); /* and no SIGPIPE */
    CHECK_EQUAL(push(&streams.sender, 10, 1), -EPIPE);
    streams_close(&streams);
}

TEST(random_bytes)
{
    struct random random = {harness_seed()};

    for (int run = 0; run < 300; run++) {
        struct streams streams;
        struct frame_header header;
        uint8_t bytes[4000], copy[4000];
        int status = 0;

        streams_open(&streams, 0);
        for (unsigned i = 0; i < sizeof bytes; i++)
            bytes[i] = (uint8_t)(random_below(&random, 4) ? 0 : random_next(&random));
        send_bytes(streams.fds[0], bytes, 1 + random_below(&random, sizeof bytes));
        for (int i = 0; i < 200 && (status = peek(&streams.receiver, &header)) == 1; i++) {
            REQUIRE(header.length <= sizeof copy);
            stream_read(&streams.receiver, 0, copy, header.length);
            stream_release(&streams.receiver, header.length);
        }
        CHECK(status == 0 || status == -EPROTO || status == 1);
        streams_close(&streams);
    }
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
