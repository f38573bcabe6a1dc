/* events.c - messages that no slot waits for, kept until Python takes them.
 *
 *   replies whose call id has SHMRPC_PYTHON_INDEX in its low bits; plain ones, and an event loop's
 *   plain requests, and short items if it says so, go into the batch that Python takes as a whole
 *   BRIEFS: that batch, where threads take it. It is closed from then on until the next is taken
 *   REQUEST without a payload: a stream was admitted; its first items may follow while it queues
 *   ITEM, END, CREDIT, INITIAL: frames of streams; items that follow each other share one event
 *   CANCEL: the caller of a stream gave up, or it was dropped before it started
 *   CLOSED: a conn has ended
 *
 * Everything here runs with the poller's lock held, but for events_stream, which takes it.
 */
#include "poller.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    RUN_ITEMS_MAX = 1024,   /* items in one event: */
    RUN_BYTES_MAX = 1 << 16, /* Python copies it as a whole while others wait */
    BRIEF_ITEM_MAX = 8192    /* longer ones fill the batch without saving much */
};

int events_add(struct shmrpc_poller *poller, const struct conn *conn,
               const shmrpc_message *message, uint8_t *payload)
{
    struct stored *stored = calloc(1, sizeof *stored);

    if (stored == NULL) {
        free(payload);
        return -ENOMEM;
    }
    stored->message = *message;
    stored->message.conn_id = conn->id;
    stored->message.item_count = message->kind == SHMRPC_ITEM;
    stored->payload = payload;
    stored->payload_capacity = (uint32_t)message->body_bytes + message->metadata_bytes;
    stored_append(&poller->events, stored);
    store_relaxed(&poller->event_count, load_relaxed(&poller->event_count) + 1);
    return 0;
}

int events_note(struct shmrpc_poller *poller, const struct conn *conn, uint32_t kind,
                uint64_t call_id, uint32_t flags)
{
    const shmrpc_message message = {.kind = kind, .call_id = call_id, .flags = flags};

    return events_add(poller, conn, &message, NULL);
}

int events_receive(struct shmrpc_poller *poller, struct conn *conn,
                   const struct frame_header *header)
{
    shmrpc_message message;
    uint8_t *payload = conn_take_payload(conn);

    if (payload == NULL) {
        payload = malloc(header->total_bytes + 1u);
        if (payload == NULL)
            return -ENOMEM;
        conn_read(conn, header->total_bytes, payload);
    }
    message_from_header(&message, conn, header);
    return events_add(poller, conn, &message, payload);
}

bool events_add_brief(struct shmrpc_poller *poller, struct conn *conn,
                      const struct frame_header *header)
{
    struct batch *batch = &poller->batch;
    bool request = header->kind == SHMRPC_REQUEST;
    bool plain = header->metadata_bytes == 0 && conn->partial.received == 0 &&
                 (header->flags & ~(uint32_t)SHMRPC_FLAG_KEYWORDS) == 0 &&
                 (request || header->method_bytes == STATUS_OK);
    struct method *method = NULL;
    shmrpc_message message;

    if (!batch->open || !plain || poller->events.first != NULL ||
        batch->count == SHMRPC_BATCH_BRIEFS ||
        header->total_bytes > SHMRPC_BATCH_BYTES - batch->used)
        return false;
    uint8_t *payload = batch->bytes + batch->used;
    conn_read(conn, header->total_bytes, payload);
    message_from_header(&message, conn, header);
    if (request) {
        method = methods_find(&poller->methods, payload, message.method_bytes);
        if (method == NULL)
            return false;
        method->calls++;
        memmove(payload, payload + message.method_bytes, message.body_bytes);
    }
    if (batch->is_event)
        store_relaxed(&poller->event_count, load_relaxed(&poller->event_count) + 1);
    batch->used += (uint32_t)message.body_bytes;
    batch->briefs[batch->count++] = (shmrpc_brief){
        .conn_id = conn->id,
        .call_id = message.call_id,
        .deadline_ns = message.deadline_ns,
        .method = method != NULL ? method->index : -1,
        .kind = (uint16_t)message.kind,
        .flags = (uint16_t)message.flags,
        .start = batch->used - (uint32_t)message.body_bytes,
        .end = batch->used,
    };
    return true;
}

