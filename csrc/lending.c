/* lending.c - see lending.h. */
#define _GNU_SOURCE
#include "lending.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "conn.h"
#include "forks.h"

/* Whether this is a forked child, where a thread that it does not have may hold any lock. */
static bool inherited(const struct lending *lending)
{
    return forks_seen() != lending->forks;
}

/* ---- beginning and end ---- */

struct lending *lending_new(struct conn *conn, uint64_t own_max, uint64_t peer_max, bool trusted)
{
    struct lending *lending = calloc(1, sizeof *lending);

    if (lending == NULL)
        return NULL;
    forks_watch();
    pthread_mutex_init(&lending->lock, NULL);
    arena_init(&lending->arena);
    store_relaxed(&lending->references, 1);
    lending->forks = forks_seen();
    lending->conn = conn;
    lending->own_max = own_max;
    lending->peer_max = peer_max;
    lending->peer_trusted = trusted;
    lending->record_fd = -1;
    return lending;
}

static void lending_unref(struct lending *lending)
{
    if (!reference_drop(&lending->references))
        return;
    pthread_mutex_destroy(&lending->lock);
    free(lending);
}

void lending_end(struct lending *lending)
{
    pthread_mutex_lock(&lending->lock);
    lending->conn = NULL;
    arena_free(&lending->arena);
    for (int i = 0; i < ARENA_SEGMENTS_MAX; i++) {
        if (lending->own[i] != NULL)
            memory_unref(lending->own[i]);
        lending->own[i] = NULL;
    }
    pthread_mutex_unlock(&lending->lock);
    for (uint32_t i = 0; i < lending->peer_count; i++)
        memory_unref(lending->peer[i].memory);
    lending->peer_count = 0;
    if (lending->record_fd >= 0)
        close(lending->record_fd);
    lending_unref(lending);
}

/* ---- segments of the peer's ---- */

enum { CONTROL_READS_MAX = 256, CONTROL_READ_BYTES = 4096 };

struct memory *lending_peer_memory(const struct lending *lending, uint32_t number)
{
    for (uint32_t i = 0; i < lending->peer_count; i++)
        if (lending->peer[i].number == number)
            return lending->peer[i].memory;
    return NULL;
}

/* A record is complete: map what came with it. */
static int take_segment(struct lending *lending)
{
    const struct memory_record record = lending->record;
    static const uint8_t zero[sizeof record.reserved];
    uint64_t bytes = load_relaxed(&lending->peer_bytes);
    struct memory *memory;

    if (lending->record_fd < 0 || record.number != lending->peer_next ||
        memcmp(record.reserved, zero, sizeof zero) != 0 || record.bytes == 0 ||
        record.bytes % MEMORY_PAGE != 0 || record.bytes > lending->peer_max - bytes ||
        lending->peer_count == ARENA_SEGMENTS_MAX)
        return -EPROTO;
    int status =
        memory_map_peer(lending->record_fd, record.bytes, lending->peer_trusted, &memory);
    close(lending->record_fd);
    lending->record_fd = -1;
    lending->record_bytes = 0;
    if (status < 0)
        return status == -ENOMEM ? status : -EPROTO;
    lending->peer[lending->peer_count].memory = memory;
    lending->peer[lending->peer_count++].number = record.number;
    lending->peer_next++;
    store_relaxed(&lending->peer_bytes, bytes + record.bytes);
    return 0;
}

static int take_bytes(struct lending *lending, const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (lending->record_bytes == 0 && bytes[i] != MEMORY_MARK)
            continue; /* a bell */
        ((uint8_t *)&lending->record)[lending->record_bytes++] = bytes[i];
        int status = lending->record_bytes == MEMORY_RECORD_BYTES ? take_segment(lending) : 0;
        if (status < 0)
            return status;
    }
    return 0;
}

