/* wake.c - see wake.h for the protocol and the policy. */
#define _GNU_SOURCE
#include "wake.h"

#include <sched.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "shmrpc.h"

void wake_arm(struct wake *wake)
{
    wake->epoch++;
    store_relaxed(&wake->own->arm, wake->epoch << 1 | 1);
}

void wake_arm_fence(void)
{
    full_fence(); /* fence F, pairs with E: arm before the last look at the peer's tail */
}

void wake_disarm(struct wake *wake)
{
    store_relaxed(&wake->own->arm, wake->epoch << 1);
}

/* Never blocks: an eventfd at its limit or a full socket means that the peer has enough bells to
 * wake up for. A peer that is gone is noticed by the hang-up of its control socket. */
static void ring_bell(const struct wake *wake)
{
    static const uint64_t one = 1;
    ssize_t written;

    if (wake->bell_socket)
        written = send(wake->peer_bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    else
        written = write(wake->peer_bell, &one, sizeof one);
    (void)written;
}

static int ring_if_asleep(struct wake *wake)
{
    uint64_t arm = load_relaxed(&wake->peer->arm);

    if ((arm & 1) == 0 || arm == load_relaxed(&wake->rung))
        return 0;
    store_relaxed(&wake->rung, arm);
    ring_bell(wake);
    return 1;
}

/* After our tail was stored. */
static void published_fence(void)
{
    full_fence(); /* fence E, pairs with F: our tail before the peer's arm, and its wants */
}

int wake_peer_for_data(struct wake *wake)
{
    published_fence();
    return ring_if_asleep(wake);
}

void wake_peer_for_blocks(struct wake *wake)
{
    published_fence();
    if (load_relaxed(&wake->peer->wants) != 0)
        ring_if_asleep(wake);
}

int wake_peer_for_space(struct wake *wake, uint64_t head, uint64_t slack)
{
    full_fence(); /* fence G, pairs with H: our head before the peer's space and arm */
    uint64_t space = load_relaxed(&wake->peer->space);

    if ((space & 1) == 0 || (int64_t)(head + slack - (space >> 1)) < 0)
        return 0;
    return ring_if_asleep(wake);
}

void wake_want_space(struct wake *wake, uint64_t position)
{
    store_relaxed(&wake->own->space, position << 1 | 1);
    full_fence(); /* fence H, pairs with G: space before the last look at the peer's head */
}

void wake_got_space(struct wake *wake)
{
    store_relaxed(&wake->own->space, 0);
}

uint64_t spin_policy_begin(struct spin_policy *policy)
{
    if (policy->mode == WAIT_SPIN)
        return UINT64_MAX;
    if (policy->mode == WAIT_BLOCK)
        return 0;
    if (policy->skip != 0) {
        policy->skip--;
        return 0;
    }
    return policy->budget_ns;
}

bool spin_policy_rests(const struct spin_policy *policy)
{
    return policy->mode == WAIT_BLOCK || (policy->mode == WAIT_AUTO && policy->skip != 0);
}

void spin_policy_rested(struct spin_policy *policy)
{
    if (policy->skip != 0)
        policy->skip--;
}

uint64_t spin_beside_ns(uint64_t bytes)
{
    uint64_t ns = bytes / SPIN_BESIDE_BYTES_A_NS;

    return ns < SPIN_BESIDE_NS_MAX ? ns : SPIN_BESIDE_NS_MAX;
}

void spin_policy_hit(struct spin_policy *policy, bool yielded, uint64_t spun_ns)
{
    policy->misses = 0;
    policy->failures = yielded || spun_ns > PATIENCE_NS ? policy->failures + 1 : 0;
}

void spin_policy_slept(struct spin_policy *policy, bool spun, uint64_t slept_ns)
{
    if (slept_ns < policy->budget_ns) {
        policy->misses = 0;
        policy->skip = 0;
    } else if (spun) {
        policy->skip = 1u << (policy->misses < 6 ? policy->misses : 6);
        policy->misses++;
    }
    if (spun)
        policy->failures++;
}

_Static_assert(1u << 6 == SPIN_SKIP_MAX, "the shift in spin_policy_slept stops there");

uint32_t spin_policy_patience(struct spin_policy *policy)
{
    bool pauses = policy->failures < PATIENCE_FAILURES || policy->failures % PATIENCE_PROBE == 0;

    return pauses ? PATIENCE_MAX : 0;
}

int spin_step(uint32_t step, uint32_t patience)
{
    if (step < patience) {
        cpu_pause();
        return 0;
    }
    sched_yield();
    return 1;
}

static int (*program_held)(void);
static void (*program_release)(void);

void shmrpc_use_lock(int (*held)(void), void (*release)(void))
{
    program_held = held;
    program_release = release;
}

bool lock_held(void)
{
    return program_held != NULL && program_held() != 0;
}

void lock_release(void)
{
    if (program_release != NULL)
        program_release();
}

uint64_t clock_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t clock_coarse_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