/* As events_add_brief, for an ITEM: it joins the last brief if that has items of the same stream. */
static bool add_brief_item(struct shmrpc_poller *poller, struct conn *conn,
                           const struct frame_header *header)
{
    struct batch *batch = &poller->batch;
    bool plain = header->metadata_bytes == 0 && conn->partial.received == 0 &&
                 (header->flags & ~(uint32_t)SHMRPC_FLAG_CALLER) == 0;

    if (!batch->open || !batch->has_items || !plain || poller->events.first != NULL ||
        header->total_bytes > BRIEF_ITEM_MAX ||
        header->total_bytes > SHMRPC_BATCH_BYTES - batch->used)
        return false;
    shmrpc_brief *brief = batch->count != 0 ? &batch->briefs[batch->count - 1] : NULL;
    if (brief == NULL || brief->kind != SHMRPC_ITEM || brief->conn_id != conn->id ||
        brief->call_id != header->call_id || brief->flags != header->flags) {
        if (batch->count == SHMRPC_BATCH_BRIEFS)
            return false;
        brief = &batch->briefs[batch->count++];
        *brief = (shmrpc_brief){
            .conn_id = conn->id,
            .call_id = header->call_id,
            .kind = SHMRPC_ITEM,
            .flags = header->flags,
            .start = batch->used,
        };
    }
    conn_read(conn, header->total_bytes, batch->bytes + batch->used);
    batch->used += header->total_bytes;
    brief->end = batch->used;
    brief->deadline_ns = header->total_bytes;
    brief->method++;
    return true;
}

bool events_take_batch(struct shmrpc_poller *poller, struct shmrpc_slot *slot)
{
    struct batch *batch = &poller->batch;

    if (!batch->is_event)
        return false;
    if (!batch->open) { /* what was taken last has been seen to the end */
        batch->count = batch->used = 0;
        batch->open = true;
    }
    if (batch->count == 0)
        return false;
    batch->open = false;
    store_relaxed(&poller->event_count, load_relaxed(&poller->event_count) - batch->count);
    slot_drop_blocks(slot);
    slot->message = (shmrpc_message){
        .kind = SHMRPC_BRIEFS, .item_count = batch->count, .body_bytes = batch->used};
    return true;
}

/* The event that this item can join: the last one, if it has items of the same stream. */
static struct stored *open_run(struct shmrpc_poller *poller, const struct conn *conn,
                               const struct frame_header *header)
{
    if (poller->events.first == NULL || conn->partial.received != 0 ||
        (header->flags & SHMRPC_FLAG_BLOCKS) != 0)
        return NULL;
    /* `last` is where the next one is hung up: the first member of the last one. */
    struct stored *stored = (struct stored *)poller->events.last;
    const shmrpc_message *message = &stored->message;
    bool same = message->kind == SHMRPC_ITEM && message->conn_id == conn->id &&
                message->call_id == header->call_id && message->flags == header->flags;
    bool bare = message->metadata_bytes == 0 && header->metadata_bytes == 0;
    bool fits = message->item_count < RUN_ITEMS_MAX &&
                message->body_bytes + header->total_bytes <= RUN_BYTES_MAX;

    return same && bare && fits ? stored : NULL;
}

static int reserve(struct stored *stored, uint32_t bytes)
{
    uint32_t items = stored->message.item_count + 1;

    if (items > stored->end_capacity) {
        uint32_t capacity = stored->end_capacity == 0 ? 16 : stored->end_capacity * 2;
        uint32_t *ends = realloc(stored->ends, capacity * sizeof *ends);
        if (ends == NULL)
            return -ENOMEM;
        if (stored->end_capacity == 0)
            ends[0] = (uint32_t)stored->message.body_bytes;
        stored->ends = ends;
        stored->end_capacity = capacity;
    }
    if (bytes > stored->payload_capacity) {
        uint32_t capacity = bytes * 2;
        uint8_t *payload = realloc(stored->payload, capacity);
        if (payload == NULL)
            return -ENOMEM;
        stored->payload = payload;
        stored->payload_capacity = capacity;
    }
    return 0;
}

static int join(struct stored *stored, struct conn *conn, const struct frame_header *header)
{
    shmrpc_message *message = &stored->message;
    uint32_t end = (uint32_t)message->body_bytes + header->total_bytes;

    if (reserve(stored, end) < 0)
        return -ENOMEM;
    conn_read(conn, header->total_bytes, stored->payload + message->body_bytes);
    message->body_bytes = end;
    stored->ends[message->item_count++] = end;
    return 0;
}

int events_stream(struct shmrpc_poller *poller, struct conn *conn,
                  const struct frame_header *header)
{
    poller_lock(poller);
    struct stored *run = header->kind == SHMRPC_ITEM ? open_run(poller, conn, header) : NULL;
    int status = 0;
    if (run != NULL)
        status = join(run, conn, header);
    else if (header->kind != SHMRPC_ITEM || !add_brief_item(poller, conn, header))
        status = events_receive(poller, conn, header);
    poller_unlock(poller);
    conn_finish(conn, header->length, &poller->bells);
    return status;
}
