/* test_hostile_blocks.c - peers that lie about blocks: tables, returns, segments. Each ends its own
 * connection with -EPROTO, and nothing is leaked. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "poller.h"
#include "support.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { MIB = 1 << 20, SEGMENT = 1 * MIB, ARENA = 4 * MIB };

static struct pair pair;
static struct hand hand;
static shmrpc_poller *poller;
static shmrpc_slot *slot;
static uint64_t conn_id;
static int fds_before;

static int open_fds(void)
{
    int count = 0;

    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void open_victim(enum transport transport, bool trusted)
{
    fds_before = open_fds();
    pair_open(&pair, transport, 65536, 65536);
    pair.options[0].max_message_bytes = 2 * MIB;
    pair.options[0].arena_max_bytes = ARENA;
    pair.options[0].peer_arena_max_bytes = ARENA;
    poller = shmrpc_poller_new(0, 0, WAIT_AUTO, 1);
    REQUIRE(poller != NULL);
    shmrpc_poller_serve_events(poller, 0);
    if (transport != STREAM)
        hand_open(&hand, &pair);
    else
        hand = (struct hand){.control_fd = pair.options[1].control_fd, .bell_fd = -1};
    conn_id = pair_give(&pair, 0, poller);
    slot = shmrpc_slot_new(poller, conn_id);
    if (!trusted && transport != STREAM) /* from here on: the first segment of a test is not sealed */
        poller_find(poller, conn_id)->lending->peer_trusted = false;
}

static void close_victim(void)
{
    shmrpc_slot_free(slot);
    shmrpc_poller_free(poller);
    if (pair.transport != STREAM)
        guarded_munmap((void *)(uintptr_t)hand.peer, 65536 + LAYOUT_HEADER_BYTES);
    pair_close(&pair);
    CHECK_EQUAL(open_fds(), fds_before);
}

static unsigned messages, blocks;

/* Read what has come: 0, or the errno that ended the connection. */
static int outcome(void)
{
    int error = 0;

    messages = blocks = 0;
    for (int round = 0; round < 8; round++) {
        int64_t result = shmrpc_wait_events(slot, 0);
        while (shmrpc_take(slot)) {
            const shmrpc_message *message = shmrpc_slot_message(slot);
            if (message->kind == SHMRPC_CLOSED)
                error = (int)message->status;
            else
                messages++;
            blocks += message->block_count;
        }
        if (result == -EPIPE || result == -EPROTO)
            error = (int)-result;
    }
    return error;
}

/* ---- what a peer says ---- */

static int new_memory(uint64_t bytes, bool sealed)
{
    int fd = memory_fd(bytes);

    if (sealed)
        REQUIRE(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE |
                                           F_SEAL_SEAL) == 0);
    return fd;
}

static void send_control(const void *bytes, size_t count, const int *fds, int fd_count)
{
    union {
        struct cmsghdr header;
        uint8_t bytes[CMSG_SPACE(8 * sizeof(int))];
    } control;
    struct iovec part = {(void *)(uintptr_t)bytes, count};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    memset(&control, 0, sizeof control);
    if (fd_count != 0) {
        size_t size = (size_t)fd_count * sizeof(int);
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(size), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), fds, size);
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(size);
    }
    ssize_t sent;
    while ((sent = sendmsg(hand.control_fd, &message, MSG_NOSIGNAL)) < 0 && errno == EAGAIN)
        shmrpc_wait_events(slot, 1000000); /* it is full of bells, which the victim reads */
    REQUIRE(sent == (ssize_t)count);
}

static void send_segment(uint32_t number, uint64_t said, uint64_t bytes, int fd_count)
{
    const struct memory_record record = {.mark = MEMORY_MARK, .number = number, .bytes = said};
    int fds[8] = {0};

    for (int i = 0; i < fd_count; i++)
        fds[i] = new_memory(bytes, true);
    send_control(&record, sizeof record, fds, fd_count);
    for (int i = 0; i < fd_count; i++)
        close(fds[i]);
}

