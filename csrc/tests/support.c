/* support.c - harness.h and support.h. */
#define _GNU_SOURCE
#include "support.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "segment.h"

/* ---- harness ---- */

enum { TESTS_MAX = 128 };

static struct {
    const char *name;
    void (*function)(void);
} tests[TESTS_MAX];
static int test_count, passed, failed;
static const char *program, *current;
static atomic_int failures;
static void (*hang_dump)(void);

void harness_add(const char *name, void (*function)(void))
{
    if (test_count == TESTS_MAX)
        abort();
    tests[test_count].name = name;
    tests[test_count++].function = function;
}

void harness_fail(const char *file, int line, const char *text)
{
    atomic_fetch_add(&failures, 1);
    fprintf(stderr, "%s:%d: in %s: failed: %s\n", file, line, current, text);
}

void harness_equal(const char *file, int line, const char *text, int64_t left, int64_t right)
{
    if (left == right)
        return;
    harness_fail(file, line, text);
    fprintf(stderr, "    %lld != %lld\n", (long long)left, (long long)right);
}

static void print_result(void)
{
    printf("%s: %d passed, %d failed\n", program, passed, failed);
    fflush(stdout);
}

void harness_end(void)
{
    failed++;
    print_result();
    _exit(1);
}

static void on_alarm(int number)
{
    (void)number;
    fprintf(stderr, "%s: %s hangs\n", program, current);
    if (hang_dump != NULL)
        hang_dump();
    harness_end();
}

void harness_progress(unsigned seconds)
{
    alarm(seconds);
}

void harness_on_hang(void (*dump)(void))
{
    hang_dump = dump;
}

uint64_t harness_number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);

    return text != NULL && *text != '\0' ? strtoull(text, NULL, 0) : otherwise;
}

uint64_t harness_seed(void)
{
    static uint64_t seed;

    if (seed == 0) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        seed = harness_number("SHMRPC_SEED", (uint64_t)now.tv_nsec + ((uint64_t)getpid() << 32));
    }
    return seed;
}

static bool wanted(int argc, char **argv, const char *name)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return true;
    return argc < 2;
}

int harness_main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/');

    program = slash != NULL ? slash + 1 : argv[0];
    signal(SIGALRM, on_alarm);
    signal(SIGPIPE, SIG_DFL); /* the library must not raise it */
    printf("%s: SHMRPC_SEED=%llu\n", program, (unsigned long long)harness_seed());
    fflush(stdout);
    for (int i = 0; i < test_count; i++) {
        if (!wanted(argc, argv, tests[i].name))
            continue;
        current = tests[i].name;
        hang_dump = NULL;
        int before = atomic_load(&failures);
        harness_progress(HANG_SECONDS);
        tests[i].function();
        alarm(0);
        if (atomic_load(&failures) == before)
            passed++;
        else
            failed++;
    }
    print_result();
    return failed != 0 || passed == 0;
}

