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

/* The end under test. */
struct victim {
    shmrpc_poller *poller;
    shmrpc_slot *slot, *waiter; /* waiter: a client's slot with a call under way */
    uint64_t conn_id, position;
    bool server, has_request, waits;
    int64_t result;
};

static inline void victim_open(struct victim *victim, struct pair *pair, bool server)
{
    *victim = (struct victim){
        .poller = shmrpc_poller_new(server ? 2 : 0, 8, WAIT_AUTO, 1), .server = server};
    REQUIRE(victim->poller != NULL);
    shmrpc_method_add(victim->poller, "a", 1, 0, 1);
    shmrpc_method_add(victim->poller, "bb", 2, 1, 0);
    victim->conn_id = pair_give(pair, 0, victim->poller);
    victim->slot = server ? shmrpc_worker_new(victim->poller)
                          : shmrpc_slot_new(victim->poller, victim->conn_id);
    REQUIRE(victim->slot != NULL);
    if (!server)
        victim->waiter = shmrpc_slot_new(victim->poller, victim->conn_id);
}

static inline void victim_close(struct victim *victim)
{
    if (victim->server) { /* gives back its request */
        shmrpc_poller_stop(victim->poller);
        shmrpc_next(victim->slot);
    }
    shmrpc_slot_free(victim->slot);
    if (victim->waiter != NULL)
        shmrpc_slot_free(victim->waiter);
    shmrpc_poller_free(victim->poller);
}

/* Touch every byte, for AddressSanitizer, and check what a user relies on. */
static inline void victim_look(const shmrpc_message *message)
{
    static volatile uint8_t sum;

    if (message->kind == SHMRPC_CLOSED)
        return;
    for (uint64_t i = 0; i < (uint64_t)message->method_bytes + message->metadata_bytes; i++)
        sum = (uint8_t)(sum ^ message->head[i]);
    for (uint64_t i = 0; i < message->body_bytes; i++)
        sum = (uint8_t)(sum ^ message->body[i]);
    if (message->body_bytes > 1 << 20 || message->method_bytes > SHMRPC_METHOD_MAX)
        __builtin_trap();
}

static inline void victim_next(struct victim *victim, int64_t result)
{
    victim->has_request = result >= 0 || result == SHMRPC_MESSAGE;
    if (victim->has_request)
        victim_look(shmrpc_slot_message(victim->slot));
    else if (result == SHMRPC_EVENTS)
        while (shmrpc_take(victim->slot))
            victim_look(shmrpc_slot_message(victim->slot));
    else if (result != -EAGAIN && result != -EMSGSIZE)
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

static inline void waiter_done(struct victim *victim, int64_t result)
{
    if (result == SHMRPC_EVENTS || result == -EAGAIN || result == -EINTR) {
        while (shmrpc_take(victim->slot))
            victim_look(shmrpc_slot_message(victim->slot));
        victim->waits = true;
        return;
    }
    victim->waits = false;
    if (result >= 0 || result == SHMRPC_MESSAGE)
        victim_look(shmrpc_slot_message(victim->waiter));
}

/* One step of the end under test. */
static inline void victim_drive(struct victim *victim, uint64_t choice)
{
    static char body[8000];
    shmrpc_name name = {.bytes = 1, .text = "a"};
    shmrpc_slot *slot = victim->slot;

    heat(victim);
    if (victim->server) {
        if (victim->has_request && choice % 4 == 1)
            shmrpc_reply_metadata(slot, body, choice % 64);
            shmrpc_reply(slot, 2, body, 100);
        if (victim->has_request && choice % 4 == 0)
            victim_next(victim, shmrpc_reply_next(slot, body, choice * 16));
        else
            victim_next(victim, shmrpc_next(slot));
        return;
    }
    switch (choice % 6) {
    case 0:
    case 1:
        if (shmrpc_wait_events(slot, 0) == SHMRPC_EVENTS)
            while (shmrpc_take(slot))
                victim_look(shmrpc_slot_message(slot));
        break;
    case 2: /* a call that goes on in the next steps */
        if (victim->waits)
            shmrpc_abandon(victim->waiter);
        waiter_done(victim, shmrpc_call(victim->waiter, &name, body, choice * 16, 300000));
        break;
    case 3:
        if (victim->waits)
            waiter_done(victim, shmrpc_wait(victim->waiter));
        break;
    case 4:
        shmrpc_send(slot, SHMRPC_REQUEST, 0, choice << 16 | SHMRPC_PYTHON_INDEX, &name, 0, NULL, 0,
                    body, choice * 30, 0, &victim->position);
        break;
    default:
        shmrpc_flush(slot, 0);
        shmrpc_outcome_of(slot, choice, victim->position);
    }
}

/* A header that may well be right. */
static inline void input_header(struct input *input, struct frame_header *header, uint64_t call_id)
{
    uint64_t shape = input_number(input, 1);

    *header = (struct frame_header){.kind = (uint8_t)(input_number(input, 1) % 9),
                                    .length = (uint32_t)input_number(input, 2) % 1100};
    header->flags = (uint8_t)(shape & 1 ? input_number(input, 1) : 0);
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
    if (!victim->server && choice % 2 == 0)
        return victim->waiter->call_id;
    return choice << 16 | SHMRPC_PYTHON_INDEX;
}

#endif
