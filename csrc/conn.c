/* conn.c - see conn.h. */
#define _GNU_SOURCE
#include "conn.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "segment.h"

void *shmrpc_segment_map(int fd, uint32_t ring_bytes)
{
    struct segment_shm *segment;
    int status = segment_map_own(fd, ring_bytes, &segment);

    if (status == 0)
        return segment;
    errno = -status;
    return NULL;
}

void shmrpc_segment_unmap(void *segment, uint32_t ring_bytes)
{
    segment_unmap(segment, ring_bytes);
}

/* A consumer looks whether its peer waits for space each time it has freed one part in so many of
 * the ring; the peer asks for two parts. See want_room and link_release. */
enum { SPACE_STEP = 8 };

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

/* ---- making and ending ---- */

static int init_shm(struct conn *conn, const shmrpc_conn_options *options)
{
    struct segment_shm *own = options->own_segment;
    const struct segment_shm *peer;
    int status = segment_map_peer(options->peer_segment_fd, options->peer_ring_bytes,
                                  options->peer_trusted != 0, &peer);

    if (status < 0)
        return status;
    ring_producer_init(&conn->producer, own, peer, options->own_ring_bytes);
    ring_consumer_init(&conn->consumer, own, peer, options->peer_ring_bytes);
    conn->wake.own = own;
    conn->wake.peer = peer;
    conn->wake.epoch = 1; /* segment_map_own has left it armed */
    conn->wake.bell_socket = options->peer_bell_fd < 0;
    conn->wake.peer_bell = conn->wake.bell_socket ? options->control_fd : options->peer_bell_fd;
    conn->frame_max = ring_frame_max(options->own_ring_bytes);
    return 0;
}

static bool ring_size_valid(uint32_t bytes)
{
    return bytes >= RING_BYTES_MIN && bytes <= RING_BYTES_MAX && (bytes & (bytes - 1)) == 0;
}

int conn_init(struct conn *conn, const shmrpc_conn_options *options, int epoll_fd)
{
    int status;

    *conn = (struct conn){
        .is_shm = options->own_segment != NULL,
        .control_fd = options->control_fd,
        .own_bell_fd = options->own_bell_fd,
        .own_ring_bytes = options->own_ring_bytes,
        .peer_ring_bytes = options->peer_ring_bytes,
        .max_message_bytes = options->max_message_bytes,
        .peer_max_message_bytes = options->peer_max_message_bytes,
        .relative_deadlines = options->relative_deadlines != 0,
        .frame_max = STREAM_FRAME_MAX,
        .epoll_fd = epoll_fd,
        .references = 1,
    };
    if (conn->is_shm) {
        if (!ring_size_valid(conn->own_ring_bytes) || !ring_size_valid(conn->peer_ring_bytes))
            return -EINVAL;
        status = init_shm(conn, options);
    } else {
        status = stream_init(&conn->stream, options->control_fd);
    }
    if (status == 0 && conn->is_shm) {
        conn->lending = lending_new(conn, options->arena_max_bytes, options->peer_arena_max_bytes,
                                    options->peer_trusted != 0);
        if (conn->lending == NULL) {
            segment_unmap(conn->wake.peer, conn->peer_ring_bytes);
            status = -ENOMEM;
        }
    }
    if (status < 0)
        return status;
    pthread_mutex_init(&conn->send_lock, NULL);
    return 0;
}

void conn_destroy(struct conn *conn)
{
    conn->destroyed = true;
    if (conn->lending != NULL)
        lending_end(conn->lending); /* from here on no finalizer comes here */
    conn->lending = NULL;
    close_fd(conn->own_bell_fd);
    if (conn->is_shm && !conn->wake.bell_socket)
        close_fd(conn->wake.peer_bell);
    close_fd(conn->control_fd);
    if (conn->is_shm)
        segment_unmap(conn->wake.own, conn->own_ring_bytes);
    conn_abandon(conn);
}

void conn_abandon(struct conn *conn)
{
    if (conn->lending != NULL)
        lending_end(conn->lending);
    blocks_free(conn->received.blocks, conn->received.count);
    if (conn->is_shm)
        segment_unmap(conn->wake.peer, conn->peer_ring_bytes);
    stream_free(&conn->stream);
    free(conn->outbox.frames);
    free(conn->partial.payload);
    pthread_mutex_destroy(&conn->send_lock);
}

