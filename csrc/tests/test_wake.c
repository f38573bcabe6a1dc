/* test_wake.c - the doorbell protocol step by step, and what the spin policy learns. No timing. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "support.h"
#include "wake.h"

/* The sender's end rings `bell`, the sleeper's end arms. */
struct ends {
    struct segment_shm *segments[2];
    struct wake sender, sleeper;
    int bell;
};

static void ends_open(struct ends *ends)
{
    *ends = (struct ends){.bell = eventfd(0, EFD_NONBLOCK)};
    for (int i = 0; i < 2; i++) {
        ends->segments[i] = aligned_alloc(128, sizeof(struct segment_shm));
        REQUIRE(ends->segments[i] != NULL);
        memset(ends->segments[i], 0, sizeof(struct segment_shm));
    }
    ends->sender = (struct wake){
        .own = ends->segments[0], .peer = ends->segments[1], .peer_bell = ends->bell};
    ends->sleeper = (struct wake){
        .own = ends->segments[1], .peer = ends->segments[0], .peer_bell = -1};
}

static void ends_close(struct ends *ends)
{
    free(ends->segments[0]);
    free(ends->segments[1]);
    close(ends->bell);
}

/* How often the bell was rung since the last time. */
static uint64_t rings(const struct ends *ends)
{
    uint64_t count = 0;

    return read(ends->bell, &count, sizeof count) == sizeof count ? count : 0;
}

TEST(rings_once_in_an_epoch)
{
    struct ends ends;

    ends_open(&ends);
    CHECK_EQUAL(wake_peer_for_data(&ends.sender), 0); /* never armed */
    CHECK_EQUAL(rings(&ends), 0);
    for (int epoch = 0; epoch < 5; epoch++) {
        wake_arm(&ends.sleeper);
        wake_arm_fence();
        CHECK_EQUAL(wake_peer_for_data(&ends.sender), 1);
        for (int i = 0; i < 3; i++)
            CHECK_EQUAL(wake_peer_for_data(&ends.sender), 0);
        CHECK_EQUAL(rings(&ends), 1);
        wake_disarm(&ends.sleeper);
        CHECK_EQUAL(wake_peer_for_data(&ends.sender), 0);
        CHECK_EQUAL(rings(&ends), 0);
    }
    ends_close(&ends);
}

/* Armed, disarmed without being rung (it found work itself), armed again: each arming is new. */
TEST(an_epoch_without_a_ring)
{
    struct ends ends;

    ends_open(&ends);
    wake_arm(&ends.sleeper);
    wake_disarm(&ends.sleeper);
    CHECK_EQUAL(wake_peer_for_data(&ends.sender), 0);
    wake_arm(&ends.sleeper);
    CHECK_EQUAL(wake_peer_for_data(&ends.sender), 1);
    wake_disarm(&ends.sleeper);
    wake_arm(&ends.sleeper);
    CHECK_EQUAL(wake_peer_for_data(&ends.sender), 1);
    CHECK_EQUAL(rings(&ends), 2);
    ends_close(&ends);
}

TEST(new_segment_is_armed)
{
    struct pair pair;
    struct hand hand;

    pair_open(&pair, SHM, 4096, 4096);
    hand_open(&hand, &pair);
    struct wake wake = {.own = hand.own, .peer = hand.peer, .peer_bell = hand.bell_fd};
    CHECK_EQUAL(wake_peer_for_data(&wake), 1);
    CHECK_EQUAL(wake_peer_for_data(&wake), 0);
    guarded_munmap((void *)(uintptr_t)hand.peer, 8192);
    pair_close(&pair);
}

/* Here the "sleeper" has freed space and rings the sender that waits for it. */
TEST(space_is_announced_when_it_is_reached)
{
    struct ends ends;
    struct wake *consumer = &ends.sender, *producer = &ends.sleeper;

    ends_open(&ends);
    wake_arm(producer);
    CHECK_EQUAL(wake_peer_for_space(consumer, 5000, 0), 0); /* nobody wants any */
    wake_want_space(producer, 1000);
    CHECK_EQUAL(wake_peer_for_space(consumer, 999, 0), 0);
    CHECK_EQUAL(wake_peer_for_space(consumer, 900, 99), 0);
    CHECK_EQUAL(wake_peer_for_space(consumer, 900, 100), 1);
    CHECK_EQUAL(wake_peer_for_space(consumer, 1000, 0), 0); /* rung in this epoch */
    wake_disarm(producer);
    CHECK_EQUAL(wake_peer_for_space(consumer, 2000, 0), 0);
    wake_arm(producer);
    CHECK_EQUAL(wake_peer_for_space(consumer, 2000, 0), 1);
    wake_got_space(producer);
    wake_disarm(producer);
    wake_arm(producer);
    CHECK_EQUAL(wake_peer_for_space(consumer, 3000, 0), 0);
    CHECK_EQUAL(rings(&ends), 2);
    ends_close(&ends);
}