/* A message with this table, and what follows it. */
static void send_table(uint8_t kind, const struct block_table *table,
                       const struct block_entry *entries, uint32_t count, uint32_t body_bytes)
{
    static uint8_t payload[16000];
    uint32_t entry_bytes = count * BLOCK_ENTRY_BYTES;
    struct frame_header header = {
        .kind = kind,
        .flags = SHMRPC_FLAG_BLOCKS,
        .call_id = 1 << 16 | SHMRPC_PYTHON_INDEX,
        .length = BLOCK_TABLE_BYTES + entry_bytes + body_bytes,
    };

    header.total_bytes = header.length;
    memcpy(payload, table, sizeof *table);
    if (entry_bytes != 0)
        memcpy(payload + BLOCK_TABLE_BYTES, entries, entry_bytes);
    REQUIRE(header.length <= sizeof payload);
    if (pair.transport == STREAM) {
        REQUIRE(send(hand.control_fd, &header, sizeof header, MSG_NOSIGNAL) > 0);
        REQUIRE(send(hand.control_fd, payload, header.length, MSG_NOSIGNAL) > 0);
    } else {
        REQUIRE(hand_send(&hand, &header, payload) == 0);
    }
}

static void send_entry(const struct block_entry *entry)
{
    const struct block_table table = {.count = 1};

    send_table(SHMRPC_ITEM, &table, entry, 1, 100);
}

static void send_returns(const struct block_name *names, uint32_t bytes)
{
    const struct frame_header header = {
        .kind = SHMRPC_RETURN, .length = bytes, .total_bytes = bytes};

    REQUIRE(hand_send(&hand, &header, names) == 0);
}

/* ---- tables ---- */

static const struct block_entry good = {
    .offset = 4096, .bytes = 5000, .segment = 0, .index = 3, .generation = 1};

TEST(tables_that_are_right)
{
    const struct block_entry inlined = {.bytes = 100, .segment = BLOCK_INLINE};
    const struct block_entry all = {.bytes = SEGMENT, .segment = 0};

    for (int transport = 0; transport < TRANSPORTS; transport++) {
        open_victim((enum transport)transport, true);
        if (transport != STREAM) {
            send_segment(0, SEGMENT, SEGMENT, 1);
            send_entry(&good);
            send_entry(&all);
            CHECK_EQUAL(outcome(), 0);
            CHECK_EQUAL(blocks, 2);
        }
        send_entry(&inlined);
        CHECK_EQUAL(outcome(), 0);
        CHECK_EQUAL(messages, 1);
        close_victim();
    }
}

#define ENTRY(...) {{__VA_ARGS__}}
static const struct {
    struct block_entry entry;
} bad_entries[] = {
    ENTRY(.offset = 0, .bytes = 5000, .segment = 1),
    ENTRY(.offset = 0, .bytes = 5000, .segment = UINT32_MAX - 1),
    ENTRY(.offset = 0, .bytes = 0, .segment = 0),
    ENTRY(.offset = SEGMENT, .bytes = 1, .segment = 0),
    ENTRY(.offset = SEGMENT - 1, .bytes = 2, .segment = 0),
    ENTRY(.offset = 0, .bytes = SEGMENT + 1, .segment = 0),
    ENTRY(.offset = UINT64_MAX, .bytes = 2, .segment = 0),
    ENTRY(.offset = 4096, .bytes = UINT64_MAX - 4095, .segment = 0),
    ENTRY(.offset = 4096, .bytes = UINT64_MAX, .segment = 0),
    ENTRY(.offset = 0, .bytes = 5000, .segment = 0, .owner = 2),
    ENTRY(.offset = 0, .bytes = 101, .segment = BLOCK_INLINE),
    ENTRY(.offset = 0, .bytes = UINT64_MAX, .segment = BLOCK_INLINE),
    ENTRY(.offset = 1, .bytes = 10, .segment = BLOCK_INLINE),
    ENTRY(.offset = 0, .bytes = 10, .segment = BLOCK_INLINE, .index = 1),
    ENTRY(.offset = 0, .bytes = 10, .segment = BLOCK_INLINE, .generation = 1),
};

