/* segment.c - see segment.h. Creating and naming segments is the caller's business. */
#define _GNU_SOURCE
#include "segment.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

uint64_t segment_bytes(uint64_t ring_bytes)
{
    return LAYOUT_HEADER_BYTES + ring_bytes;
}

static int check_size(int fd, uint64_t bytes)
{
    struct stat status;

    if (fstat(fd, &status) < 0)
        return -errno;
    if (!S_ISREG(status.st_mode) || (uint64_t)status.st_size != bytes)
        return -EPROTO;
    return 0;
}

int segment_map_own(int fd, uint64_t ring_bytes, struct segment_shm **segment)
{
    int status = check_size(fd, segment_bytes(ring_bytes));

    if (status < 0)
        return status;
    void *memory =
        mmap(NULL, segment_bytes(ring_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    struct segment_shm *own = memory;
    own->magic = LAYOUT_MAGIC;
    own->version = LAYOUT_VERSION;
    store_relaxed(&own->arm, 1u << 1 | 1); /* epoch 1, asleep */
    *segment = own;
    return 0;
}

/* A segment that can shrink under us is SIGBUS at the next read. A peer of our own uid is trusted
 * not to do that (it could kill us as well); anybody else's segment has to be sealed. */
static int check_seals(int fd)
{
    const int needed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    int seals = fcntl(fd, F_GET_SEALS);

    return seals >= 0 && (seals & needed) == needed ? 0 : -EACCES;
}

int segment_map_peer(int fd, uint64_t ring_bytes, bool trusted, const struct segment_shm **segment)
{
    int status = check_size(fd, segment_bytes(ring_bytes));

    if (status == 0 && !trusted)
        status = check_seals(fd);
    if (status < 0)
        return status;
    void *memory = mmap(NULL, segment_bytes(ring_bytes), PROT_READ, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    const struct segment_shm *peer = memory;
    uint32_t magic = *(const volatile uint32_t *)&peer->magic;
    uint32_t version = *(const volatile uint32_t *)&peer->version;
    if (magic != LAYOUT_MAGIC || version != LAYOUT_VERSION) {
        munmap(memory, segment_bytes(ring_bytes));
        return -EPROTO;
    }
    *segment = peer;
    return 0;
}

void segment_unmap(const struct segment_shm *segment, uint64_t ring_bytes)
{
    if (segment != NULL)
        munmap((void *)(uintptr_t)segment, segment_bytes(ring_bytes));
}

/* ---- memory for blocks ---- */

static int map_memory(int fd, uint64_t bytes, int protection, int flags, struct memory **memory)
{
    struct memory *made = malloc(sizeof *made);

    if (made == NULL)
        return -ENOMEM;
    void *base = mmap(NULL, bytes, protection, MAP_SHARED | flags, fd, 0);
    if (base == MAP_FAILED) {
        free(made);
        return -errno;
    }
    *made = (struct memory){.references = 1, .base = base, .bytes = bytes};
    *memory = made;
    return 0;
}

int memory_map_own(int fd, uint64_t bytes, struct memory **memory)
{
    int status = bytes % MEMORY_PAGE == 0 ? check_size(fd, bytes) : -EINVAL;

    /* All of it is going to be written: one system call instead of a fault for each page. */
    return status < 0 ? status
                      : map_memory(fd, bytes, PROT_READ | PROT_WRITE, MAP_POPULATE, memory);
}

int memory_map_peer(int fd, uint64_t bytes, bool trusted, struct memory **memory)
{
    int status = check_size(fd, bytes);

    if (status == 0 && !trusted)
        status = check_seals(fd);
    return status < 0 ? status : map_memory(fd, bytes, PROT_READ, 0, memory);
}

void memory_ref(struct memory *memory)
{
    reference_take(&memory->references);
}

/* Giving pages back takes 0.3 ms for each MB: too long for who holds locks, or reads for others. */
enum { UNMAP_BYTES_MAX = 1 << 20 };

static void *unmap(void *memory)
{
    munmap(((struct memory *)memory)->base, ((struct memory *)memory)->bytes);
    free(memory);
    return NULL;
}

static bool unmap_elsewhere(struct memory *memory)
{
    sigset_t all, before;
    pthread_t thread;

    sigfillset(&all); /* signals are for the threads that there are otherwise */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(&thread, NULL, unmap, memory) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started)
        pthread_detach(thread);
    return started;
}

void memory_unref(struct memory *memory)
{
    if (!reference_drop(&memory->references))
        return;
    if (memory->bytes <= UNMAP_BYTES_MAX || !unmap_elsewhere(memory))
        unmap(memory);
}
