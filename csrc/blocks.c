/* blocks.c - buffers beside messages, for users: attaching them to what a slot sends next, loans,
 * room in the arena. What becomes of blocks between two conns is in lending.c.
 *
 * attach:  the buffer lies in a loan, or in a block that has come? one more use of that. Else a block
 *          is cut and the buffer copied, without a lock. No room: SHMRPC_GROW, SHMRPC_FULL. Too
 *          short, too long, or no shared memory: it goes with the body
 * send:    blocks become the peer's, before it can see the frame, and ours again if that failed
 */
#define _GNU_SOURCE
#include "poller.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct attached {
    struct block_entry *entries;
    union {
        const void *data;    /* of those that go with the body */
        shmrpc_lease *lease; /* of those that are the receiver's: a use of it */
    } *sources;
    uint32_t count, capacity;
    uint32_t sent; /* entries of the last message, which stay until others are attached */
    uint64_t inline_bytes, block_bytes;
};

/* ---- attaching ---- */

static struct lending *lending_of(const struct shmrpc_slot *slot)
{
    return slot->conn != NULL && !slot->conn->destroyed ? slot->conn->lending : NULL;
}

static int begin_attaching(struct shmrpc_slot *slot)
{
    if (slot->attached == NULL)
        slot->attached = calloc(1, sizeof *slot->attached);
    if (slot->attached == NULL)
        return -ENOMEM;
    slot->attached->sent = 0;
    slot->attaches = true;
    return 0;
}

static int reserve_entry(struct attached *attached)
{
    if (attached->count < attached->capacity)
        return 0;
    if (attached->count == BLOCKS_MAX)
        return -EMSGSIZE;
    uint32_t capacity = attached->capacity == 0 ? 8 : attached->capacity * 2;
    struct block_entry *entries = realloc(attached->entries, capacity * sizeof *entries);
    if (entries == NULL)
        return -ENOMEM;
    attached->entries = entries;
    void *sources = realloc(attached->sources, capacity * sizeof *attached->sources);
    if (sources == NULL)
        return -ENOMEM;
    attached->sources = sources;
    attached->capacity = capacity;
    return 0;
}

/* A block of our arena, and not of the receiver's. */
static bool is_ours(const struct block_entry *entry)
{
    return entry->segment != BLOCK_INLINE && entry->owner == BLOCK_MINE;
}

/* The receiver has them, or will not get them: what our user has let go of meanwhile goes back. */
static void drop_leases(struct attached *attached)
{
    for (uint32_t i = 0; i < attached->count; i++)
        if (attached->entries[i].owner == BLOCK_YOURS)
            shmrpc_lease_free(attached->sources[i].lease, NULL);
}

static void reset(struct attached *attached)
{
    attached->count = 0;
    attached->inline_bytes = attached->block_bytes = 0;
}

/* Blocks of what was not sent are free again, those of loans their owner's alone. */
void shmrpc_detach(shmrpc_slot *slot)
{
    struct attached *attached = slot->attached;
    struct lending *lending = lending_of(slot);

    if (!slot->attaches)
        return;
    slot->attaches = false;
    if (lending != NULL && attached->block_bytes != 0) {
        uint64_t now = clock_coarse_ns();
        pthread_mutex_lock(&lending->lock);
        for (uint32_t i = 0; i < attached->count && lending->conn != NULL; i++)
            if (is_ours(&attached->entries[i]))
                arena_drop(&lending->arena, attached->entries[i].index, now);
        pthread_mutex_unlock(&lending->lock);
    }
    drop_leases(attached);
    reset(attached);
}

void blocks_forget(struct shmrpc_slot *slot)
{
    shmrpc_detach(slot);
    if (slot->attached != NULL) {
        free(slot->attached->entries);
        free(slot->attached->sources);
        free(slot->attached);
        slot->attached = NULL;
    }
}

int shmrpc_attach_inline(shmrpc_slot *slot, const void *data, uint64_t bytes)
{
    int status = slot->attaches ? 0 : begin_attaching(slot);
    struct attached *attached = slot->attached;

    if (status == 0)
        status = reserve_entry(attached);
    if (status < 0)
        return status;
    if (bytes > UINT32_MAX - attached->inline_bytes)
        return -EMSGSIZE;
    attached->entries[attached->count] =
        (struct block_entry){.bytes = bytes, .segment = BLOCK_INLINE};
    attached->sources[attached->count++].data = data;
    attached->inline_bytes += bytes;
    return 1;
}

