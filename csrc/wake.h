/* wake.h - going to sleep without losing a wake-up, and how long to spin before it.
 *
 *   sender of data                                sleeper
 *
 *   store tail            (ring, B)               store arm = epoch << 1 | 1
 *   full fence            E                       full fence                      F
 *   load the peer's arm                           load the peer's tail: moved? disarm, stay up
 *   armed, and not rung in this epoch: ring       block in epoll until rung, deadline or hang-up
 *                                                 store arm = epoch << 1
 *
 *   consumer that frees space                     sender whose frames did not fit
 *
 *   store head            (ring, D)               store space = position << 1 | 1
 *   full fence            G                       full fence                      H
 *   load the peer's space, and arm                load the peer's head: moved? try again
 *   wanted, reached, armed, not rung: ring        ... then sleeps as above
 *
 * fence E pairs with F (store-buffering shape): without either, the sender can miss `arm` while
 *         the sleeper misses `tail`, and the message waits for the next one, perhaps for ever.
 * fence G pairs with H: the same for `space` and `head`; without either both sides sleep, one on a
 *         ring that is no longer full.
 *
 * `arm` has one writer, the sleeper; the sender remembers privately which epoch it has rung. So a
 * sleep costs one doorbell at most, and a hostile sleeper can cause one system call a message.
 */
#ifndef SHMRPC_WAKE_H
#define SHMRPC_WAKE_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* Our end of one connection's doorbells. */
struct wake {
    struct segment_shm *own;
    const struct segment_shm *peer;
    uint64_t epoch;   /* of our own arm word */
    atomic_u64 rung;  /* the peer's arm word that we rang last; 0 = none. Any of our threads */
    int peer_bell;    /* eventfd of a peer of our own uid, or its control socket */
    bool bell_socket; /* peer_bell is a socket: the peer of another uid could block an eventfd */
};

/* Say that we go to sleep: wake_arm for each connection, then wake_arm_fence once; after it the
 * caller must look once more for work before it blocks. */
void wake_arm(struct wake *wake);
void wake_arm_fence(void);
void wake_disarm(struct wake *wake);

/* After ring_push: rings if the peer sleeps. Returns 1 if it rang. */
int wake_peer_for_data(struct wake *wake);
/* The same for a frame that can wait: rings only if the peer says that it wants blocks back. */
void wake_peer_for_blocks(struct wake *wake);
/* After ring_release up to `head`: rings if the peer sleeps and waits for space up to there, or
 * not more than `slack` further: where we might not look again. */
int wake_peer_for_space(struct wake *wake, uint64_t head, uint64_t slack);
/* Ask for a doorbell when the peer's head reaches `position`. Returns after fence H; the caller
 * must try to send once more. */
void wake_want_space(struct wake *wake, uint64_t position);
void wake_got_space(struct wake *wake);

/* How long to spin before sleeping, learnt from the waits before; the model is KVM's halt polling.
 *
 * A wait that ends while spinning costs no system call and no cross-CPU wake-up (tens of
 * microseconds). A spin that ends in a sleep was wasted. So: spin for the whole budget as long as
 * that works; after a miss skip 1, 2, 4 ... SPIN_SKIP_MAX sleeps before trying again; try again at
 * once after a sleep so short that spinning would have caught it.
 */
#define SPIN_BUDGET_NS 50000u /* about one cross-CPU wake-up (35-65 us): spinning longer than what
                               * sleeping costs can never pay */
#define SPIN_SKIP_MAX 64u     /* 50 us in 64 sleeps: under 1 us a wait for load that never hits */

/* Who has sent or received large buffers waits for somebody who reads, and perhaps copies, that much
 * memory: about this much time more. It is no guess whether the peer answers at all: a spin that
 * this does not help is a miss like any other. */
enum { SPIN_BESIDE_BYTES_A_NS = 8, SPIN_BESIDE_NS_MAX = 1000000 };
uint64_t spin_beside_ns(uint64_t bytes);

enum wait_mode { WAIT_AUTO = 0, WAIT_SPIN = 1, WAIT_BLOCK = 2 };

struct spin_policy {
    uint32_t mode;      /* enum wait_mode */
    uint32_t budget_ns; /* longest spin */
    uint32_t misses;    /* spins in a row that ended in a sleep */
    uint32_t skip;      /* sleeps to go before the next spin */
    uint32_t failures;  /* waits in a row that pauses did not end */
};

/* Nanoseconds to spin in the wait that begins now; 0 = sleep at once. */
uint64_t spin_policy_begin(struct spin_policy *policy);
/* Whether the next wait would be no spin; and that one begins, without asking. */
bool spin_policy_rests(const struct spin_policy *policy);
void spin_policy_rested(struct spin_policy *policy);
/* It ended while spinning, after this time and perhaps yields. */
void spin_policy_hit(struct spin_policy *policy, bool yielded, uint64_t spun_ns);
/* It ended in a sleep. */
void spin_policy_slept(struct spin_policy *policy, bool spun, uint64_t slept_ns);

/* How a spin passes its time: first pauses, then yields. A pause costs 15 ns and notices an answer
 * at once; a yield is a system call, 0.1 to 0.5 us, but gives the CPU to whoever wants it, the peer
 * perhaps. With a CPU for each, answers come within the PATIENCE_MAX pauses and yields would only
 * be late to see them; with one CPU, or more processes than CPUs, the peer can't run while we
 * pause. So pauses are dropped after PATIENCE_FAILURES waits in a row that they did not end, and
 * tried again in every PATIENCE_PROBE-th. They ended a wait that had no yield and was shorter than
 * PATIENCE_NS: one that was preempted while it paused finds its answer at the next pause, too.
 */
enum { PATIENCE_MAX = 256, PATIENCE_NS = 8000, PATIENCE_FAILURES = 3, PATIENCE_PROBE = 32 };
uint32_t spin_policy_patience(struct spin_policy *policy);
/* One step; returns 1 if it was a yield. */
int spin_step(uint32_t step, uint32_t patience);

/* A yield that took longer than HANDOVER_NS has let somebody else work. After HANDOVERS_MAX of
 * them in one wait the CPUs are crowded, and who is awake for nothing only makes the queue longer:
 * sleep. */
enum { HANDOVER_NS = 3000, HANDOVERS_MAX = 3 };

/* The program's lock, see shmrpc_use_lock: whether this thread has it, so that sleeping costs the
 * time until it has it again; and that it sleeps, or waits for a thread of its own process. */
bool lock_held(void);
void lock_release(void);

uint64_t clock_now_ns(void); /* CLOCK_MONOTONIC */
uint64_t clock_coarse_ns(void); /* the same, some milliseconds late, for a few nanoseconds */

#endif