/* ---- sending ---- */

static int link_push(struct conn *conn, const struct frame_header *header,
                     const struct iovec *parts, int part_count)
{
    int status = conn->is_shm ? ring_push(&conn->producer, header, parts, part_count)
                              : stream_push(&conn->stream, header, parts, part_count);

    if (status == 0)
        conn->pushed += frame_span(header->length);
    return status;
}

/* One frame of a message: the bytes [offset, offset + header.length) of its joined parts. */
struct piece {
    struct frame_header header;
    struct iovec parts[3];
    int part_count;
};

static void cut_piece(const struct conn *conn, const struct outgoing *message, uint32_t offset,
                      struct piece *piece)
{
    uint32_t left = message->header.total_bytes - offset;
    size_t skip = offset;
    size_t count = left < conn->frame_max ? left : conn->frame_max;

    piece->header = message->header;
    piece->header.length = (uint32_t)count;
    if (count < left)
        piece->header.flags |= SHMRPC_FLAG_MORE;
    if (offset != 0)
        piece->header.kind = SHMRPC_CONTINUE;
    piece->part_count = 0;
    for (int i = 0; i < 3 && count != 0; i++) {
        size_t length = message->parts[i].iov_len;
        if (skip >= length) {
            skip -= length;
            continue;
        }
        length = length - skip < count ? length - skip : count;
        piece->parts[piece->part_count++] =
            (struct iovec){(uint8_t *)message->parts[i].iov_base + skip, length};
        count -= length;
        skip = 0;
    }
}

static int outbox_reserve(struct outbox *outbox, size_t bytes)
{
    if (outbox->start != 0) {
        memmove(outbox->frames, outbox->frames + outbox->start, outbox->end - outbox->start);
        outbox->end -= outbox->start;
        outbox->start = 0;
    }
    if (outbox->capacity - outbox->end >= bytes)
        return 0;
    size_t capacity = outbox->end + bytes;
    capacity += capacity / 2 < (1u << 20) ? capacity / 2 : 1u << 20;
    uint8_t *frames = realloc(outbox->frames, capacity);
    if (frames == NULL)
        return -ENOMEM;
    outbox->frames = frames;
    outbox->capacity = capacity;
    return 0;
}

static void outbox_append(struct outbox *outbox, const struct piece *piece)
{
    memcpy(outbox->frames + outbox->end, &piece->header, FRAME_HEADER_BYTES);
    outbox->end += FRAME_HEADER_BYTES;
    for (int i = 0; i < piece->part_count; i++) {
        memcpy(outbox->frames + outbox->end, piece->parts[i].iov_base, piece->parts[i].iov_len);
        outbox->end += piece->parts[i].iov_len;
    }
    outbox->span += frame_span(piece->header.length);
}

/* Push frames of the outbox until it is empty or the link is full: 0, -EAGAIN, -EPIPE, -EPROTO. */
static int outbox_push(struct conn *conn)
{
    struct outbox *outbox = &conn->outbox;
    int status = conn->is_shm ? 0 : stream_flush(&conn->stream);

    while (status == 0 && outbox->start != outbox->end) {
        struct frame_header header;
        memcpy(&header, outbox->frames + outbox->start, FRAME_HEADER_BYTES);
        struct iovec payload = {outbox->frames + outbox->start + FRAME_HEADER_BYTES,
                                header.length};
        status = link_push(conn, &header, &payload, 1);
        if (status == 0) {
            outbox->start += FRAME_HEADER_BYTES + header.length;
            outbox->span -= frame_span(header.length);
        }
    }
    if (outbox->start == outbox->end && outbox->capacity != 0) {
        free(outbox->frames);
        *outbox = (struct outbox){0};
    }
    return status;
}

static bool output_waits(const struct conn *conn)
{
    return conn->outbox.start != conn->outbox.end ||
           (!conn->is_shm && conn->stream.out_start != conn->stream.out_end);
}

static void watch_socket(struct conn *conn, bool output, bool ignore_input)
{
    struct epoll_event event = {
        .events = (output ? (uint32_t)EPOLLOUT : 0) |
                  (ignore_input ? 0 : (uint32_t)(EPOLLIN | EPOLLRDHUP)),
        .data.u64 = conn->epoll_data,
    };

    epoll_ctl(conn->epoll_fd, EPOLL_CTL_MOD, conn->control_fd, &event);
}