/* Whether the bytes lie in a piece of memory of this size. */
static bool lies_in(const uint8_t *data, uint64_t bytes, const uint8_t *base, uint64_t size)
{
    uintptr_t offset = (uintptr_t)data - (uintptr_t)base; /* huge if it begins before */

    return offset < size && bytes <= size - offset;
}

/* With the lock held: the loan that the bytes lie in, or null. What is in no segment of ours, as
 * nearly all, is in no loan: there may be many. */
static shmrpc_loan *find_loan(const struct lending *lending, const uint8_t *data, uint64_t bytes)
{
    bool ours = false;

    for (int i = 0; i < ARENA_SEGMENTS_MAX && lending->loans != NULL && !ours; i++)
        ours = lending->own[i] != NULL &&
               lies_in(data, bytes, lending->own[i]->base, lending->own[i]->bytes);
    for (shmrpc_loan *loan = ours ? lending->loans : NULL; loan != NULL; loan = loan->next)
        if (lies_in(data, bytes, loan->place.data, loan->place.bytes))
            return loan;
    return NULL;
}

/* With the lock held: why there is no room. */
static int no_room(const struct lending *lending, uint64_t bytes)
{
    return lending_wants(lending, bytes) != 0 ? SHMRPC_GROW : SHMRPC_FULL;
}

/* With the lock held: the block that these bytes are in already, with one more use. 1, 0 if there is
 * none, -EOVERFLOW. */
static int use_block(struct lending *lending, const uint8_t *data, uint64_t bytes,
                     struct block_entry *entry, shmrpc_lease **lease)
{
    const shmrpc_loan *loan = find_loan(lending, data, bytes);

    *lease = loan == NULL ? lending_find_lease(lending, data, bytes) : NULL;
    if (loan != NULL)
        *entry = (struct block_entry){
            .offset = loan->place.offset + (uint64_t)(data - loan->place.data),
            .segment = loan->place.number,
            .index = loan->place.index,
            .generation = loan->place.generation};
    else if (*lease != NULL)
        *entry = (*lease)->entry;
    else
        return 0;
    if (*lease != NULL) {
        entry->offset += (uint64_t)(data - (*lease)->data);
        entry->owner = BLOCK_YOURS - (*lease)->entry.owner; /* seen from the other side */
    }
    entry->bytes = bytes;
    if (entry->owner == BLOCK_YOURS) {
        (*lease)->uses++;
        return 1;
    }
    int status = arena_share(&lending->arena, entry->index);
    return status < 0 ? status : 1;
}

/* A block with these bytes, one use of which is ours: 0, 2 if it is a loan, or no room. */
static int make_block(struct lending *lending, const uint8_t *data, uint64_t bytes,
                      struct block_entry *entry, shmrpc_lease **lease)
{
    struct arena_place place;

    pthread_mutex_lock(&lending->lock);
    int status = lending->conn != NULL ? use_block(lending, data, bytes, entry, lease) : SHMRPC_FULL;
    bool used = status != 0;
    bool ahead = lending->arena.lent_bytes >= COPY_LENT_MAX;
    if (!used) {
        status = arena_alloc(&lending->arena, bytes, &place);
        if (status == -ENOSPC)
            status = no_room(lending, bytes);
    }
    pthread_mutex_unlock(&lending->lock);
    if (status < 0)
        return status;
    if (used)
        return *lease == NULL ? 2 : 0;
    copy_out(&lending->copier, place.data, data, bytes, ahead);
    *entry = (struct block_entry){.offset = place.offset,
                                  .bytes = bytes,
                                  .segment = place.number,
                                  .index = place.index,
                                  .generation = place.generation};
    return 0;
}

int shmrpc_attach(shmrpc_slot *slot, const void *data, uint64_t bytes)
{
    struct lending *lending = lending_of(slot);

    if (data == NULL) {
        shmrpc_detach(slot);
        return begin_attaching(slot);
    }
    if (lending == NULL || bytes < BLOCK_BYTES_MIN || !lending_allows(lending, bytes))
        return shmrpc_attach_inline(slot, data, bytes);
    int status = slot->attaches ? 0 : begin_attaching(slot);
    if (status == 0)
        status = reserve_entry(slot->attached);
    if (status == 0)
        status = make_block(lending, data, bytes,
                            &slot->attached->entries[slot->attached->count],
                            &slot->attached->sources[slot->attached->count].lease);
    if (status >= 0) {
        slot->attached->block_bytes += bytes;
        slot->attached->count++;
    }
    return status;
}

