/* fuzz_blocks.c - a peer that says anything about blocks: tables, returns, segments, withdrawals,
 * nearly right as often as not, between calls of an end that lends, borrows and gives back. */
#define _GNU_SOURCE
#include "fuzzing.h"

#include <sys/socket.h>
#include <unistd.h>

#include "segment.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

enum { LEASES = 16, LOANS = 4, SEEN = 8, ARENA = 1 << 20 };

struct user {
    shmrpc_poller *poller;
    shmrpc_slot *slot;
    uint64_t conn_id;
    shmrpc_lease *leases[LEASES];
    shmrpc_loan *loans[LOANS];
    uint8_t *loan_data[LOANS];
    unsigned lease_count, loan_count;
    struct block_name seen[SEEN]; /* what the peer was lent last */
    unsigned seen_count;
    uint32_t next_segment; /* of the peer's */
};

/* ---- the end under test ---- */

static void keep_leases(struct user *user)
{
    const shmrpc_message *message = shmrpc_slot_message(user->slot);

    victim_look(message);
    for (uint32_t i = 0; i < message->block_count; i++) {
        const shmrpc_block *block = &message->blocks[i];
        static volatile uint8_t sum;
        if (block->bytes != 0)
            sum = (uint8_t)(sum ^ block->data[0] ^ block->data[block->bytes - 1]);
        if (block->lease != NULL && user->lease_count < LEASES)
            user->leases[user->lease_count++] = shmrpc_lease_take(user->slot, i);
    }
}

static void heat_user(struct user *user)
{
    struct conn *conn = poller_find(user->poller, user->conn_id);

    if (conn != NULL && load_relaxed(&conn->error) == 0)
        poller_heat(user->poller, conn);
}

static void read_events(struct user *user)
{
    heat_user(user);
    if (shmrpc_wait_events(user->slot, 0) == SHMRPC_EVENTS)
        while (shmrpc_take(user->slot))
            keep_leases(user);
}

static void grow(struct user *user, uint64_t bytes)
{
    uint64_t wants = shmrpc_arena_wants(user->slot, bytes);

    if (wants == 0)
        return;
    int fd = memory_fd(wants);
    void *memory = shmrpc_memory_map(fd, wants);
    if (memory == NULL)
        __builtin_trap();
    if (shmrpc_arena_add(user->slot, memory, fd) < 0)
        shmrpc_memory_unmap(memory);
    close(fd);
}

static void check_arena(struct user *user)
{
    shmrpc_arena_stats stats;

    if (shmrpc_arena_stats_of(user->poller, user->conn_id, &stats) < 0)
        return;
    if (stats.used_bytes > stats.bytes || stats.bytes > ARENA || stats.peer_bytes > ARENA ||
        stats.lent_bytes > stats.used_bytes || stats.loans != user->loan_count ||
        stats.leases < user->lease_count)
        __builtin_trap();
}

static void use(struct user *user, uint64_t choice)
{
    static uint8_t data[200000];
    uint64_t bytes = choice * 700 + 1;

    switch (choice % 8) {
    case 0:
        if (user->lease_count != 0)
            shmrpc_lease_free(user->leases[--user->lease_count], NULL);
        break;
    case 1:
        if (user->loan_count < LOANS) {
            unsigned i = user->loan_count;
            int status =
                shmrpc_loan_new(user->slot, bytes, &user->loans[i], &user->loan_data[i]);
            user->loan_count += status == 0;
            if (status == SHMRPC_GROW)
                grow(user, bytes);
        }
        break;
    case 2:
        if (user->loan_count != 0) {
            user->loan_count--;
            shmrpc_loan_free(user->loans[user->loan_count], NULL);
        }
        break;
    case 3:
        shmrpc_arena_trim(user->poller, user->conn_id, 0);
        break;
    case 4:
        shmrpc_wait_blocks(user->slot, bytes, 0);
        shmrpc_abandon(user->slot);
        break;
    default: /* one or two buffers, perhaps of a loan */
        shmrpc_attach(user->slot, NULL, 0);
        for (unsigned i = 0; i <= choice % 2; i++) {
            bool lent = user->loan_count != 0 && choice > 128;
            const uint8_t *source = lent ? user->loan_data[0] : data;
            if (shmrpc_attach(user->slot, source, lent ? 1 : bytes) == SHMRPC_GROW)
                grow(user, bytes);
        }
        if (choice % 16 == 5)
            shmrpc_detach(user->slot);
        shmrpc_send_item(user->slot, 0, 3 << 16, (const char *)data, choice);
    }
}