/* splitmix64 */
uint64_t random_next(struct random *random)
{
    uint64_t z = random->state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t random_below(struct random *random, uint64_t bound)
{
    return random_next(random) % bound;
}

/* ---- memory ---- */

static const size_t PAGE = 4096;

void *guarded_mmap(void *address, size_t bytes, int protection, int flags, int fd, int64_t offset)
{
    uint8_t *place =
        mmap(address, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (place == MAP_FAILED)
        return MAP_FAILED;
    void *memory = mmap(place + PAGE, bytes, protection, flags | MAP_FIXED, fd, (off_t)offset);
    if (memory == MAP_FAILED) {
        int error = errno;
        munmap(place, bytes + 2 * PAGE);
        errno = error;
    }
    return memory;
}

int guarded_munmap(void *address, size_t bytes)
{
    return munmap((uint8_t *)address - PAGE, bytes + 2 * PAGE);
}

int memory_fd(uint64_t bytes)
{
    int fd = memfd_create("shmrpc-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        abort();
    return fd;
}

void fill(uint8_t *bytes, size_t count, uint64_t seed)
{
    for (size_t i = 0; i < count; i++)
        bytes[i] = (uint8_t)((seed + i) * 167 + (i >> 8));
}

bool filled(const uint8_t *bytes, size_t count, uint64_t seed)
{
    for (size_t i = 0; i < count; i++)
        if (bytes[i] != (uint8_t)((seed + i) * 167 + (i >> 8)))
            return false;
    return true;
}

shmrpc_name name_of(const char *text)
{
    shmrpc_name name = {.bytes = (uint32_t)strlen(text)};

    memcpy(name.text, text, name.bytes);
    return name;
}

void sleep_us(uint64_t microseconds)
{
    struct timespec time = {.tv_sec = (time_t)(microseconds / 1000000),
                            .tv_nsec = (long)(microseconds % 1000000) * 1000};

    nanosleep(&time, NULL);
}

/* ---- pairs ---- */

static void open_shm(struct pair *pair, int side, uint32_t ring_bytes)
{
    shmrpc_conn_options *own = &pair->options[side];
    shmrpc_conn_options *peer = &pair->options[!side];
    int fd = memory_fd(segment_bytes(ring_bytes));

    own->own_segment = shmrpc_segment_map(fd, ring_bytes);
    if (own->own_segment == NULL)
        abort();
    own->own_ring_bytes = peer->peer_ring_bytes = ring_bytes;
    peer->peer_segment_fd = fd;
    if (pair->transport != SHM)
        return;
    own->own_bell_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    peer->peer_bell_fd = dup(own->own_bell_fd);
}

void pair_open(struct pair *pair, enum transport transport, uint32_t ring0, uint32_t ring1)
{
    int sockets[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets) < 0)
        abort();
    *pair = (struct pair){.transport = transport};
    for (int side = 0; side < 2; side++)
        pair->options[side] = (shmrpc_conn_options){
            .control_fd = sockets[side],
            .own_bell_fd = -1,
            .peer_bell_fd = -1,
            .peer_segment_fd = -1,
            .max_message_bytes = 64 << 20,
            .peer_max_message_bytes = 64 << 20,
            .peer_trusted = 1,
        };
    if (transport != STREAM) {
        open_shm(pair, 0, ring0);
        open_shm(pair, 1, ring1);
    }
}

uint64_t pair_give(struct pair *pair, int side, shmrpc_poller *poller)
{
    int64_t id = shmrpc_conn_add(poller, &pair->options[side]);

    REQUIRE(id > 0);
    pair->given[side] = 1;
    return (uint64_t)id;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void pair_close(struct pair *pair)
{
    for (int side = 0; side < 2; side++) {
        shmrpc_conn_options *options = &pair->options[side];
        close_fd(&options->peer_segment_fd);
        if (pair->given[side])
            continue;
        close_fd(&options->control_fd);
        close_fd(&options->own_bell_fd);
        close_fd(&options->peer_bell_fd);
        if (options->own_segment != NULL)
            shmrpc_segment_unmap(options->own_segment, options->own_ring_bytes);
        options->own_segment = NULL;
    }
}

/* ---- a peer made by hand ---- */

void hand_open(struct hand *hand, struct pair *pair)
{
    const shmrpc_conn_options *options = &pair->options[1];
    const struct segment_shm *peer;

    REQUIRE(segment_map_peer(options->peer_segment_fd, options->peer_ring_bytes, true, &peer) == 0);
    *hand = (struct hand){
        .own = options->own_segment,
        .peer = peer,
        .control_fd = options->control_fd,
        .bell_fd = options->peer_bell_fd,
    };
    ring_producer_init(&hand->producer, hand->own, peer, options->own_ring_bytes);
    ring_consumer_init(&hand->consumer, hand->own, peer, options->peer_ring_bytes);
}

void hand_ring(const struct hand *hand)
{
    static const uint64_t one = 1;
    ssize_t written;

    if (hand->bell_fd >= 0)
        written = write(hand->bell_fd, &one, sizeof one);
    else
        written = send(hand->control_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)written;
}

int hand_send(struct hand *hand, const struct frame_header *header, const void *payload)
{
    struct iovec part = {(void *)(uintptr_t)payload, header->length};
    int status = ring_push(&hand->producer, header, &part, 1);

    hand_ring(hand);
    return status;
}

int hand_receive(struct hand *hand, struct frame_header *header, void *payload, size_t capacity)
{
    int status = ring_peek(&hand->consumer, header);

    if (status <= 0)
        return status;
    if (payload != NULL)
        ring_read(&hand->consumer, 0, payload,
                  header->length < capacity ? header->length : capacity);
    ring_release(&hand->consumer, header->length);
    hand_ring(hand);
    return 1;
}