/* Be told when there is room again: by the peer's bell, or by epoll. */
static void want_room(struct conn *conn, bool want)
{
    if (conn->is_shm) {
        if (want) /* Two steps of the consumer's looking: enough for the longest frame. */
            wake_want_space(&conn->wake,
                            conn->producer.head + 2 * conn->producer.bytes / SPACE_STEP);
        else
            wake_got_space(&conn->wake);
    } else if (want != conn->wants_room) {
        watch_socket(conn, want, conn->ignores_input);
    }
    conn->wants_room = want;
}

void conn_watch_input(struct conn *conn, bool watch)
{
    pthread_mutex_lock(&conn->send_lock);
    if (!conn->is_shm && conn->ignores_input == watch) {
        watch_socket(conn, conn->wants_room, !watch);
        conn->ignores_input = !watch;
    }
    pthread_mutex_unlock(&conn->send_lock);
}

/* Tell leaders without the lock whether there is something to flush. */
static void publish_outbox(struct conn *conn)
{
    store_relaxed(&conn->outbox_bytes, conn->outbox.end - conn->outbox.start +
                                           (conn->stream.out_end - conn->stream.out_start));
}

/* Push what waits; if the link is full, arrange for a wake-up and look once more, because room
 * that came in between rings nobody (fence H). 0, -EPIPE or -EPROTO. */
static int push_waiting(struct conn *conn)
{
    int status = outbox_push(conn);
    uint64_t head;

    /* Before fence H: a leader that arms and sees nothing to flush must not miss this. */
    publish_outbox(conn);
    while (status == -EAGAIN) {
        head = conn->producer.head;
        want_room(conn, true);
        status = outbox_push(conn);
        if (conn->producer.head == head)
            break; /* asked for space beyond what the peer had freed when we looked last */
    }
    if (!output_waits(conn) && conn->wants_room)
        want_room(conn, false);
    else if (!conn->is_shm && output_waits(conn))
        want_room(conn, true); /* the kernel took a frame in part */
    publish_outbox(conn);
    return status == -EAGAIN ? 0 : status;
}

int conn_flush(struct conn *conn, uint64_t *bells)
{
    pthread_mutex_lock(&conn->send_lock);
    uint64_t pushed = conn->pushed;
    int status = output_waits(conn) ? push_waiting(conn) : 0;
    pushed = conn->pushed - pushed;
    if (pushed != 0 && conn->producer.holds)
        ring_publish(&conn->producer);
    pthread_mutex_unlock(&conn->send_lock);
    if (pushed != 0 && conn->is_shm)
        *bells += (uint64_t)wake_peer_for_data(&conn->wake);
    return status;
}

/* Push pieces until one does not fit, queue the rest: all or nothing of it, so that a message is
 * never cut short for want of memory. */
static int send_pieces(struct conn *conn, const struct outgoing *message)
{
    const uint32_t total = message->header.total_bytes;
    uint32_t offset = 0;
    int status = conn->outbox.start == conn->outbox.end ? 0 : -EAGAIN;
    struct piece piece;
    bool whole = false;

    while (status == 0 && !whole) {
        cut_piece(conn, message, offset, &piece);
        status = link_push(conn, &piece.header, piece.parts, piece.part_count);
        if (status == 0)
            offset += piece.header.length;
        whole = status == 0 && offset == total;
    }
    if (status != -EAGAIN)
        return status;
    size_t pieces = (total - offset) / conn->frame_max + 1;
    status = outbox_reserve(&conn->outbox, total - offset + pieces * FRAME_HEADER_BYTES);
    if (status < 0)
        return status; /* with offset != 0 the connection is of no use any more: conn_send */
    do {
        cut_piece(conn, message, offset, &piece);
        outbox_append(&conn->outbox, &piece);
        offset += piece.header.length;
    } while (offset < total);
    return push_waiting(conn);
}

/* Where the last frame of a message will start that comes after all there is. */
static uint64_t last_position(const struct conn *conn, uint32_t total)
{
    uint64_t frames_before = total == 0 ? 0 : (total - 1) / conn->frame_max;

    return conn->pushed + conn->outbox.span + frames_before * frame_span(conn->frame_max);
}