int shmrpc_attach_now(shmrpc_slot *slot, const void *data, uint64_t bytes)
{
    const struct lending *lending = lending_of(slot);
    bool blocks = lending != NULL && bytes >= BLOCK_BYTES_MIN && lending_allows(lending, bytes);
    int status = blocks ? shmrpc_attach(slot, data, bytes) : SHMRPC_FULL;

    if (status < 0) {
        shmrpc_detach(slot);
        return status;
    }
    int number = (int)slot->attached->count - 1;
    return status == 2 ? number | SHMRPC_LOANED : number;
}

/* ---- sending ---- */

/* The share of a block in what a stream may have under way: a window of 256 KiB is 8 MiB of them. */
enum { WEIGHT_SHIFT = 5 };

uint64_t shmrpc_attached_weight(shmrpc_slot *slot)
{
    const struct attached *attached = slot->attached;

    return slot->attaches ? attached->inline_bytes + (attached->block_bytes >> WEIGHT_SHIFT) : 0;
}

uint64_t shmrpc_message_weight(const shmrpc_message *message)
{
    uint64_t beside = 0, lent = 0;

    for (uint32_t i = 0; i < message->block_count; i++)
        *(message->blocks[i].lease == NULL ? &beside : &lent) += message->blocks[i].bytes;
    return beside + (lent >> WEIGHT_SHIFT);
}

/* Table, body, and what goes with it, in one piece. */
static uint8_t *join_body(const struct attached *attached, const struct iovec *body, size_t *bytes)
{
    const struct block_table table = {.count = attached->count};
    const size_t entries = attached->count * sizeof *attached->entries;
    uint8_t *joined =
        malloc(sizeof table + entries + body->iov_len + (size_t)attached->inline_bytes);
    uint8_t *end = joined;

    if (joined == NULL)
        return NULL;
    memcpy(end, &table, sizeof table);
    end += sizeof table;
    if (entries != 0)
        memcpy(end, attached->entries, entries);
    end += entries;
    if (body->iov_len != 0)
        memcpy(end, body->iov_base, body->iov_len);
    end += body->iov_len;
    for (uint32_t i = 0; i < attached->count; i++) {
        if (attached->entries[i].segment != BLOCK_INLINE || attached->entries[i].bytes == 0)
            continue;
        memcpy(end, attached->sources[i].data, attached->entries[i].bytes);
        end += attached->entries[i].bytes;
    }
    *bytes = (size_t)(end - joined);
    return joined;
}

/* The uses of the attached blocks become the peer's; or they end, because it never got them. It may
 * have said so before: it can guess the names of the blocks that come next. */
static void lend_all(struct shmrpc_slot *slot, bool lend)
{
    const struct attached *attached = slot->attached;
    struct lending *lending = lending_of(slot);
    uint64_t now = clock_coarse_ns();

    if (lending == NULL || attached->block_bytes == 0)
        return;
    pthread_mutex_lock(&lending->lock);
    for (uint32_t i = 0; i < attached->count && lending->conn != NULL; i++) {
        const struct block_entry *entry = &attached->entries[i];
        if (!is_ours(entry))
            continue;
        if (lend)
            arena_lend(&lending->arena, entry->index, now);
        else
            arena_return(&lending->arena, entry->index, entry->generation, now);
    }
    pthread_mutex_unlock(&lending->lock);
}

int blocks_send(struct shmrpc_slot *slot, struct outgoing *message, int body, atomic_u64 *position)
{
    struct attached *attached = slot->attached;
    size_t bytes;
    uint8_t *joined = join_body(attached, &message->parts[body], &bytes);

    if (joined == NULL) {
        shmrpc_detach(slot);
        return -ENOMEM;
    }
    message->header.flags |= SHMRPC_FLAG_BLOCKS;
    message->parts[body] = (struct iovec){joined, bytes};
    message->block_bytes = attached->block_bytes;
    lend_all(slot, true);
    int status = poller_send(slot->poller, slot->conn, message, position);
    free(joined);
    if (status < 0)
        lend_all(slot, false);
    else
        count_add(&slot->poller->beside, attached->block_bytes);
    drop_leases(attached);
    attached->sent = status < 0 ? 0 : attached->count;
    slot->attaches = false;
    reset(attached);
    return status;
}

/* ---- passing on ---- */

static int pass_block(struct shmrpc_slot *slot, const void *data, uint64_t bytes)
{
    return bytes < BLOCK_BYTES_MIN ? shmrpc_attach_inline(slot, data, bytes) /* data may be null */
                                   : shmrpc_attach(slot, data, bytes);
}