TEST(entries_that_are_wrong)
{
    for (unsigned i = 0; i < sizeof bad_entries / sizeof *bad_entries; i++) {
        struct block_entry entries[2] = {good, bad_entries[i].entry};
        const struct block_table table = {.count = 2};
        open_victim(i % 2 ? SHM : SHM_SOCKET_BELLS, true);
        send_segment(0, SEGMENT, SEGMENT, 1);
        send_table(SHMRPC_ITEM, &table, entries, 2, 100);
        CHECK_EQUAL(outcome(), EPROTO);
        close_victim();
    }
}

TEST(tables_that_are_wrong)
{
    static const struct {
        uint8_t kind;
        struct block_table table;
    } bad[] = {
        {SHMRPC_ITEM, {.count = 2}}, /* longer than the message */
        {SHMRPC_ITEM, {.count = BLOCKS_MAX + 1}},
        {SHMRPC_ITEM, {.count = UINT32_MAX}},
        {SHMRPC_ITEM, {.count = 0x08000000}}, /* times 32 is 0 in 32 bits */
        {SHMRPC_ITEM, {.count = 1, .reserved = 1}},
        {SHMRPC_CANCEL, {.count = 1}},
        {SHMRPC_CREDIT, {.count = 1}},
        {SHMRPC_RETURN, {.count = 1}},
        {99, {.count = 1}},
    };

    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        open_victim(SHM, true);
        send_segment(0, SEGMENT, SEGMENT, 1);
        send_table(bad[i].kind, &bad[i].table, &good, 1, 0);
        CHECK_EQUAL(outcome(), EPROTO);
        close_victim();
    }
    for (uint32_t length = 0; length < BLOCK_TABLE_BYTES; length++) {
        const struct frame_header header = {.kind = SHMRPC_ITEM, .flags = SHMRPC_FLAG_BLOCKS,
                                            .length = length, .total_bytes = length};
        open_victim(SHM, true);
        CHECK_EQUAL(hand_send(&hand, &header, &good), 0);
        CHECK_EQUAL(outcome(), EPROTO);
        close_victim();
    }
}

/* Blocks count for the receiver's limit, as the message that refers to them does. */
TEST(more_than_the_receiver_accepts)
{
    struct block_entry entries[3] = {good, good, good};

    for (uint32_t count = 1; count <= 3; count++) {
        const struct block_table table = {.count = count};
        for (uint32_t i = 0; i < count; i++)
            entries[i] = (struct block_entry){.bytes = SEGMENT - 4096, .segment = 0};
        open_victim(SHM, true);
        send_segment(0, SEGMENT, SEGMENT, 1);
        send_table(SHMRPC_ITEM, &table, entries, count, 100);
        CHECK_EQUAL(outcome(), count == 3 ? EPROTO : 0);
        close_victim();
    }
}

/* Over a socket there is no shared memory to refer to. */
TEST(blocks_over_a_socket)
{
    open_victim(STREAM, true);
    send_entry(&good);
    CHECK_EQUAL(outcome(), EPROTO);
    close_victim();
}

/* ---- returns ---- */

enum { LENT = 20000 };

static void add_segment(void)
{
    int fd = memory_fd(SEGMENT);
    void *memory = shmrpc_memory_map(fd, SEGMENT);

    REQUIRE(memory != NULL && shmrpc_arena_add(slot, memory, fd) == 0);
    close(fd);
}

/* The victim sends these bytes in a block. */
static struct block_entry lend_bytes(const uint8_t *data)
{
    struct block_entry entry = {0};

    CHECK(shmrpc_attach(slot, data, LENT) >= 0);
    CHECK_EQUAL(shmrpc_send_item(slot, 0, 7 << 16, NULL, 0), 0);
    uint8_t frame[BLOCK_TABLE_BYTES + BLOCK_ENTRY_BYTES];
    struct frame_header header;
    REQUIRE(hand_receive(&hand, &header, frame, sizeof frame) == 1);
    CHECK_EQUAL(header.length, sizeof frame);
    memcpy(&entry, frame + BLOCK_TABLE_BYTES, sizeof entry);
    CHECK_EQUAL(entry.bytes, LENT);
    return entry;
}

static struct block_entry lend_entry(void)
{
    static uint8_t data[LENT];

