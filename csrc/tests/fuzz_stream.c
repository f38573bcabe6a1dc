/* fuzz_stream.c - a server or client whose peer sends anything over the socket. */
#define _GNU_SOURCE
#include "fuzzing.h"

#include <sys/socket.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

static void send_bytes(int fd, const void *bytes, size_t count)
{
    ssize_t sent = send(fd, bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL);

    (void)sent;
}

static void step(struct input *input, int fd, struct victim *victim)
{
    static uint8_t buffer[70000];
    uint64_t operation = input_number(input, 1);
    struct frame_header header;
    uint64_t choice;

    switch (operation % 8) {
    case 0:
        send_bytes(fd, buffer, input_bytes(input, buffer, operation / 8));
        break;
    case 1:
    case 2:
    case 3:
        choice = input_number(input, 1);
        input_header(input, &header, victim_call_id(victim, choice));
        send_bytes(fd, &header, FRAME_HEADER_BYTES);
        memset(buffer, header.method_bytes == 1 ? 'a' : 'b', 4);
        send_bytes(fd, buffer, header.length < sizeof buffer ? header.length : 8);
        break;
    case 4:
        if (operation > 240)
            shutdown(fd, SHUT_RDWR);
        while (operation < 128 && recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) > 0) {
        }
        break;
    default:
        victim_drive(victim, input_number(input, 1));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count)
{
    struct input input = {bytes, count};
    struct pair pair;
    struct victim victim;
    uint64_t shape = input_number(&input, 1);

    pair_open(&pair, STREAM, 0, 0);
    pair.options[0].max_message_bytes = shape & 4 ? 3000 : 1 << 20;
    pair.options[0].peer_max_message_bytes = shape & 8 ? 3000 : 1 << 20;
    pair.options[0].relative_deadlines = (shape & 16) != 0;
    victim_open(&victim, &pair, (shape & 32) != 0);
    for (int i = 0; i < 200 && input.left != 0; i++)
        step(&input, pair.options[1].control_fd, &victim);
    for (int i = 0; i < 6; i++)
        victim_drive(&victim, (uint64_t)i);
    victim_close(&victim);
    pair_close(&pair);
    return 0;
}
