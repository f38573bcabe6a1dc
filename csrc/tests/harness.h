/* harness.h - what a test program is made of.
 *
 *     TEST(wraps_around)
 *     {
 *         CHECK(1 + 1 == 2);
 *     }
 *
 *     int main(int argc, char **argv) { return harness_main(argc, argv); }
 *
 * CHECK notes a failure with file and line and goes on; REQUIRE ends the program. A test that makes
 * no progress for HANG_SECONDS dumps what harness_on_hang was given and fails. Program arguments
 * name the tests to run.
 */
#ifndef SHMRPC_TESTS_HARNESS_H
#define SHMRPC_TESTS_HARNESS_H

#include <stdbool.h>
#include <stdint.h>

#define TEST(name)                                                                                \
    static void test_##name(void);                                                                \
    __attribute__((constructor)) static void register_##name(void)                                \
    {                                                                                             \
        harness_add(#name, test_##name);                                                          \
    }                                                                                             \
    static void test_##name(void)

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition))                                                                         \
            harness_fail(__FILE__, __LINE__, #condition);                                         \
    } while (0)

#define CHECK_EQUAL(left, right)                                                                  \
    harness_equal(__FILE__, __LINE__, #left " == " #right, (int64_t)(left), (int64_t)(right))

#define REQUIRE(condition)                                                                        \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            harness_fail(__FILE__, __LINE__, #condition);                                         \
            harness_end();                                                                        \
        }                                                                                         \
    } while (0)

enum { HANG_SECONDS = 20 };

void harness_add(const char *name, void (*function)(void));
int harness_main(int argc, char **argv);
void harness_fail(const char *file, int line, const char *text);
void harness_equal(const char *file, int line, const char *text, int64_t left, int64_t right);
_Noreturn void harness_end(void);
/* The test is alive: the clock of the hang starts anew, with this many seconds. */
void harness_progress(unsigned seconds);
/* Called in a signal handler when a test hangs. Null for nothing. */
void harness_on_hang(void (*dump)(void));

/* SHMRPC_SEED of the environment, or a new one; printed by harness_main. */
uint64_t harness_seed(void);
/* A number from the environment, or `otherwise`. */
uint64_t harness_number(const char *name, uint64_t otherwise);

struct random {
    uint64_t state;
};

uint64_t random_next(struct random *random);
/* From 0 to bound - 1. */
uint64_t random_below(struct random *random, uint64_t bound);

#endif