enum { ORIGINAL_LOOKS = 32 }; /* as for leases: of more, those that come later are copied */

/* Where the request had what comes back of it in this block: the peer of `slot`, which has passed the
 * request on, has sent it as a part of the block that it got. Null if that is something else. */
static const uint8_t *find_original(const struct shmrpc_slot *slot, const shmrpc_message *request,
                                    const shmrpc_block *block)
{
    const struct attached *attached = slot->attached;
    const struct block_entry *back = block->lease != NULL ? &block->lease->entry : NULL;

    if (attached == NULL || back == NULL || back->owner != BLOCK_YOURS)
        return NULL;
    for (uint32_t i = 0; i < attached->sent && i < request->block_count && i < ORIGINAL_LOOKS; i++) {
        const struct block_entry *sent = &attached->entries[i];
        const shmrpc_block *original = &request->blocks[i];
        uint64_t offset = back->offset - sent->offset; /* huge if it begins before */
        if (is_ours(sent) && original->lease != NULL && sent->bytes == original->bytes &&
            sent->index == back->index && sent->generation == back->generation &&
            offset <= sent->bytes && back->bytes <= sent->bytes - offset)
            return original->data + offset;
    }
    return NULL;
}

int blocks_pass(struct shmrpc_slot *slot, const shmrpc_message *message)
{
    int status = 0;

    if (slot->attaches)
        return 0;
    if (slot->attached != NULL)
        slot->attached->sent = 0;
    if ((message->flags & SHMRPC_FLAG_BLOCKS) == 0)
        return 0;
    status = begin_attaching(slot);
    for (uint32_t i = 0; i < message->block_count && status >= 0; i++)
        status = pass_block(slot, message->blocks[i].data, message->blocks[i].bytes);
    if (status < 0)
        shmrpc_detach(slot);
    return status < 0 ? status : 0;
}

int blocks_pass_back(struct shmrpc_slot *worker, const struct shmrpc_slot *slot)
{
    const shmrpc_message *reply = &slot->message;
    int status = 0;

    if ((reply->flags & SHMRPC_FLAG_BLOCKS) == 0 || worker->attaches)
        return 0;
    status = begin_attaching(worker);
    for (uint32_t i = 0; i < reply->block_count && status >= 0; i++) {
        const shmrpc_block *block = &reply->blocks[i];
        const uint8_t *original = find_original(slot, &worker->message, block);
        status = pass_block(worker, original != NULL ? original : block->data, block->bytes);
    }
    if (status < 0)
        shmrpc_detach(worker);
    return status < 0 ? status : 0;
}

/* ---- what was received ---- */

shmrpc_lease *shmrpc_lease_take(shmrpc_slot *slot, uint32_t index)
{
    shmrpc_lease *lease = slot->message.blocks[index].lease;

    slot->message.blocks[index].lease = NULL;
    return lease;
}

/* With the lock held: who waits for room looks again. */
static void wake_waiters(struct shmrpc_poller *poller, struct conn *conn)
{
    store_relaxed(&conn->lending->wanted, 0);
    store_relaxed(&conn->wake.own->wants, 0);
    if (conn->tells_blocks) {
        conn->tells_blocks = false;
        events_note(poller, conn, SHMRPC_ROOM, 0, 0);
    }
    for (uint32_t i = 0; i < poller->slot_capacity; i++) {
        struct shmrpc_slot *slot = poller->slots[i];
        if (slot != NULL && slot->goal == GOAL_BLOCKS && slot->conn == conn)
            slot_finish(slot, 0);
    }
}

enum { RETURNED_MAX = 512 };

static int take_names(struct conn *conn, uint32_t total)
{
    struct block_name names[RETURNED_MAX];

    if (total == 0 || total % sizeof *names != 0 || total > sizeof names)
        return -EPROTO;
    conn_read(conn, total, names);
    return lending_returned(conn->lending, names, total / (uint32_t)sizeof *names,
                            clock_coarse_ns());
}

static int take_withdrawal(struct conn *conn, uint32_t total)
{
    struct lending *lending = conn->lending;
    struct block_name name = {.index = BLOCK_INLINE};

    if (total != sizeof name.generation)
        return -EPROTO;
    conn_read(conn, total, &name.generation);
    int status = lending_withdrawn(lending, name.generation);
    if (status == -EPROTO) { /* its descriptor was not looked at yet */
        conn_read_control(conn);
        status = lending_withdrawn(lending, name.generation);
    }
    if (status < 0)
        return -EPROTO;
    pthread_mutex_lock(&lending->lock);
    conn_return(conn, name);
    pthread_mutex_unlock(&lending->lock);
    return 0;
}

