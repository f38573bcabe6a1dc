/* fuzzing.h - what the fuzz targets share: reading a script from bytes, and driving a poller from
 * one thread. The thread is the main one, which the core never lets sleep without asking first. */
#ifndef SHMRPC_TESTS_FUZZING_H
#define SHMRPC_TESTS_FUZZING_H

#include <errno.h>
#include <string.h>

#include "poller.h"
#include "support.h"

/* The script. Beyond its end everything is zero. */
struct input {
    const uint8_t *bytes;
    size_t left;
};

static inline uint64_t input_number(struct input *input, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes && input->left != 0; i++, input->left--)
        value |= (uint64_t)*input->bytes++ << (8 * i);
    return value;
}

static inline size_t input_bytes(struct input *input, uint8_t *bytes, size_t count)
{
    if (count > input->left)
        count = input->left;
    memcpy(bytes, input->bytes, count);
    input->bytes += count;
    input->left -= count;
    return count;
}

/* The end under test. Both kinds serve, and both call. */
struct victim {
    shmrpc_poller *poller;
    shmrpc_slot *slot, *waiter; /* slot: takes events. waiter: has a call under way */
    shmrpc_slot *worker, *inner; /* inner: runs requests in the thread that waits */
    uint64_t conn_id, position;
    bool server, has_request, waits;
};

static inline void victim_open(struct victim *victim, struct pair *pair, bool server)
{
    *victim = (struct victim){
        .poller = shmrpc_poller_new(server ? 2 : 0, 8, WAIT_AUTO, 1), .server = server};
    REQUIRE(victim->poller != NULL);
    shmrpc_method_add(victim->poller, "a", 1, 0, 1);
    shmrpc_method_add(victim->poller, "bb", 2, 1, 0);
    victim->conn_id = pair_give(pair, 0, victim->poller);
    if (!server)
        shmrpc_poller_serve(victim->poller, 2, 8);
    victim->slot = shmrpc_slot_new(victim->poller, victim->conn_id);
    victim->waiter = shmrpc_slot_new(victim->poller, victim->conn_id);
    victim->worker = shmrpc_worker_new(victim->poller);
    victim->inner = shmrpc_worker_new(victim->poller);
    REQUIRE(victim->slot != NULL && victim->waiter != NULL && victim->worker != NULL &&
            victim->inner != NULL);
}

static inline void victim_close(struct victim *victim)
{
    shmrpc_slot_free(victim->inner);
    shmrpc_slot_free(victim->worker);
    shmrpc_slot_free(victim->slot);
    shmrpc_slot_free(victim->waiter);
    if (victim->poller->running != 0 || victim->poller->blocked != 0 ||
        victim->poller->inside != 0 || victim->poller->worker_threads != 0 ||
        shmrpc_inherited_deadline() != 0)
        __builtin_trap();
    shmrpc_poller_free(victim->poller);
}

/* Touch every byte, for AddressSanitizer, and check what a user relies on. */
static inline void victim_look(const shmrpc_message *message)
{
    static volatile uint8_t sum;

    uint32_t start = 0;

    if (message->kind == SHMRPC_CLOSED)
        return;
    for (uint32_t i = 0; i < message->item_count && message->ends != NULL; i++) {
        if (message->ends[i] < start)
            __builtin_trap();
        start = message->ends[i];
    }
    if ((message->item_count > 1) != (message->ends != NULL) ||
        (message->ends != NULL && start != message->body_bytes))
        __builtin_trap();
    for (uint64_t i = 0; i < (uint64_t)message->method_bytes + message->metadata_bytes; i++)
        sum = (uint8_t)(sum ^ message->head[i]);
    for (uint64_t i = 0; i < message->body_bytes; i++)
        sum = (uint8_t)(sum ^ message->body[i]);
    if (message->body_bytes > 1 << 20 || message->method_bytes > SHMRPC_METHOD_MAX)
        __builtin_trap();
}

static inline void victim_take(struct victim *victim)
{
    while (shmrpc_take(victim->slot))
        victim_look(shmrpc_slot_message(victim->slot));
}

static inline void victim_next(struct victim *victim, int64_t result)
{
    victim->has_request = result >= 0 || result == SHMRPC_MESSAGE;
    if (victim->has_request)
        victim_look(shmrpc_slot_message(victim->worker));
    else if (result == SHMRPC_EVENTS)
        victim_take(victim);
    else if (result != -EAGAIN && result != -EMSGSIZE &&
             (result != SHMRPC_STOPPED || victim->server)) /* a client's conn has ended */
        __builtin_trap();
}

static inline void heat(struct victim *victim)
{
    struct conn *conn = poller_find(victim->poller, victim->conn_id);

    if (conn != NULL && load_relaxed(&conn->error) == 0) {
        if (!conn->is_shm)
            conn->stream.readable = true; /* as if epoll had said so */
        poller_heat(victim->poller, conn);
    }
}

