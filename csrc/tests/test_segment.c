/* test_segment.c - what may be mapped, and what a peer hands over that may not. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "segment.h"
#include "support.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { RING = 4096, ALL_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL };

/* A segment as its owner leaves it, with these seals. */
static int make(int seals)
{
    int fd = memory_fd(segment_bytes(RING));
    void *own = shmrpc_segment_map(fd, RING);

    REQUIRE(own != NULL);
    REQUIRE(seals == 0 || fcntl(fd, F_ADD_SEALS, seals) == 0);
    shmrpc_segment_unmap(own, RING);
    return fd;
}

static int map(int fd, bool trusted)
{
    const struct segment_shm *peer = NULL;
    int status = segment_map_peer(fd, RING, trusted, &peer);

    if (status == 0)
        segment_unmap(peer, RING);
    return status;
}

TEST(sizes)
{
    static const int64_t sizes[] = {0, 1, RING, 4096 + RING - 1, 4096 + RING + 1, 4096 + 2 * RING};

    CHECK(segment_bytes(RING) == 4096 + RING);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int fd = memory_fd((uint64_t)sizes[i]);
        CHECK_EQUAL(map(fd, true), -EPROTO);
        CHECK(shmrpc_segment_map(fd, RING) == NULL);
        CHECK_EQUAL(errno, EPROTO);
        close(fd);
    }
}

TEST(not_memory)
{
    int ends[2];
    int null = open("/dev/null", O_RDWR);

    REQUIRE(pipe(ends) == 0);
    CHECK_EQUAL(map(ends[0], true), -EPROTO);
    CHECK_EQUAL(map(null, true), -EPROTO);
    CHECK_EQUAL(map(-1, true), -EBADF);
    close(ends[0]);
    close(ends[1]);
    close(null);
}

TEST(sealed_or_trusted)
{
    static const int seals[] = {F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE, F_SEAL_SEAL};

    int fd = make(0);
    CHECK_EQUAL(map(fd, true), 0);
    CHECK_EQUAL(map(fd, false), -EACCES);
    close(fd);
    fd = make(ALL_SEALS);
    CHECK_EQUAL(map(fd, true), 0);
    CHECK_EQUAL(map(fd, false), 0);
    close(fd);
    for (unsigned i = 0; i < 4; i++) { /* all but one */
        fd = make(ALL_SEALS & ~seals[i]);
        CHECK_EQUAL(map(fd, false), -EACCES);
        close(fd);
    }
}

TEST(wrong_magic_or_version)
{
    for (uint32_t word = 0; word < 2; word++) {
        int fd = make(0);
        const uint32_t wrong = 2;
        REQUIRE(pwrite(fd, &wrong, 4, word * 4) == 4);
        CHECK_EQUAL(map(fd, true), -EPROTO);
        close(fd);
    }
}

static sigjmp_buf jump;

static void on_fault(int number)
{
    siglongjmp(jump, number);
}

TEST(peer_is_read_only)
{
    const struct segment_shm *peer;
    int fd = make(0);
    struct sigaction action = {.sa_handler = on_fault}, before;

    REQUIRE(segment_map_peer(fd, RING, true, &peer) == 0);
    CHECK_EQUAL(load_relaxed(&peer->arm), 3); /* as segment_map_own leaves it */
    sigaction(SIGSEGV, &action, &before);
    int fault = sigsetjmp(jump, 1);
    if (fault == 0)
        *(volatile uint32_t *)(uintptr_t)&peer->magic = 1;
    sigaction(SIGSEGV, &before, NULL);
    CHECK_EQUAL(fault, SIGSEGV);
    segment_unmap(peer, RING);
    close(fd);
}

/* Sealed memory: the owner's own mapping stays writable, nobody can make another. */
TEST(sealing_keeps_the_owner_alone)
{
    int fd = memory_fd(segment_bytes(RING));
    struct segment_shm *own = shmrpc_segment_map(fd, RING);
    const struct segment_shm *peer;

    REQUIRE(own != NULL);
    REQUIRE(fcntl(fd, F_ADD_SEALS, ALL_SEALS) == 0);
    CHECK(shmrpc_segment_map(fd, RING) == NULL);
    CHECK_EQUAL(ftruncate(fd, 0), -1);
    REQUIRE(segment_map_peer(fd, RING, false, &peer) == 0);
    store_relaxed(&own->tail, 4711);
    CHECK_EQUAL(load_relaxed(&peer->tail), 4711);
    segment_unmap(peer, RING);
    shmrpc_segment_unmap(own, RING);
    close(fd);
}

TEST(unmapping_nothing)
{
    segment_unmap(NULL, RING);
}

static unsigned mappings_of_tests(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    unsigned count = 0;

    REQUIRE(maps != NULL);
    while (fgets(line, sizeof line, maps) != NULL)
        count += strstr(line, "memfd:shmrpc-test") != NULL;
    fclose(maps);
    return count;
}

/* Who lets go of much, perhaps with a lock held, does not wait until its pages are given back. */
TEST(memory_is_unmapped_with_its_last_reference)
{
    static const uint64_t sizes[] = {MEMORY_PAGE, 64 << 20};

    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int fd = memory_fd(sizes[i]);
        struct memory *own, *peer;
        REQUIRE(memory_map_own(fd, sizes[i], &own) == 0);
        REQUIRE(memory_map_peer(fd, sizes[i], true, &peer) == 0);
        close(fd);
        memory_ref(peer);
        memory_unref(peer);
        CHECK_EQUAL(mappings_of_tests(), 2);
        own->base[sizes[i] - 1] = 7;
        CHECK_EQUAL(peer->base[sizes[i] - 1], 7);
        memory_unref(own);
        memory_unref(peer);
        while (mappings_of_tests() != 0) /* the harness gives up at some time */
            sleep_us(1000);
    }
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