int blocks_frame(struct shmrpc_poller *poller, struct conn *conn,
                 const struct frame_header *header)
{
    bool returns = header->kind == SHMRPC_RETURN;
    int status = -EPROTO;

    if (conn->lending != NULL && header->metadata_bytes == 0)
        status = returns ? take_names(conn, header->total_bytes)
                         : take_withdrawal(conn, header->total_bytes);
    conn_finish(conn, header->length, &poller->bells);
    if (status == 0 && returns && load_relaxed(&conn->lending->wanted) != 0) {
        poller_lock(poller);
        wake_waiters(poller, conn);
        poller_unlock(poller);
    }
    return status;
}

/* ---- loans ---- */

int shmrpc_loan_new(shmrpc_slot *slot, uint64_t bytes, shmrpc_loan **loan, uint8_t **data)
{
    struct lending *lending = lending_of(slot);
    shmrpc_loan *made;
    int status = -EPIPE;

    if (lending == NULL || !lending_allows(lending, bytes))
        return -EOPNOTSUPP;
    made = malloc(sizeof *made);
    if (made == NULL)
        return -ENOMEM;
    *made = (shmrpc_loan){.lending = lending};
    pthread_mutex_lock(&lending->lock);
    if (lending->conn != NULL)
        status = arena_alloc(&lending->arena, bytes, &made->place);
    if (status == -ENOSPC)
        status = no_room(lending, bytes);
    if (status == 0) {
        made->memory = lending->own[lending->arena.extents[made->place.index].segment];
        memory_ref(made->memory);
        reference_take(&lending->references);
        lending->arena.extents[made->place.index].loaned = true;
        made->next = lending->loans;
        if (made->next != NULL)
            made->next->previous = made;
        lending->loans = made;
        lending->loan_count++;
        lending->loan_bytes += made->place.bytes;
    }
    pthread_mutex_unlock(&lending->lock);
    if (status < 0) {
        free(made);
        return status;
    }
    *loan = made;
    *data = made->place.data;
    return 0;
}

/* ---- growing, waiting, shrinking ---- */

uint64_t shmrpc_arena_wants(shmrpc_slot *slot, uint64_t bytes)
{
    struct lending *lending = lending_of(slot);

    if (lending == NULL)
        return 0;
    pthread_mutex_lock(&lending->lock);
    uint64_t wants = arena_fits(&lending->arena, bytes) ? 0 : lending_wants(lending, bytes);
    pthread_mutex_unlock(&lending->lock);
    return wants;
}

void *shmrpc_memory_map(int fd, uint64_t bytes)
{
    struct memory *memory;
    int status = memory_map_own(fd, bytes, &memory);

    if (status == 0)
        return memory;
    errno = -status;
    return NULL;
}

void shmrpc_memory_unmap(void *memory)
{
    memory_unref(memory);
}

int shmrpc_arena_add(shmrpc_slot *slot, void *memory, int peer_fd)
{
    struct lending *lending = lending_of(slot);

    if (lending == NULL)
        return -EPIPE;
    pthread_mutex_lock(&lending->lock);
    int status = lending_add(lending, memory, peer_fd, clock_coarse_ns());
    pthread_mutex_unlock(&lending->lock);
    return status;
}

/* Whether it may fit now. If not because of segments that are free but too small or too many, they
 * are withdrawn: it will, when the peer has let go of them. */
static bool has_room(struct lending *lending, uint64_t bytes)
{
    pthread_mutex_lock(&lending->lock);
    bool room = lending->conn == NULL || lending_has_room(lending, bytes);
    if (!room)
        lending_withdraw(lending, clock_coarse_ns(), 0);
    pthread_mutex_unlock(&lending->lock);
    return room;
}

/* Say that we wait, here and to the peer, and have returns read that came without a bell. */
static void want_blocks(struct shmrpc_poller *poller, struct conn *conn)
{
    store_relaxed(&conn->lending->wanted, 1);
    store_relaxed(&conn->wake.own->wants, 1); /* before `arm`, and so before fence F */
    workers_read_again(poller, conn);
}

