/* forks.c - see forks.h. */
#include "forks.h"

#include <pthread.h>

#include "atomics.h"

static atomic_u64 forks;

static void count_fork(void)
{
    store_relaxed(&forks, load_relaxed(&forks) + 1); /* in the child, which has one thread yet */
}

static void watch(void)
{
    pthread_atfork(NULL, NULL, count_fork);
}

void forks_watch(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, watch);
}

uint64_t forks_seen(void)
{
    return load_relaxed(&forks);
}