/* As conn_send, but rings no bell: *published is whether the peer has got anything in its ring. With
 * `keep` it has not, if the conn holds: that is left to conn_publish. */
static int send_quietly(struct conn *conn, struct outgoing *message, atomic_u64 *position,
                        bool keep, bool *published)
{
    size_t total = 0;
    int status;

    *published = false;
    for (int i = 0; i < 3; i++)
        total += message->parts[i].iov_len;
    if (total + message->block_bytes > conn->peer_max_message_bytes)
        return -EMSGSIZE;
    message->header.total_bytes = (uint32_t)total;

    pthread_mutex_lock(&conn->send_lock);
    uint64_t pushed = conn->pushed;
    status = -(int)load_relaxed(&conn->error);
    /* Before the peer can see it: it may run and die before this thread runs on, and another one
     * tells then what became of the call. */
    store_relaxed(position, last_position(conn, (uint32_t)total));
    if (status == 0 && total <= conn->frame_max && conn->outbox.start == conn->outbox.end) {
        message->header.length = (uint32_t)total;
        status = link_push(conn, &message->header, message->parts, 3);
        if (status == -EAGAIN)
            status = send_pieces(conn, message);
    } else if (status == 0) {
        status = send_pieces(conn, message);
    }
    pushed = conn->pushed - pushed;
    bool waits = output_waits(conn);
    publish_outbox(conn);
    if (waits && !conn->is_shm)
        want_room(conn, true);
    if (status == -ENOMEM && pushed != 0)
        status = -EPIPE; /* the peer has half a message: only closing is left */
    keep = keep && conn->producer.holds;
    if (conn->producer.holds && !keep)
        ring_publish(&conn->producer);
    pthread_mutex_unlock(&conn->send_lock);
    *published = pushed != 0 && conn->is_shm && !keep;
    return status < 0 ? status : waits;
}

int conn_send(struct conn *conn, struct outgoing *message, atomic_u64 *position, uint64_t *bells)
{
    bool published;
    int status = send_quietly(conn, message, position, false, &published);

    if (published)
        *bells += (uint64_t)wake_peer_for_data(&conn->wake);
    return status;
}

int conn_send_held(struct conn *conn, struct outgoing *message, atomic_u64 *position)
{
    bool published;

    return send_quietly(conn, message, position, true, &published);
}

void conn_hold(struct conn *conn)
{
    pthread_mutex_lock(&conn->send_lock);
    conn->producer.holds = true;
    pthread_mutex_unlock(&conn->send_lock);
}

void conn_publish(struct conn *conn, bool holds_on, uint64_t *bells)
{
    pthread_mutex_lock(&conn->send_lock);
    conn->producer.holds = holds_on;
    ring_publish(&conn->producer);
    pthread_mutex_unlock(&conn->send_lock);
    *bells += (uint64_t)wake_peer_for_data(&conn->wake);
}

static void hang_up(struct conn *conn)
{
    store_relaxed(&conn->ended_here, 1);
    shutdown(conn->control_fd, SHUT_RDWR); /* the leader will see it and end the conn */
}

void conn_return(struct conn *conn, struct block_name name)
{
    struct outgoing message = {.header = {.kind = SHMRPC_RETURN},
                               .parts = {{&name, sizeof name}}};
    atomic_u64 position;
    bool published;

    if (load_relaxed(&conn->error) != 0)
        return;
    int status = send_quietly(conn, &message, &position, false, &published);
    /* One in a while is read: else many of them would fill the ring, and what does not fit there
     * leaves this process when somebody reads here. */
    conn->returns_unread += frame_span(sizeof name);
    if (conn->returns_unread >= conn->own_ring_bytes / 4) {
        conn->returns_unread = 0;
        wake_peer_for_data(&conn->wake);
    } else if (published) {
        wake_peer_for_blocks(&conn->wake);
    }
    /* The peer would wait for this block for ever. */
    if (status < 0 && load_relaxed(&conn->error) == 0)
        hang_up(conn);
}