int64_t shmrpc_wait_blocks(shmrpc_slot *slot, uint64_t bytes, int64_t timeout_ns)
{
    struct shmrpc_poller *poller = slot->poller;
    struct lending *lending = lending_of(slot);

    if (lending == NULL)
        return -EPIPE;
    poller_lock(poller);
    slot_begin(slot, GOAL_BLOCKS, deadline_after(timeout_ns));
    want_blocks(poller, slot->conn);
    bool leads = slot_enter(poller, slot);
    poller_unlock(poller);
    /* After saying so: what comes back from now on finds us waiting. */
    int64_t error = (int64_t)load_relaxed(&slot->conn->error);
    bool room = has_room(lending, bytes) && timeout_ns != 0;
    if (error != 0 || room) {
        poller_lock(poller);
        slot_finish(slot, -error);
        poller_unlock(poller);
    }
    return slot_wait(poller, slot, leads);
}

int shmrpc_want_blocks(shmrpc_slot *slot, uint64_t bytes)
{
    struct shmrpc_poller *poller = slot->poller;
    struct lending *lending = lending_of(slot);

    if (lending == NULL)
        return 0;
    poller_lock(poller);
    slot->conn->tells_blocks = true;
    want_blocks(poller, slot->conn);
    poller_unlock(poller);
    if (load_relaxed(&slot->conn->error) == 0 && !has_room(lending, bytes))
        return 1;
    poller_lock(poller);
    slot->conn->tells_blocks = false;
    poller_unlock(poller);
    return 0;
}

void shmrpc_tell_blocks(shmrpc_poller *poller, uint64_t conn_id)
{
    if (poller_inherited(poller))
        return;
    poller_lock(poller);
    struct conn *conn = poller_find(poller, conn_id);
    if (conn != NULL && !conn->destroyed && conn->lending != NULL &&
        load_relaxed(&conn->lending->wanted) != 0) {
        wake_waiters(poller, conn);
        poller_kick(poller); /* one of them may lead, and sleep */
    }
    poller_unlock(poller);
}

/* The lending of a conn that lives, with its lock held: a conn ends with the poller's lock held. */
static struct lending *lock_lending(struct shmrpc_poller *poller, uint64_t conn_id)
{
    poller_lock(poller);
    const struct conn *conn = poller_find(poller, conn_id);
    struct lending *lending = conn != NULL && !conn->destroyed ? conn->lending : NULL;
    if (lending != NULL)
        pthread_mutex_lock(&lending->lock);
    else
        poller_unlock(poller);
    return lending;
}

static void unlock_lending(struct shmrpc_poller *poller, struct lending *lending)
{
    pthread_mutex_unlock(&lending->lock);
    poller_unlock(poller);
}

int64_t shmrpc_arena_trim(shmrpc_poller *poller, uint64_t conn_id, uint64_t quiet_ns)
{
    struct lending *lending = lock_lending(poller, conn_id);

    if (lending == NULL)
        return -EPIPE;
    lending_withdraw(lending, clock_coarse_ns(), quiet_ns);
    int64_t left = (int64_t)(lending->arena.bytes + load_relaxed(&lending->peer_bytes));
    if (arena_is_lent(&lending->arena) && lending->conn != NULL)
        workers_read_again(poller, lending->conn); /* returns rang no bell, and it may be asleep */
    unlock_lending(poller, lending);
    return left;
}

int shmrpc_arena_stats_of(shmrpc_poller *poller, uint64_t conn_id, shmrpc_arena_stats *stats)
{
    struct lending *lending = lock_lending(poller, conn_id);

    *stats = (shmrpc_arena_stats){0};
    if (lending == NULL)
        return -EPIPE;
    const struct arena *arena = &lending->arena;
    uint64_t oldest = arena_oldest_ns(arena);
    uint64_t now = clock_coarse_ns();
    *stats = (shmrpc_arena_stats){
        .max_bytes = lending->own_max,
        .bytes = arena->bytes,
        .used_bytes = arena->used_bytes,
        .lent_blocks = arena->lent_blocks,
        .lent_bytes = arena->lent_bytes,
        .oldest_ns = oldest != 0 && now > oldest ? now - oldest : 0,
        .loans = lending->loan_count,
        .loan_bytes = lending->loan_bytes,
        .returned = lending->back_count,
        .returned_bytes = lending->back_bytes,
        .peer_bytes = load_relaxed(&lending->peer_bytes),
        .leases = load_relaxed(&lending->lease_count),
        .leased_bytes = load_relaxed(&lending->lease_bytes),
    };
    unlock_lending(poller, lending);
    return 0;
}