    for (uint32_t i = 0; i < LENT; i++)
        data[i] = (uint8_t)(i / 7);
    add_segment();
    return lend_bytes(data);
}

static struct block_name lend(void)
{
    const struct block_entry entry = lend_entry();

    return (struct block_name){entry.index, entry.generation};
}

/* A peer that sends a part of a block back which it has, and others that it has not. */
TEST(blocks_that_come_back)
{
    for (int manner = 0; manner < 14; manner++) {
        open_victim(SHM, true);
        struct block_entry entry = lend_entry();
        const struct block_name name = {entry.index, entry.generation};
        entry.owner = BLOCK_YOURS;
        switch (manner) {
        case 0: /* these two are right */
            break;
        case 1:
            entry.offset += 100;
            entry.bytes = 7000;
            break;
        case 2:
            entry.generation++;
            break;
        case 3: /* a free one */
            entry.index++;
            break;
        case 4:
            entry.index = 1u << 31;
            break;
        case 5:
            entry.segment++;
            break;
        case 6:
            entry.offset--;
            break;
        case 7:
            entry.bytes += 256;
            break;
        case 8:
            entry.offset += 20224;
            break;
        case 9:
            entry.bytes = UINT64_MAX;
            break;
        case 10:
            entry.offset = UINT64_MAX;
            break;
        case 11:
            entry.bytes = 0;
            break;
        case 12:
            entry = (struct block_entry){.bytes = 50, .segment = BLOCK_INLINE, .owner = BLOCK_YOURS};
            break;
        default: /* one that it has given back */
            send_returns(&name, sizeof name);
        }
        send_entry(&entry);
        CHECK_EQUAL(outcome(), manner < 2 ? 0 : EPROTO);
        close_victim();
    }
}

static const shmrpc_block *receive_block(void)
{
    CHECK_EQUAL(shmrpc_wait_events(slot, -1), SHMRPC_EVENTS);
    REQUIRE(shmrpc_take(slot) == 1 && shmrpc_slot_message(slot)->block_count == 1);
    return shmrpc_slot_message(slot)->blocks;
}

/* A block that has come back is used until its last user has let go, whatever the peer does. */
TEST(a_block_of_ours_is_used_on)
{
    shmrpc_arena_stats stats;

    open_victim(SHM, true);
    struct block_entry entry = lend_entry();
    const struct block_name name = {entry.index, entry.generation};
    entry.owner = BLOCK_YOURS;
    entry.offset += 700;
    entry.bytes = LENT - 700;
    send_entry(&entry);
    send_returns(&name, sizeof name);
    const shmrpc_block *block = receive_block();
    CHECK_EQUAL(block->bytes, LENT - 700);
    CHECK_EQUAL(block->data[0], 100);
    CHECK_EQUAL(block->loaned, 0);
    const uint8_t *data = block->data;
    shmrpc_lease *lease = shmrpc_lease_take(slot, 0);
    shmrpc_take(slot);
    CHECK_EQUAL(shmrpc_arena_stats_of(poller, conn_id, &stats), 0);
    CHECK_EQUAL(stats.lent_blocks, 0);
    CHECK_EQUAL(stats.returned, 1);
    CHECK_EQUAL(stats.leases, 1);
    /* Sent once more it is no copy: the same block. */
    CHECK_EQUAL(shmrpc_attach(slot, data, 5000), 0);
    shmrpc_lease_free(lease, NULL);
    CHECK_EQUAL(shmrpc_arena_stats_of(poller, conn_id, &stats), 0);
    CHECK_EQUAL(stats.returned, 0);
    CHECK(stats.used_bytes != 0);
    CHECK_EQUAL(data[0], 100);
    shmrpc_detach(slot);
    CHECK_EQUAL(shmrpc_arena_stats_of(poller, conn_id, &stats), 0);
    CHECK_EQUAL(stats.used_bytes, 0);
    close_victim();
}