int conn_withdraw(struct conn *conn, uint32_t number)
{
    struct outgoing message = {.header = {.kind = SHMRPC_WITHDRAW},
                               .parts = {{&number, sizeof number}}};
    atomic_u64 position;
    uint64_t bells = 0;
    int status = conn_send(conn, &message, &position, &bells);

    if ((status == -EPIPE || status == -EPROTO) && load_relaxed(&conn->error) == 0)
        hang_up(conn);
    return status < 0 ? status : 0;
}

bool conn_peer_left(struct conn *conn)
{
    struct pollfd control = {.fd = conn->control_fd, .events = POLLRDHUP};

    return poll(&control, 1, 0) > 0 && (control.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

bool conn_hung_up(struct conn *conn)
{
    /* A look costs a system call. While calls follow each other closely the leader's own looks
     * are enough; after a pause (the coarse clock has moved) nobody may have looked for hours. */
    uint64_t tick = clock_coarse_ns();

    if (load_relaxed(&conn->error) != 0)
        return true;
    if (tick == load_relaxed(&conn->last_send_tick))
        return false;
    store_relaxed(&conn->last_send_tick, tick);
    return conn_peer_left(conn);
}

/* ---- receiving ---- */

static int link_peek(struct conn *conn, struct frame_header *header)
{
    if (conn->is_shm)
        return ring_peek(&conn->consumer, header);
    return stream_peek(&conn->stream, header);
}

static void link_read(const struct conn *conn, uint64_t offset, void *destination, uint64_t count)
{
    if (conn->is_shm)
        ring_read(&conn->consumer, offset, destination, count);
    else
        stream_read(&conn->stream, offset, destination, count);
}

static void link_release(struct conn *conn, uint32_t length, uint64_t *bells)
{
    if (!conn->is_shm) {
        stream_release(&conn->stream, length);
        return;
    }
    ring_release(&conn->consumer, length);
    /* The look costs a fence, on the way of every message: it is enough to look once in
     * SPACE_STEP of a ring, because a sender asks for twice that much (see want_room). */
    if (conn->consumer.head - conn->space_checked < conn->consumer.bytes / SPACE_STEP)
        return;
    conn->space_checked = conn->consumer.head;
    *bells += (uint64_t)wake_peer_for_space(&conn->wake, conn->consumer.head,
                                            conn->consumer.bytes / SPACE_STEP);
}

/* What a first frame may say. Its length is checked against the ring already. */
static int check_first(const struct conn *conn, const struct frame_header *header)
{
    bool request = header->kind == SHMRPC_REQUEST || header->kind == SHMRPC_NOTIFY;
    uint64_t head = (uint64_t)header->metadata_bytes + (request ? header->method_bytes : 0);
    bool more = (header->flags & SHMRPC_FLAG_MORE) != 0;

    if (header->kind == SHMRPC_CONTINUE || (header->flags & ~SHMRPC_FLAG_ALL) != 0)
        return -EPROTO;
    if (header->total_bytes > conn->max_message_bytes || head > header->total_bytes)
        return -EPROTO;
    if (request && (header->method_bytes == 0 || header->method_bytes > SHMRPC_METHOD_MAX))
        return -EPROTO;
    if (more ? header->length >= header->total_bytes : header->length != header->total_bytes)
        return -EPROTO;
    if ((header->flags & SHMRPC_FLAG_BLOCKS) != 0 && !request && header->kind != SHMRPC_REPLY &&
        header->kind != SHMRPC_ITEM)
        return -EPROTO;
    return more && header->length == 0 ? -EPROTO : 0;
}

/* Memory grows with what has arrived, not with what the first frame announces. */
static int append_piece(struct conn *conn, uint32_t length)
{
    struct partial *partial = &conn->partial;
    uint32_t needed = partial->received + length;

    if (needed > partial->capacity) {
        uint64_t capacity = partial->capacity == 0 ? needed * 2ull : partial->capacity * 2ull;
        if (capacity < needed)
            capacity = needed;
        if (capacity > partial->header.total_bytes)
            capacity = partial->header.total_bytes;
        uint8_t *payload = realloc(partial->payload, capacity);
        if (payload == NULL)
            return -ENOMEM;
        partial->payload = payload;
        partial->capacity = (uint32_t)capacity;
    }
    link_read(conn, 0, partial->payload + partial->received, length);
    partial->received += length;
    return 0;
}

/* Take one piece; 1 when it was the last. */
static int take_piece(struct conn *conn, const struct frame_header *header, uint64_t *bells)
{
    struct partial *partial = &conn->partial;
    bool more = (header->flags & SHMRPC_FLAG_MORE) != 0;

    if (partial->received == 0) {
        partial->header = *header;
    } else {
        if (header->kind != SHMRPC_CONTINUE || header->call_id != partial->header.call_id ||
            header->length == 0 || (header->flags & ~SHMRPC_FLAG_ALL) != 0)
            return -EPROTO;
    }
    uint32_t left = partial->header.total_bytes - partial->received;
    if (more ? header->length >= left : header->length != left)
        return -EPROTO;
    int status = append_piece(conn, header->length);
    if (status < 0)
        return status;
    if (more)
        link_release(conn, header->length, bells);
    return !more;
}

void conn_read_control(struct conn *conn)
{
    int status = lending_read_control(conn->lending, conn->control_fd);

    if (status == 0)
        return;
    conn->hung_up = true;
    if (conn->control_error == 0)
        conn->control_error = status;
}

/* ---- blocks ---- */

void blocks_free(shmrpc_block *blocks, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (blocks[i].lease != NULL)
            shmrpc_lease_free(blocks[i].lease, NULL);
    free(blocks);
}

/* Bytes of the message just received, of which the peer may change what lies in a ring. */
static void read_part(const struct conn *conn, uint64_t offset, void *destination, uint64_t count)
{
    if (conn->partial.received != 0)
        memcpy(destination, conn->partial.payload + offset, count);
    else
        link_read(conn, offset, destination, count);
}

static int take_block(struct conn *conn, const struct block_entry *entry, shmrpc_block *block)
{
    if (conn->lending == NULL || entry->bytes == 0)
        return -EPROTO;
    if (entry->owner == BLOCK_YOURS)
        return lending_reclaim(conn->lending, entry, block);
    struct memory *memory = lending_peer_memory(conn->lending, entry->segment);
    if (memory == NULL) { /* its descriptor came before, on the control socket */
        conn_read_control(conn);
        memory = lending_peer_memory(conn->lending, entry->segment);
    }
    if (memory == NULL || entry->offset > memory->bytes ||
        entry->bytes > memory->bytes - entry->offset)
        return -EPROTO;
    return lending_lease(conn->lending, memory, entry, block);
}

/* Entries are loaded once, into private memory, and checked there. `room` is what the message has
 * behind its table, `allowed` what it may refer to. */
static int take_entries(struct conn *conn, uint64_t offset, uint64_t room, uint64_t allowed)
{
    struct received_blocks *received = &conn->received;

    for (uint32_t i = 0; i < received->count; i++) {
        shmrpc_block *block = &received->blocks[i];
        struct block_entry entry;
        int status = 0;
        read_part(conn, offset + i * (uint64_t)BLOCK_ENTRY_BYTES, &entry, sizeof entry);
        *block = (shmrpc_block){.bytes = entry.bytes};
        if (entry.owner > BLOCK_YOURS)
            return -EPROTO;
        if (entry.segment == BLOCK_INLINE) {
            if (entry.owner != 0 || entry.offset != 0 || entry.index != 0 ||
                entry.generation != 0 || entry.bytes > room - received->inline_bytes)
                return -EPROTO;
            received->inline_bytes += entry.bytes;
        } else {
            if (entry.bytes > allowed)
                return -EPROTO;
            allowed -= entry.bytes;
            received->block_bytes += entry.bytes;
            status = take_block(conn, &entry, block);
        }
        if (status < 0)
            return status;
    }
    return 0;
}

/* The table of the message that conn_receive has found. */
static int receive_blocks(struct conn *conn, const struct frame_header *header)
{
    struct received_blocks *received = &conn->received;
    bool request = header->kind == SHMRPC_REQUEST || header->kind == SHMRPC_NOTIFY;
    uint64_t start = (uint64_t)header->metadata_bytes + (request ? header->method_bytes : 0);
    uint64_t room = header->total_bytes - start;
    struct block_table table;

    if (room < sizeof table)
        return -EPROTO;
    read_part(conn, start, &table, sizeof table);
    uint64_t table_bytes = BLOCK_TABLE_BYTES + (uint64_t)table.count * BLOCK_ENTRY_BYTES;
    if (table.reserved != 0 || table.count > BLOCKS_MAX || table_bytes > room)
        return -EPROTO;
    received->blocks = calloc((size_t)table.count + 1, sizeof *received->blocks);
    if (received->blocks == NULL)
        return -ENOMEM;
    received->count = table.count;
    received->table_bytes = (uint32_t)table_bytes;
    return take_entries(conn, start + sizeof table, room - table_bytes,
                        conn->max_message_bytes - header->total_bytes);
}

void conn_take_blocks(struct conn *conn, shmrpc_message *message)
{
    const struct received_blocks *received = &conn->received;

    message->blocks = received->blocks;
    message->block_count = received->count;
    message->table_bytes = received->table_bytes;
    message->body_bytes -= received->table_bytes + received->inline_bytes;
    conn->received = (struct received_blocks){0};
}

/* ---- whole messages ---- */

static int receive_message(struct conn *conn, struct frame_header *header, uint64_t *bells)
{
    for (int i = 0; i < CONN_PIECES_MAX; i++) {
        int status = link_peek(conn, header);
        if (status <= 0)
            return status;
        if (conn->partial.received == 0) {
            status = check_first(conn, header);
            if (status < 0)
                return status;
            if ((header->flags & SHMRPC_FLAG_MORE) == 0)
                return 1;
        }
        status = take_piece(conn, header, bells);
        if (status < 0)
            return status;
        if (status > 0) {
            /* The last piece stays unreleased: the message counts as taken in conn_finish. */
            uint32_t last = header->length;
            *header = conn->partial.header;
            header->flags &= (uint8_t)~SHMRPC_FLAG_MORE;
            header->length = last;
            return 1;
        }
    }
    return 0;
}

int conn_receive(struct conn *conn, struct frame_header *header, uint64_t *bells)
{
    int status = receive_message(conn, header, bells);

    if (status > 0 && (header->flags & SHMRPC_FLAG_BLOCKS) != 0) {
        int result = receive_blocks(conn, header);
        if (result < 0)
            return result;
    }
    return status;
}

void conn_read(const struct conn *conn, uint32_t total, void *destination)
{
    if (conn->partial.received != 0)
        memcpy(destination, conn->partial.payload, total);
    else
        link_read(conn, 0, destination, total);
}

uint8_t *conn_take_payload(struct conn *conn)
{
    uint8_t *payload = conn->partial.payload;

    conn->partial.payload = NULL;
    conn->partial.capacity = 0;
    return payload;
}

void conn_finish(struct conn *conn, uint32_t length, uint64_t *bells)
{
    free(conn->partial.payload);
    conn->partial = (struct partial){0};
    link_release(conn, length, bells);
    if (conn->received.blocks != NULL) {
        blocks_free(conn->received.blocks, conn->received.count);
        conn->received = (struct received_blocks){0};
    }
}

/* ---- after the end ---- */

static bool still_queued(const struct segment_shm *peer, uint64_t call_id)
{
    if (call_id == 0)
        return false; /* a notification; 0 is also what a free place says */
    for (unsigned i = 0; i < LAYOUT_QUEUED_MAX; i++)
        if (load_relaxed(&peer->queued[i]) == call_id)
            return true;
    return false;
}

int conn_outcome(struct conn *conn, uint64_t call_id, uint64_t position)
{
    pthread_mutex_lock(&conn->send_lock);
    uint64_t pushed = conn->pushed;
    pthread_mutex_unlock(&conn->send_lock);

    if (position >= pushed)
        return SHMRPC_NOT_SENT;
    if (load_relaxed(&conn->said_goodbye) != 0 && call_id != 0)
        return SHMRPC_NOT_STARTED; /* or its reply would have come before; notifications have none */
    if (!conn->is_shm || load_relaxed(&conn->ended_here) != 0)
        return SHMRPC_UNKNOWN; /* a peer that lives may still read what it has */
    uint64_t head = load_acquire(&conn->wake.peer->head); /* fence A, pairs with D */
    if (head <= position || still_queued(conn->wake.peer, call_id))
        return SHMRPC_NOT_STARTED;
    return SHMRPC_UNKNOWN;
}
