/* party.h - one side of connections on which both sides call and serve, for tests. */
#ifndef SHMRPC_TESTS_PARTY_H
#define SHMRPC_TESTS_PARTY_H

#include <pthread.h>

#include "support.h"

enum { PARTY_THREADS_MAX = 256, PARTY_KINDS = 16 };

/* Methods of every party. */
enum {
    PARTY_ECHO,
    PARTY_BLOCK, /* until the gate opens */
    PARTY_NEST,  /* body: u32 depth. Calls its caller's `nest` with one less, until 0: PARTY_BLOCK
                  * then, if nest_blocks */
    PARTY_FORGET /* no reply */
};

struct party {
    shmrpc_poller *poller;
    shmrpc_slot *taker; /* lock: for events */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t threads[PARTY_THREADS_MAX];  /* lock */
    uint32_t threads_started, threads_end; /* lock */
    shmrpc_slot *spare[PARTY_THREADS_MAX]; /* lock: workers for threads that serve while they wait */
    uint32_t spare_count;                  /* lock */
    bool gate_open;                        /* lock: PARTY_BLOCK may return */
    bool nest_blocks;
    uint32_t blocked, blocked_total;       /* lock: handlers in PARTY_BLOCK: now, ever */
    uint32_t served, served_inline;        /* lock: requests */
    uint32_t events[PARTY_KINDS];          /* lock: taken, by kind */
    uint32_t items, closed;                /* lock */
    int64_t odd;                           /* lock: a result that nobody should see */
};

/* A poller without threads; `client`: it has one conn at most. */
void party_open(struct party *party, bool client, uint32_t mode);
/* Let it run this many requests at a time. */
void party_serve(struct party *party, uint32_t workers, uint32_t max_concurrency);
/* A server with its threads. */
void party_open_server(struct party *party, uint32_t workers, uint32_t max_concurrency,
                       uint32_t mode);
void party_gate(struct party *party, bool open);
/* Wait until *count (one of the fields above) is at least `value`. */
void party_await(struct party *party, const uint32_t *count, uint32_t value);
/* Stop, join, free. */
void party_close(struct party *party);

/* Do what has to be done before a wait that returned this can go on; false if it is over. */
bool party_attend(struct party *party, int64_t result);
/* Bring a wait to its end that has returned `result`. */
int64_t party_go_on(struct party *party, shmrpc_slot *slot, int64_t result);
int64_t party_call(struct party *party, shmrpc_slot *slot, const char *method, const void *body,
                   size_t body_bytes, int64_t timeout_ns);
/* Take all events there are. */
void party_take(struct party *party);
/* Call `nest` to this depth, and check the answer. */
bool party_nest(struct party *party, shmrpc_slot *slot, uint32_t depth, int64_t timeout_ns);

/* CPU time of this process, in nanoseconds. */
int64_t cpu_ns(void);

#endif