/* As a handler that calls back, sends items, and forgets to reply now and then. */
static inline void victim_handle(struct victim *victim, shmrpc_slot *worker, uint64_t choice)
{
    static const char body[8000];
    uint64_t call_id = shmrpc_slot_message(worker)->call_id;

    if (choice % 2 == 0)
        shmrpc_reply_metadata(worker, body, choice * 8);
    if (choice % 3 == 0)
        shmrpc_send_item(worker, 0, call_id, body, choice);
    if (choice % 5 == 0)
        shmrpc_send(worker, SHMRPC_INITIAL, 0, call_id, NULL, 0, body, choice, NULL, 0, 0,
                    &victim->position);
    if (choice % 7 != 0)
        shmrpc_reply(worker, choice % 4 == 0 ? 0 : 2, body, choice * 20);
}

static inline void waiter_done(struct victim *victim, int64_t result, uint64_t choice)
{
    victim->waits = result == SHMRPC_EVENTS || result == -EAGAIN || result == -EINTR ||
                    result == SHMRPC_QUEUED || result == SHMRPC_SPAWN;
    if (result >= 0 || result == SHMRPC_MESSAGE)
        victim_look(shmrpc_slot_message(victim->waiter));
    if (result == SHMRPC_EVENTS)
        victim_take(victim);
    if (result == SHMRPC_QUEUED && shmrpc_next_queued(victim->inner) == SHMRPC_MESSAGE) {
        victim_look(shmrpc_slot_message(victim->inner));
        shmrpc_wait_events(victim->slot, 0); /* waits within a request */
        victim_handle(victim, victim->inner, choice);
        shmrpc_finish(victim->inner);
    }
}

/* One step of the end under test. */
static inline void victim_drive(struct victim *victim, uint64_t choice)
{
    static const char body[8000];
    shmrpc_name name = {.bytes = 1, .text = "a"};
    shmrpc_slot *slot = victim->slot;
    uint64_t what = choice % 16;

    choice /= 16;
    heat(victim);
    switch (what) {
    case 0:
    case 1:
        if (shmrpc_wait_events(slot, 0) == SHMRPC_EVENTS)
            victim_take(victim);
        break;
    case 2: /* a call that goes on in the next steps */
        if (victim->waits)
            shmrpc_abandon(victim->waiter);
        waiter_done(victim, shmrpc_call(victim->waiter, &name, body, choice * 256, 300000),
                    choice);
        break;
    case 3:
    case 4:
        if (victim->waits)
            waiter_done(victim, shmrpc_wait(victim->waiter), choice);
        break;
    case 5:
        shmrpc_send(slot, SHMRPC_REQUEST, SHMRPC_FLAG_STREAM, choice << 16 | SHMRPC_PYTHON_INDEX,
                    &name, 0, NULL, 0, body, choice * 480, 0, &victim->position);
        break;
    case 6:
        shmrpc_send_item(slot, SHMRPC_FLAG_CALLER, choice << 16 | SHMRPC_PYTHON_INDEX, body,
                         choice * 30);
        break;
    case 7:
        shmrpc_flush(slot, 0);
        shmrpc_outcome_of(slot, choice, victim->position);
        break;
    case 8:
        if (victim->has_request)
            victim_handle(victim, victim->worker, choice);
        break;
    case 9:
        if (victim->has_request)
            victim_next(victim, shmrpc_reply_next(victim->worker, body, choice * 256));
        break;
    default:
        victim_next(victim, shmrpc_next(victim->worker));
    }
}

/* A header that may well be right. */
static inline void input_header(struct input *input, struct frame_header *header, uint64_t call_id)
{
    uint64_t shape = input_number(input, 1);

    *header = (struct frame_header){.kind = (uint8_t)(input_number(input, 1) % 12),
                                    .length = (uint32_t)input_number(input, 2) % 1100};
    header->flags = (uint8_t)(shape & 1 ? input_number(input, 1) % (SHMRPC_FLAG_ALL + 2) : 0);
    header->method_bytes = (uint16_t)input_number(input, shape & 2 ? 2 : 1);
    header->call_id = shape & 4 ? input_number(input, 8) : call_id;
    header->metadata_bytes = (uint32_t)(shape & 8 ? input_number(input, 4) : 0);
    header->total_bytes = header->length + (uint32_t)(shape & 16 ? input_number(input, 3) : 0);
    header->deadline_ns = shape & 32 ? input_number(input, 8) : 0;
    if (shape & 64)
        header->length = (uint32_t)input_number(input, 4);
}

/* The id of a call that somebody waits for, or a future's. */
static inline uint64_t victim_call_id(const struct victim *victim, uint64_t choice)
{
    if (choice % 2 == 0)
        return victim->waiter->call_id;
    return (choice >> 1 & 7) << 16 | SHMRPC_PYTHON_INDEX;
}

#endif
