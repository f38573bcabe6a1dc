/* service.h - a server poller with worker threads, and calls to it, for tests. */
#ifndef SHMRPC_TESTS_SERVICE_H
#define SHMRPC_TESTS_SERVICE_H

#include <pthread.h>

#include "support.h"

enum { SERVICE_THREADS_MAX = 64 };

/* Methods of every service. */
enum { METHOD_ECHO, METHOD_BLOCK, METHOD_FAIL, METHOD_NOTE, METHOD_LARGE };

struct service {
    shmrpc_poller *poller;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t threads[SERVICE_THREADS_MAX]; /* lock */
    uint32_t thread_count;                  /* lock */
    bool gate_open;                         /* lock: METHOD_BLOCK may return */
    uint32_t blocked, blocked_total;        /* lock: handlers in METHOD_BLOCK: now, ever */
    uint32_t notes, closed, cancelled;      /* lock */
    int64_t odd;                            /* lock: a result that no worker should see */
};

void service_open(struct service *service, uint32_t workers, uint32_t max_concurrency,
                  uint32_t mode);
void service_gate(struct service *service, bool open);
/* Wait until *count (one of the fields above) is at least `value`. */
void service_await(struct service *service, const uint32_t *count, uint32_t value);
/* Stop and join its threads. */
void service_join(struct service *service);
/* The same, and free. */
void service_close(struct service *service);

/* A call to its end, whatever the main thread is asked to do in between. */
int64_t call(shmrpc_slot *slot, const char *method, const uint8_t *body, size_t body_bytes,
             int64_t timeout_ns);
int64_t wait_on(shmrpc_slot *slot, int64_t result);
/* shmrpc_wait_events, which is called again after -EAGAIN. */
int64_t events(shmrpc_slot *slot, int64_t timeout_ns);
/* shmrpc_flush to its end; events are dropped. */
int64_t flush(shmrpc_slot *slot, int64_t timeout_ns);
/* Call echo with this many bytes and check the answer. */
bool echo_works(shmrpc_slot *slot, size_t body_bytes, uint64_t seed);

#endif