/* One doorbell serves both: data and space do not ring twice for one sleep. */
TEST(data_and_space_share_the_bell)
{
    struct ends ends;

    ends_open(&ends);
    wake_want_space(&ends.sleeper, 10);
    wake_arm(&ends.sleeper);
    CHECK_EQUAL(wake_peer_for_data(&ends.sender), 1);
    CHECK_EQUAL(wake_peer_for_space(&ends.sender, 10, 0), 0);
    CHECK_EQUAL(rings(&ends), 1);
    ends_close(&ends);
}

/* Whatever a peer writes into arm and space costs at most one system call each time. */
TEST(hostile_arm_and_space)
{
    struct ends ends;
    struct random random = {harness_seed()};

    ends_open(&ends);
    for (int i = 0; i < 10000; i++) {
        store_relaxed(&ends.segments[1]->arm, random_next(&random));
        store_relaxed(&ends.segments[1]->space, random_next(&random));
        wake_peer_for_data(&ends.sender);
        wake_peer_for_space(&ends.sender, random_next(&random), random_below(&random, 9000));
        CHECK(rings(&ends) <= 1);
    }
    ends_close(&ends);
}

TEST(bell_on_a_socket)
{
    struct ends ends;
    int sockets[2];
    char bytes[16];

    ends_open(&ends);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    ends.sender.peer_bell = sockets[0];
    ends.sender.bell_socket = true;
    for (int i = 0; i < 5; i++) {
        wake_arm(&ends.sleeper);
        CHECK_EQUAL(wake_peer_for_data(&ends.sender), 1);
    }
    CHECK_EQUAL(recv(sockets[1], bytes, sizeof bytes, MSG_DONTWAIT), 5);
    for (int i = 0; i < 100000; i++) { /* nobody reads: full, and nothing blocks */
        wake_arm(&ends.sleeper);
        wake_peer_for_data(&ends.sender);
    }
    close(sockets[1]);
    wake_arm(&ends.sleeper);
    CHECK_EQUAL(wake_peer_for_data(&ends.sender), 1); /* EPIPE without a signal */
    close(sockets[0]);
    ends_close(&ends);
}

/* ---- the policy ---- */

static const uint64_t LONG = 10 * SPIN_BUDGET_NS;

TEST(policy_spins_while_that_works)
{
    struct spin_policy policy = {.budget_ns = SPIN_BUDGET_NS};

    for (int i = 0; i < 100; i++) {
        CHECK(spin_policy_begin(&policy) == SPIN_BUDGET_NS);
        spin_policy_hit(&policy, false, 1000);
    }
}

/* Sleeps without a spin between two spins. */
static unsigned skipped(struct spin_policy *policy)
{
    unsigned count = 0;

    while (spin_policy_begin(policy) == 0) {
        spin_policy_slept(policy, false, LONG);
        count++;
        REQUIRE(count < 1000);
    }
    return count;
}

TEST(policy_backs_off)
{
    struct spin_policy policy = {.budget_ns = SPIN_BUDGET_NS};
    static const unsigned expected[] = {0, 1, 2, 4, 8, 16, 32, 64, 64, 64};

    for (unsigned i = 0; i < sizeof expected / sizeof *expected; i++) {
        CHECK_EQUAL(skipped(&policy), expected[i]);
        spin_policy_slept(&policy, true, LONG);
    }
    for (int i = 0; i < 64; i++)
        CHECK(spin_policy_begin(&policy) == 0);
    CHECK(spin_policy_begin(&policy) == SPIN_BUDGET_NS);
    spin_policy_hit(&policy, false, 1000); /* it paid: forgets the misses */
    CHECK(spin_policy_begin(&policy) == SPIN_BUDGET_NS);
    spin_policy_slept(&policy, true, LONG);
    CHECK_EQUAL(skipped(&policy), 1);
}