/* What lies in a loan can change: whoever gets it back has to copy it. */
TEST(a_loan_that_comes_back)
{
    shmrpc_loan *loan;
    uint8_t *data;

    open_victim(SHM, true);
    add_segment();
    CHECK_EQUAL(shmrpc_loan_new(slot, LENT, &loan, &data), 0);
    struct block_entry entry = lend_bytes(data);
    entry.owner = BLOCK_YOURS;
    send_entry(&entry);
    CHECK_EQUAL(receive_block()->loaned, 1);
    shmrpc_loan_free(loan, NULL);
    send_entry(&entry);
    CHECK_EQUAL(receive_block()->loaned, 0); /* nobody writes there any more */
    close_victim();
}

/* What the peer has lent us goes back as it is, and is ours until that was sent. */
TEST(a_block_of_the_peer_is_sent_back)
{
    struct frame_header header;
    struct block_entry entry;
    uint8_t frame[BLOCK_TABLE_BYTES + BLOCK_ENTRY_BYTES];
    struct block_name name;

    open_victim(SHM, true);
    send_segment(0, SEGMENT, SEGMENT, 1);
    send_entry(&good);
    const uint8_t *data = receive_block()->data;
    shmrpc_lease *lease = shmrpc_lease_take(slot, 0);
    shmrpc_take(slot);
    CHECK_EQUAL(shmrpc_attach(slot, data + 10, 4500), 0);
    shmrpc_lease_free(lease, NULL);
    CHECK_EQUAL(hand_receive(&hand, &header, frame, sizeof frame), 0);
    CHECK_EQUAL(shmrpc_send_item(slot, 0, 7 << 16, NULL, 0), 0);
    REQUIRE(hand_receive(&hand, &header, frame, sizeof frame) == 1);
    CHECK_EQUAL(header.kind, SHMRPC_ITEM);
    memcpy(&entry, frame + BLOCK_TABLE_BYTES, sizeof entry);
    const struct block_entry expected = {.offset = good.offset + 10,
                                         .bytes = 4500,
                                         .index = good.index,
                                         .generation = good.generation,
                                         .owner = BLOCK_YOURS};
    CHECK_EQUAL(memcmp(&entry, &expected, sizeof entry), 0);
    REQUIRE(hand_receive(&hand, &header, &name, sizeof name) == 1);
    CHECK_EQUAL(header.kind, SHMRPC_RETURN);
    CHECK_EQUAL(name.index, good.index);
    close_victim();
}

TEST(returns)
{
    for (int manner = 0; manner < 10; manner++) {
        open_victim(SHM, true);
        struct block_name name = lend();
        struct block_name names[3] = {name, name, name};
        uint32_t bytes = sizeof name;
        switch (manner) {
        case 0: /* the only one that is right */
            break;
        case 1: /* twice */
            bytes = 2 * sizeof name;
            break;
        case 2:
            names[0].generation++;
            break;
        case 3:
            names[0].index++;
            break;
        case 4:
            names[0].index = 1u << 31;
            break;
        case 5:
            bytes = 0;
            break;
        case 6:
            bytes = 12;
            break;
        case 7: /* a segment that was not withdrawn, or never was */
            names[0] = (struct block_name){BLOCK_INLINE, 0};
            break;
        case 8:
            names[0] = (struct block_name){BLOCK_INLINE, 77};
            break;
        default: /* again later */
            send_returns(names, bytes);
            CHECK_EQUAL(outcome(), 0);
        }
        send_returns(names, bytes);
        CHECK_EQUAL(outcome(), manner == 0 ? 0 : EPROTO);
        close_victim();
    }
}

TEST(returns_over_a_socket)
{
    const struct frame_header header = {.kind = SHMRPC_RETURN, .length = 8, .total_bytes = 8};

    open_victim(STREAM, true);
    REQUIRE(send(hand.control_fd, &header, sizeof header, MSG_NOSIGNAL) > 0);
    REQUIRE(send(hand.control_fd, &good, 8, MSG_NOSIGNAL) > 0);
    CHECK_EQUAL(outcome(), EPROTO);
    close_victim();
}