/* The one descriptor that a record has; all others are closed, and a violation. */
static int take_descriptors(struct lending *lending, struct msghdr *message)
{
    int status = (message->msg_flags & MSG_CTRUNC) != 0 ? -EPROTO : 0;

    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL;
         part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (lending->record_fd >= 0) {
                close(fd);
                status = -EPROTO;
            } else {
                lending->record_fd = fd;
            }
        }
    }
    return status;
}

int lending_read_control(struct lending *lending, int control_fd)
{
    /* So much is more than the socket can hold, and so finds the record that came before what we
     * look for it. A peer that rings on and on keeps nobody here: epoll tells again. */
    for (int i = 0; i < CONTROL_READS_MAX; i++) {
        uint8_t bytes[CONTROL_READ_BYTES];
        union {
            struct cmsghdr align;
            uint8_t bytes[CMSG_SPACE(sizeof(int))];
        } control;
        struct iovec part = {bytes, sizeof bytes};
        struct msghdr message = {.msg_iov = &part,
                                 .msg_iovlen = 1,
                                 .msg_control = &control,
                                 .msg_controllen = sizeof control};
        ssize_t received = recvmsg(control_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (received < 0 && errno == EINTR)
            continue;
        if (received < 0)
            return errno == EAGAIN ? 0 : -EPIPE;
        int status = take_descriptors(lending, &message);
        if (status == 0)
            status = take_bytes(lending, bytes, (size_t)received);
        if (status < 0)
            return status;
        if (received == 0)
            return -EPIPE;
        if (lending->record_bytes == 0 && lending->record_fd >= 0)
            return -EPROTO; /* a descriptor that belongs to no record */
    }
    return 0;
}

int lending_withdrawn(struct lending *lending, uint32_t number)
{
    uint32_t i = 0;

    while (i < lending->peer_count && lending->peer[i].number != number)
        i++;
    if (i == lending->peer_count)
        return -EPROTO;
    struct memory *memory = lending->peer[i].memory;
    if (load_acquire(&memory->references) != 1)
        return -EBUSY; /* or it could have us map more than was agreed */
    lending->peer[i] = lending->peer[--lending->peer_count];
    store_relaxed(&lending->peer_bytes, load_relaxed(&lending->peer_bytes) - memory->bytes);
    memory_unref(memory);
    return 0;
}

/* ---- leases ---- */

/* With the lock held. */
static void add_lease(struct lending *lending, shmrpc_lease *lease)
{
    memory_ref(lease->memory);
    reference_take(&lending->references);
    lease->next = lending->leases;
    if (lease->next != NULL)
        lease->next->previous = lease;
    lending->leases = lease;
    if (lease->entry.owner == BLOCK_YOURS) {
        lending->back_count++;
        lending->back_bytes += lease->entry.bytes;
    }
    count_add(&lending->lease_count, 1);
    count_add(&lending->lease_bytes, lease->entry.bytes);
}

int lending_lease(struct lending *lending, struct memory *memory, const struct block_entry *entry,
                  shmrpc_block *block)
{
    shmrpc_lease *lease = malloc(sizeof *lease);

    if (lease == NULL)
        return -ENOMEM;
    *lease = (shmrpc_lease){.lending = lending,
                            .memory = memory,
                            .data = memory->base + entry->offset,
                            .entry = *entry,
                            .uses = 1};
    pthread_mutex_lock(&lending->lock);
    add_lease(lending, lease);
    pthread_mutex_unlock(&lending->lock);
    *block = (shmrpc_block){.data = lease->data, .bytes = entry->bytes, .lease = lease};
    return 0;
}

int lending_reclaim(struct lending *lending, const struct block_entry *entry, shmrpc_block *block)
{
    shmrpc_lease *lease = malloc(sizeof *lease);
    uint8_t *data;
    bool loaned;

    if (lease == NULL)
        return -ENOMEM;
    pthread_mutex_lock(&lending->lock);
    int status = arena_reclaim(&lending->arena, entry, &data, &loaned);
    if (status == 0) {
        *lease = (shmrpc_lease){
            .lending = lending,
            .memory = lending->own[lending->arena.extents[entry->index].segment],
            .data = data,
            .entry = *entry,
            .uses = 1};
        add_lease(lending, lease);
    }
    pthread_mutex_unlock(&lending->lock);
    if (status < 0) {
        free(lease);
        return status == -EOVERFLOW ? -ENOMEM : status;
    }
    *block = (shmrpc_block){
        .data = data, .bytes = entry->bytes, .lease = lease, .loaned = loaned};
    return 0;
}

enum { LEASE_LOOKS = 32 }; /* who has more of them copies what it passes on of the older ones */

shmrpc_lease *lending_find_lease(const struct lending *lending, const uint8_t *data,
                                 uint64_t bytes)
{
    shmrpc_lease *lease = lending->leases;

    for (int i = 0; i < LEASE_LOOKS && lease != NULL; i++, lease = lease->next)
        if (data >= lease->data && bytes <= lease->entry.bytes &&
            (uint64_t)(data - lease->data) <= lease->entry.bytes - bytes)
            return lease;
    return NULL;
}

/* One use less; whether it was the last, after which nobody finds the lease any more. */
static bool last_use(struct lending *lending, shmrpc_lease *lease)
{
    pthread_mutex_lock(&lending->lock);
    bool last = --lease->uses == 0;
    if (last) {
        *(lease->previous != NULL ? &lease->previous->next : &lending->leases) = lease->next;
        if (lease->next != NULL)
            lease->next->previous = lease->previous;
        if (lease->entry.owner == BLOCK_YOURS) {
            lending->back_count--;
            lending->back_bytes -= lease->entry.bytes;
        }
    }
    pthread_mutex_unlock(&lending->lock);
    return last;
}

/* With the lock held: to the peer, or to our arena. */
static void give_back(struct lending *lending, const shmrpc_lease *lease)
{
    if (lease->entry.owner == BLOCK_YOURS)
        arena_drop(&lending->arena, lease->entry.index, clock_coarse_ns());
    else
        conn_return(lending->conn,
                    (struct block_name){lease->entry.index, lease->entry.generation});
}

void shmrpc_lease_free(shmrpc_lease *lease, const void *data)
{
    struct lending *lending = lease->lending;

    (void)data;
    if (!inherited(lending) && !last_use(lending, lease))
        return;
    memory_unref(lease->memory); /* before the peer can know of it, and withdraw the segment */
    if (!inherited(lending)) {
        pthread_mutex_lock(&lending->lock);
        if (lending->conn != NULL)
            give_back(lending, lease);
        pthread_mutex_unlock(&lending->lock);
    }
    count_subtract(&lending->lease_count, 1);
    count_subtract(&lending->lease_bytes, lease->entry.bytes);
    free(lease);
    lending_unref(lending);
}

int shmrpc_loan_free(shmrpc_loan *loan, const void *data)
{
    struct lending *lending = loan->lending;
    int waited = 0;

    (void)data;
    if (!inherited(lending)) {
        pthread_mutex_lock(&lending->lock);
        if (lending->conn != NULL) {
            lending->arena.extents[loan->place.index].loaned = false;
            arena_drop(&lending->arena, loan->place.index, clock_coarse_ns());
            /* Who says so after this looks for room with the lock held, and finds it. */
            waited = load_relaxed(&lending->wanted) != 0;
        }
        if (loan->previous != NULL)
            loan->previous->next = loan->next;
        else
            lending->loans = loan->next;
        if (loan->next != NULL)
            loan->next->previous = loan->previous;
        lending->loan_count--;
        lending->loan_bytes -= loan->place.bytes;
        pthread_mutex_unlock(&lending->lock);
    }
    memory_unref(loan->memory);
    free(loan);
    lending_unref(lending);
    return waited;
}

/* ---- our segments ---- */

static uint64_t round_up(uint64_t bytes)
{
    return bytes > UINT64_MAX - SEGMENT_STEP ? UINT64_MAX - SEGMENT_STEP + 1
                                             : (bytes + SEGMENT_STEP - 1) / SEGMENT_STEP * SEGMENT_STEP;
}

bool lending_allows(const struct lending *lending, uint64_t bytes)
{
    return round_up(bytes) <= lending->own_max;
}

uint64_t lending_wants(const struct lending *lending, uint64_t bytes)
{
    uint64_t there = lending->arena.bytes;
    uint64_t left = (lending->own_max - there) / SEGMENT_STEP * SEGMENT_STEP;
    uint64_t needed = round_up(bytes);
    uint64_t largest = round_up(lending->own_max / 32);
    uint64_t step = there > SEGMENT_BYTES_MIN ? there : SEGMENT_BYTES_MIN;

    if (needed > left || !arena_has_place(&lending->arena))
        return 0;
    if (largest < SEGMENT_BYTES_SMALL)
        largest = SEGMENT_BYTES_SMALL;
    if (step > largest)
        step = largest;
    step = round_up(step > needed ? step : needed);
    return step < left ? step : left;
}

bool lending_has_room(const struct lending *lending, uint64_t bytes)
{
    return arena_fits(&lending->arena, bytes) || lending_wants(lending, bytes) != 0;
}

/* A record and its descriptor are taken as a whole or not at all. */
static int pass_descriptor(const struct conn *conn, uint32_t number, uint64_t bytes, int fd)
{
    struct memory_record record = {.mark = MEMORY_MARK, .number = number, .bytes = bytes};
    union {
        struct cmsghdr header;
        uint8_t bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {&record, sizeof record};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};

    memset(&control, 0, sizeof control);
    control.header = (struct cmsghdr){
        .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    ssize_t sent = sendmsg(conn->control_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == (ssize_t)sizeof record)
        return 0;
    return sent < 0 ? -errno : -EPIPE;
}

int lending_add(struct lending *lending, struct memory *memory, int peer_fd, uint64_t now_ns)
{
    if (lending->conn == NULL)
        return -EPIPE;
    if (memory->bytes > lending->own_max - lending->arena.bytes)
        return -ENOSPC; /* another thread was faster */
    int place =
        arena_add(&lending->arena, memory->base, memory->bytes, lending->own_next, now_ns);
    if (place < 0)
        return place;
    int status = pass_descriptor(lending->conn, lending->own_next, memory->bytes, peer_fd);
    if (status < 0) {
        arena_close(&lending->arena, place);
        arena_remove(&lending->arena, place);
        return status;
    }
    lending->own[place] = memory;
    lending->own_next++;
    return 0;
}

void lending_withdraw(struct lending *lending, uint64_t now_ns, uint64_t quiet_ns)
{
    int place;

    if (lending->conn == NULL)
        return;
    while ((place = arena_find_idle(&lending->arena, now_ns, quiet_ns)) >= 0 &&
           conn_withdraw(lending->conn, lending->arena.segments[place].number) == 0) {
        /* Ours goes now. It counts until the peer has let go of it as well. */
        arena_close(&lending->arena, place);
        memory_unref(lending->own[place]);
        lending->own[place] = NULL;
    }
}

/* The peer has let go of a segment. */
static int let_go(struct lending *lending, uint32_t number)
{
    for (int i = 0; i < ARENA_SEGMENTS_MAX; i++) {
        const struct arena_segment *segment = &lending->arena.segments[i];
        if (segment->base == NULL || segment->number != number || !segment->closed)
            continue;
        arena_remove(&lending->arena, i);
        return 0;
    }
    return -EPROTO;
}

int lending_returned(struct lending *lending, const struct block_name *names, uint32_t count,
                     uint64_t now_ns)
{
    int status = 0;

    pthread_mutex_lock(&lending->lock);
    for (uint32_t i = 0; i < count && status == 0; i++) {
        if (names[i].index == BLOCK_INLINE)
            status = let_go(lending, names[i].generation);
        else
            status = arena_return(&lending->arena, names[i].index, names[i].generation, now_ns);
    }
    pthread_mutex_unlock(&lending->lock);
    return status;
}
