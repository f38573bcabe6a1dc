/* fuzz_receive.c - a server or client whose peer writes anything into its own segment, at any time
 * between two calls of ours. Segments lie between pages without access. */
#define _GNU_SOURCE
#include "fuzzing.h"

#include <sys/socket.h>

#include "segment.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

static void write_word(struct input *input, struct hand *hand)
{
    struct segment_shm *own = hand->own;
    uint64_t which = input_number(input, 1);
    uint64_t value;

    switch (which / 8 % 4) {
    case 0:
        value = input_number(input, 8);
        break;
    case 1:
        value = load_relaxed(&own->tail) + 8 * input_number(input, 1);
        break;
    case 2:
        value = load_relaxed(&hand->peer->head) + input_number(input, 2);
        break;
    default:
        value = load_relaxed(&hand->peer->tail) - input_number(input, 1);
    }
    atomic_u64 *const words[] = {&own->tail, &own->head, &own->arm, &own->space,
                                 &own->queued[value % LAYOUT_QUEUED_MAX]};
    store_release(words[which % 5], value);
}

static void write_ring(struct input *input, struct hand *hand)
{
    uint64_t offset = input_number(input, 2) % hand->producer.bytes;
    uint64_t count = input_number(input, 1);

    if (count > hand->producer.bytes - offset)
        count = hand->producer.bytes - offset;
    input_bytes(input, hand->own->ring + offset, count);
}

/* A frame where the next one belongs, whether it fits or not. */
static void write_frame(struct input *input, struct hand *hand, const struct victim *victim)
{
    struct frame_header header;
    uint64_t tail = load_relaxed(&hand->own->tail) & ~7ull;
    uint64_t mask = hand->producer.bytes - 1;
    uint8_t raw[FRAME_HEADER_BYTES];

    uint64_t choice = input_number(input, 1);
    input_header(input, &header, victim_call_id(victim, choice));
    memcpy(raw, &header, sizeof raw);
    for (unsigned i = 0; i < sizeof raw; i++)
        hand->own->ring[(tail + i) & mask] = raw[i];
    for (uint64_t i = 0; i < header.method_bytes && i < 2; i++)
        hand->own->ring[(tail + sizeof raw + i) & mask] = header.method_bytes == 1 ? 'a' : 'b';
    store_release(&hand->own->tail, tail + frame_span(header.length));
}

static void step(struct input *input, struct hand *hand, struct victim *victim)
{
    uint64_t operation = input_number(input, 1);
    uint8_t junk[64];
    uint64_t count;

    switch (operation % 12) {
    case 0:
    case 1:
        write_word(input, hand);
        break;
    case 2:
        write_ring(input, hand);
        break;
    case 3:
    case 4:
    case 5:
        write_frame(input, hand, victim);
        break;
    case 6: /* take all that the victim has sent */
        store_release(&hand->own->head, load_acquire(&hand->peer->tail));
        break;
    case 7:
        count = input_bytes(input, junk, operation / 12);
        if (send(hand->control_fd, junk, count, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            hand_ring(hand);
        break;
    case 8:
        if (operation > 240)
            shutdown(hand->control_fd, SHUT_RDWR);
        hand_ring(hand);
        break;
    default:
        victim_drive(victim, input_number(input, 1));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count)
{
    struct input input = {bytes, count};
    struct pair pair;
    struct hand hand;
    struct victim victim;
    uint64_t shape = input_number(&input, 1);

    pair_open(&pair, shape & 1 ? SHM : SHM_SOCKET_BELLS, 4096, 4096u << (shape >> 1 & 1));
    pair.options[0].max_message_bytes = shape & 4 ? 3000 : 1 << 20;
    pair.options[0].peer_max_message_bytes = shape & 8 ? 3000 : 1 << 20;
    pair.options[0].relative_deadlines = (shape & 16) != 0;
    hand_open(&hand, &pair);
    victim_open(&victim, &pair, (shape & 32) != 0);
    for (int i = 0; i < 200 && input.left != 0; i++)
        step(&input, &hand, &victim);
    for (int i = 0; i < 6; i++)
        victim_drive(&victim, (uint64_t)i);
    victim_close(&victim);
    guarded_munmap((void *)(uintptr_t)hand.peer, segment_bytes(4096));
    pair_close(&pair);
    return 0;
}