TEST(policy_tries_again_after_a_short_sleep)
{
    struct spin_policy policy = {.budget_ns = SPIN_BUDGET_NS};

    for (int i = 0; i < 5; i++) {
        skipped(&policy);
        spin_policy_slept(&policy, true, LONG);
    }
    CHECK(spin_policy_begin(&policy) == 0);
    spin_policy_slept(&policy, false, SPIN_BUDGET_NS - 1);
    CHECK(spin_policy_begin(&policy) == SPIN_BUDGET_NS);
    spin_policy_slept(&policy, true, LONG);
    CHECK_EQUAL(skipped(&policy), 1); /* from the start */
}

TEST(policy_rests_until_it_is_time_to_try)
{
    struct spin_policy policy = {.budget_ns = SPIN_BUDGET_NS, .misses = 2};

    CHECK(!spin_policy_rests(&policy));
    spin_policy_slept(&policy, true, LONG);
    for (int i = 0; i < 4; i++) {
        CHECK(spin_policy_rests(&policy));
        spin_policy_rested(&policy);
    }
    CHECK(!spin_policy_rests(&policy));
    spin_policy_rested(&policy); /* nothing is left to skip */
    CHECK(spin_policy_begin(&policy) == SPIN_BUDGET_NS);
    policy.mode = WAIT_BLOCK;
    CHECK(spin_policy_rests(&policy));
    policy = (struct spin_policy){.mode = WAIT_SPIN, .skip = 1};
    CHECK(!spin_policy_rests(&policy));
}

TEST(policy_modes)
{
    struct spin_policy spin = {.mode = WAIT_SPIN, .budget_ns = SPIN_BUDGET_NS};
    struct spin_policy block = {.mode = WAIT_BLOCK, .budget_ns = SPIN_BUDGET_NS};

    for (int i = 0; i < 100; i++) {
        CHECK(spin_policy_begin(&spin) == UINT64_MAX);
        spin_policy_slept(&spin, true, LONG);
        CHECK(spin_policy_begin(&block) == 0);
        spin_policy_slept(&block, false, 1);
    }
}

TEST(spin_steps)
{
    for (uint32_t step = 0; step < 500; step++) {
        CHECK_EQUAL(spin_step(step, 0), 1);
        CHECK_EQUAL(spin_step(step, PATIENCE_MAX), step >= PATIENCE_MAX);
    }
    CHECK(spin_step(UINT32_MAX, PATIENCE_MAX) == 1);
}

TEST(patience_follows_what_paid)
{
    struct spin_policy policy = {.budget_ns = SPIN_BUDGET_NS};

    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(spin_policy_patience(&policy), PATIENCE_MAX);
        spin_policy_hit(&policy, false, PATIENCE_NS);
    }
    /* A wait that needed a yield, one that was preempted while it paused, one that slept. */
    spin_policy_hit(&policy, true, 1000);
    CHECK_EQUAL(spin_policy_patience(&policy), PATIENCE_MAX);
    spin_policy_hit(&policy, false, PATIENCE_NS + 1);
    CHECK_EQUAL(spin_policy_patience(&policy), PATIENCE_MAX);
    spin_policy_slept(&policy, true, LONG);
    CHECK_EQUAL(spin_policy_patience(&policy), 0);
}

TEST(patience_is_tried_again)
{
    struct spin_policy policy = {.budget_ns = SPIN_BUDGET_NS};
    unsigned probes = 0;

    for (int i = 0; i < 10 * PATIENCE_PROBE; i++) {
        probes += i >= PATIENCE_FAILURES && spin_policy_patience(&policy) != 0;
        spin_policy_hit(&policy, true, 1000);
    }
    CHECK_EQUAL(probes, 9);
    while (spin_policy_patience(&policy) == 0)
        spin_policy_hit(&policy, true, 1000);
    spin_policy_hit(&policy, false, 1000); /* the probe paid */
    CHECK_EQUAL(spin_policy_patience(&policy), PATIENCE_MAX);
    spin_policy_hit(&policy, true, 1000); /* and one failure is forgiven */
    CHECK_EQUAL(spin_policy_patience(&policy), PATIENCE_MAX);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