TEST(withdrawals)
{
    for (int manner = 0; manner < 4; manner++) {
        uint32_t number = manner == 1;
        struct frame_header header = {.kind = SHMRPC_WITHDRAW, .length = 4, .total_bytes = 4};
        open_victim(SHM, true);
        send_segment(0, SEGMENT, SEGMENT, 1);
        if (manner == 2)
            header.length = header.total_bytes = 3;
        REQUIRE(hand_send(&hand, &header, &number) == 0);
        if (manner == 3)
            REQUIRE(hand_send(&hand, &header, &number) == 0);
        CHECK_EQUAL(outcome(), manner == 0 ? 0 : EPROTO);
        close_victim();
    }
}

/* Not with blocks out, or it could have us map memory without end. Who reads them keeps them. */
TEST(withdrawn_while_it_is_read)
{
    const struct frame_header header = {.kind = SHMRPC_WITHDRAW, .length = 4, .total_bytes = 4};
    const uint32_t number = 0;

    open_victim(SHM, true);
    send_segment(0, SEGMENT, SEGMENT, 1);
    send_entry(&good);
    CHECK_EQUAL(shmrpc_wait_events(slot, -1), SHMRPC_EVENTS);
    REQUIRE(shmrpc_take(slot) == 1);
    const uint8_t *data = shmrpc_slot_message(slot)->blocks[0].data;
    shmrpc_lease *lease = shmrpc_lease_take(slot, 0);
    REQUIRE(hand_send(&hand, &header, &number) == 0);
    CHECK_EQUAL(outcome(), EPROTO);
    CHECK_EQUAL(data[0] | data[4999], 0);
    shmrpc_lease_free(lease, data);
    close_victim();
}

/* ---- segments ---- */

TEST(segments_that_are_right)
{
    for (int transport = SHM; transport <= SHM_SOCKET_BELLS; transport++) {
        open_victim((enum transport)transport, false);
        send_control("\0\0\0", 3, NULL, 0); /* bells */
        for (uint32_t number = 0; number < 4; number++) {
            send_segment(number, SEGMENT, SEGMENT, 1);
            if (number % 2)
                send_control("\0\7\377", 3, NULL, 0);
        }
        CHECK_EQUAL(outcome(), 0);
        CHECK_EQUAL(load_relaxed(&poller_find(poller, conn_id)->lending->peer_bytes), 4 * SEGMENT);
        close_victim();
    }
}

/* A record may come in two, its descriptor with the first byte. */
TEST(a_record_in_pieces)
{
    const struct memory_record record = {.mark = MEMORY_MARK, .number = 0, .bytes = SEGMENT};
    int fd = new_memory(SEGMENT, true);

    open_victim(SHM, true);
    fds_before -= 1; /* fd is closed below */
    send_control(&record, 5, &fd, 1);
    CHECK_EQUAL(outcome(), 0);
    send_control((const uint8_t *)&record + 5, sizeof record - 5, NULL, 0);
    CHECK_EQUAL(outcome(), 0);
    close(fd);
    send_entry(&good);
    CHECK_EQUAL(outcome(), 0);
    CHECK_EQUAL(blocks, 1);
    close_victim();
}

static void send_bad_segment(int manner)
{
    struct memory_record record = {.mark = MEMORY_MARK, .number = 0, .bytes = SEGMENT};
    int fd;

    switch (manner) {
    case 0: /* no descriptor, or too many */
        send_segment(0, SEGMENT, SEGMENT, 0);
        break;
    case 1:
        send_segment(0, SEGMENT, SEGMENT, 2);
        break;
    case 2:
        send_segment(0, SEGMENT, SEGMENT, 8);
        break;
    case 3: /* not of the size it says */
        send_segment(0, SEGMENT, SEGMENT - 4096, 1);
        break;
    case 4:
        send_segment(0, SEGMENT, 2 * SEGMENT, 1);
        break;
    case 5:
        send_segment(0, 0, 0, 1);
        break;
    case 6:
        send_segment(0, 5000, 5000, 1);
        break;
    case 7: /* out of order, or twice */
        send_segment(1, SEGMENT, SEGMENT, 1);
        break;
    case 8:
        send_segment(0, SEGMENT, SEGMENT, 1);
        send_segment(0, SEGMENT, SEGMENT, 1);
        break;
    case 9: /* more than agreed, at once or bit by bit */
        send_segment(0, ARENA + 4096, ARENA + 4096, 1);
        break;
    case 10:
        send_segment(0, ARENA, ARENA, 1);
        send_segment(1, 4096, 4096, 1);
        break;
    case 11:
        send_segment(0, UINT64_MAX - 4095, SEGMENT, 1);
        break;
    case 12: /* more segments than there may be */
        for (uint32_t number = 0; number <= ARENA_SEGMENTS_MAX; number++)
            send_segment(number, 4096, 4096, 1);
        break;
    case 13: /* a descriptor of something else */
        send_control(&record, sizeof record, &hand.control_fd, 1);
        break;
    case 14: /* or one with a bell */
        fd = new_memory(SEGMENT, true);
        send_control("\0", 1, &fd, 1);
        close(fd);
        break;
    case 15: /* another before the first has its record */
        fd = new_memory(SEGMENT, true);
        send_control(&record, 4, &fd, 1);
        send_control((uint8_t *)&record + 4, sizeof record - 4, &fd, 1);
        close(fd);
        break;
    default:
        record.reserved[1] = 1;
        fd = new_memory(SEGMENT, true);
        send_control(&record, sizeof record, &fd, 1);
        close(fd);
    }
}