/* ---- the peer ---- */

/* Take what was sent, and note what was lent. */
static void drain(struct hand *hand, struct user *user)
{
    uint8_t payload[BLOCK_TABLE_BYTES + BLOCK_ENTRY_BYTES];
    struct frame_header header;

    while (hand_receive(hand, &header, payload, sizeof payload) == 1) {
        struct block_entry entry;
        if ((header.flags & SHMRPC_FLAG_BLOCKS) == 0 || header.length < sizeof payload)
            continue;
        memcpy(&entry, payload + BLOCK_TABLE_BYTES, sizeof entry);
        if (entry.segment != BLOCK_INLINE)
            user->seen[user->seen_count++ % SEEN] =
                (struct block_name){entry.index, entry.generation};
    }
}

static void send_return(struct input *input, struct hand *hand, const struct user *user)
{
    uint64_t shape = input_number(input, 1);
    struct block_name names[2];
    struct frame_header header = {.kind = SHMRPC_RETURN, .length = sizeof *names};

    for (int i = 0; i < 2; i++)
        names[i] = user->seen[(shape + (uint64_t)i) % SEEN];
    if (shape & 16)
        names[0].generation += (uint32_t)input_number(input, 1);
    if (shape & 32)
        names[0].index = (uint32_t)input_number(input, shape & 64 ? 4 : 1);
    if (shape & 128)
        header.length = (uint32_t)input_number(input, 1) % (2 * sizeof *names + 1);
    header.total_bytes = header.length;
    hand_send(hand, &header, names);
}

static void send_withdrawal(struct input *input, struct hand *hand, const struct user *user)
{
    uint64_t shape = input_number(input, 1);
    const uint32_t number = user->next_segment - (uint32_t)(shape % 4);
    struct frame_header header = {.kind = SHMRPC_WITHDRAW, .length = 4};

    if (shape > 200)
        header.length = (uint32_t)shape % 5;
    header.total_bytes = header.length;
    hand_send(hand, &header, &number);
}