TEST(segments_that_are_wrong)
{
    for (int manner = 0; manner <= 16; manner++) {
        for (int transport = SHM; transport <= SHM_SOCKET_BELLS; transport++) {
            open_victim((enum transport)transport, false);
            send_bad_segment(manner);
            int error = outcome();
            if (error != EPROTO)
                fprintf(stderr, "manner %d\n", manner);
            CHECK_EQUAL(error, EPROTO);
            close_victim();
        }
    }
}

/* Another uid could cut off what is not sealed while we read it. */
TEST(unsealed_memory_of_a_stranger)
{
    const struct memory_record record = {.mark = MEMORY_MARK, .number = 0, .bytes = SEGMENT};

    for (int trusted = 0; trusted < 2; trusted++) {
        int fd = new_memory(SEGMENT, false);
        open_victim(SHM, trusted);
        fds_before -= 1;
        send_control(&record, sizeof record, &fd, 1);
        close(fd);
        CHECK_EQUAL(outcome(), trusted ? 0 : EPROTO);
        close_victim();
    }
}

/* The peer ends with half a record sent: its descriptor is closed. */
static atomic_u64 flooding;

static void *flood(void *unused)
{
    static const uint8_t bells[65536];

    (void)unused;
    while (load_relaxed(&flooding) != 0)
        if (send(hand.control_fd, bells, sizeof bells, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            sched_yield();
    return NULL;
}

/* Bells without end keep nobody from the rest, nor from a deadline. */
TEST(bells_without_end)
{
    pthread_t thread;

    open_victim(SHM_SOCKET_BELLS, true);
    store_relaxed(&flooding, 1);
    REQUIRE(pthread_create(&thread, NULL, flood, NULL) == 0);
    for (int i = 0; i < 20; i++) {
        int64_t result = shmrpc_wait_events(slot, 1000000);
        CHECK(result == -ETIMEDOUT || result == -EAGAIN);
    }
    send_segment(0, SEGMENT, SEGMENT, 1); /* among them */
    send_entry(&good);
    int64_t result;
    while ((result = shmrpc_wait_events(slot, -1)) == -EAGAIN)
        ;
    CHECK_EQUAL(result, SHMRPC_EVENTS);
    REQUIRE(shmrpc_take(slot) == 1);
    CHECK_EQUAL(shmrpc_slot_message(slot)->block_count, 1);
    store_relaxed(&flooding, 0);
    pthread_join(thread, NULL);
    close_victim();
}

TEST(half_a_record_and_the_end)
{
    const struct memory_record record = {.mark = MEMORY_MARK, .number = 0, .bytes = SEGMENT};
    int fd = new_memory(SEGMENT, true);

    open_victim(SHM, true);
    fds_before -= 1;
    send_control(&record, 7, &fd, 1);
    close(fd);
    shutdown(hand.control_fd, SHUT_RDWR);
    CHECK_EQUAL(outcome(), EPIPE);
    close_victim();
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