static void send_segment(struct input *input, struct hand *hand, struct user *user)
{
    uint64_t shape = input_number(input, 1);
    uint64_t bytes = 4096 * (shape % 32);
    struct memory_record record = {
        .mark = MEMORY_MARK, .number = user->next_segment, .bytes = bytes};
    union {
        struct cmsghdr header;
        uint8_t bytes[CMSG_SPACE(2 * sizeof(int))];
    } control;
    uint8_t raw[sizeof record];
    struct iovec part = {raw, sizeof raw};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    int fd = memory_fd(shape & 32 ? bytes + 4096 : bytes);
    const int fds[2] = {fd, fd};

    memcpy(raw, &record, sizeof raw);
    if (shape & 64)
        input_bytes(input, raw, sizeof raw);
    if (shape & 128)
        part.iov_len = 1 + input_number(input, 1) % sizeof raw;
    if (shape % 7 != 6) {
        size_t size = shape % 7 == 5 ? sizeof fds : sizeof *fds;
        memset(&control, 0, sizeof control);
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(size), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), fds, size);
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(size);
    }
    if (sendmsg(hand->control_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        user->next_segment++;
    close(fd);
}

static void send_message(struct input *input, struct hand *hand, const struct user *user)
{
    static const uint8_t kinds[] = {SHMRPC_REQUEST, SHMRPC_REPLY, SHMRPC_NOTIFY, SHMRPC_ITEM};
    uint64_t shape = input_number(input, 1);
    uint32_t count = (uint32_t)(shape % 3);
    struct block_table table = {.count = count};
    uint8_t payload[BLOCK_TABLE_BYTES + 2 * BLOCK_ENTRY_BYTES + 600];
    struct frame_header header = {
        .kind = kinds[shape >> 2 & 3],
        .flags = SHMRPC_FLAG_BLOCKS,
        .call_id = 3 << 16 | SHMRPC_PYTHON_INDEX,
    };
    uint32_t length = 0;

    memset(payload, 'a', sizeof payload);
    if (header.kind == SHMRPC_REQUEST || header.kind == SHMRPC_NOTIFY)
        header.method_bytes = 1, length = 1;
    if (shape & 16)
        table.count = (uint32_t)input_number(input, 4);
    memcpy(payload + length, &table, sizeof table);
    length += BLOCK_TABLE_BYTES;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t what = input_number(input, 1);
        struct block_entry entry = {
            .offset = 256 * input_number(input, 1),
            .bytes = input_number(input, 2),
            .segment = what & 1 ? BLOCK_INLINE : user->next_segment - (uint32_t)(what >> 4),
            .index = (uint32_t)i,
        };
        if (entry.segment == BLOCK_INLINE)
            entry.offset = entry.index = 0, entry.bytes %= 200;
        if (what & 2)
            input_bytes(input, (uint8_t *)&entry, sizeof entry);
        memcpy(payload + length, &entry, sizeof entry);
        length += BLOCK_ENTRY_BYTES;
    }
    header.length = length + (uint32_t)input_number(input, 1) * 2;
    header.total_bytes = header.length;
    if (shape & 32)
        header.metadata_bytes = (uint32_t)input_number(input, 1);
    if (shape & 64)
        header.total_bytes += (uint32_t)input_number(input, 2);
    if (shape & 128)
        header.flags |= SHMRPC_FLAG_MORE;
    hand_send(hand, &header, payload);
}

static void step(struct input *input, struct hand *hand, struct user *user)
{
    uint64_t operation = input_number(input, 1);

    switch (operation % 10) {
    case 0:
        send_return(input, hand, user);
        break;
    case 1:
        send_segment(input, hand, user);
        break;
    case 2:
    case 3:
        send_message(input, hand, user);
        break;
    case 4:
        send_withdrawal(input, hand, user);
        break;
    case 5:
        drain(hand, user);
        break;
    case 6:
    case 7:
        use(user, input_number(input, 1));
        break;
    default:
        read_events(user);
    }
    check_arena(user);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count)
{
    struct input input = {bytes, count};
    struct pair pair;
    struct hand hand;
    struct user user = {0};
    uint64_t shape = input_number(&input, 1);

    pair_open(&pair, shape & 1 ? SHM : SHM_SOCKET_BELLS, 4096, 4096u << (shape >> 1 & 1));
    pair.options[0].max_message_bytes = 1 << 20;
    pair.options[0].arena_max_bytes = pair.options[0].peer_arena_max_bytes = ARENA;
    hand_open(&hand, &pair);
    user.poller = shmrpc_poller_new(0, 0, WAIT_AUTO, 1);
    shmrpc_poller_serve_events(user.poller, 0);
    user.conn_id = pair_give(&pair, 0, user.poller);
    user.slot = shmrpc_slot_new(user.poller, user.conn_id);
    REQUIRE(user.slot != NULL);
    for (int i = 0; i < 200 && input.left != 0; i++)
        step(&input, &hand, &user);
    if (shape & 4)
        while (user.lease_count != 0)
            shmrpc_lease_free(user.leases[--user.lease_count], NULL);
    shmrpc_slot_free(user.slot);
    shmrpc_poller_free(user.poller);
    while (user.lease_count != 0)
        shmrpc_lease_free(user.leases[--user.lease_count], NULL);
    while (user.loan_count != 0)
        shmrpc_loan_free(user.loans[--user.loan_count], NULL);
    guarded_munmap((void *)(uintptr_t)hand.peer, segment_bytes(4096));
    pair_close(&pair);
    return 0;
}
