/* test_copy.c - copying into blocks: every byte, none beside, and which stores are used when. */
#include <stdlib.h>
#include <string.h>

#include "copy.h"
#include "harness.h"
#include "support.h"

enum { KIB = 1 << 10, MIB = 1 << 20, MARGIN = 256 };

static uint8_t *source, *target;

static void begin(uint64_t bytes)
{
    source = malloc(bytes + 2 * MARGIN);
    target = malloc(bytes + 2 * MARGIN);
    REQUIRE(source != NULL && target != NULL);
    fill(source, bytes + 2 * MARGIN, 7);
}

static void end(void)
{
    free(source);
    free(target);
}

static void check_copy(struct copier *copier, uint64_t from, uint64_t to, uint64_t bytes, bool ahead)
{
    uint64_t behind = to + bytes;

    memset(target, 0xa5, to);
    memset(target + behind, 0xa5, MARGIN);
    copy_out(copier, target + to, source + from, bytes, ahead);
    CHECK(memcmp(target + to, source + from, bytes) == 0);
    for (uint64_t i = 0; i < to; i++)
        REQUIRE(target[i] == 0xa5);
    for (uint64_t i = behind; i < behind + MARGIN; i++)
        REQUIRE(target[i] == 0xa5);
}

TEST(all_sizes_and_alignments)
{
    static const uint64_t sizes[] = {0,         1,           4096,           8 * KIB - 1, 8 * KIB,
                                     8 * KIB + 63, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1,
                                     200 * KIB + 77, 1 * MIB};
    struct random random = {harness_seed()};
    struct copier copier = {.left = 0};

    begin(1 * MIB);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int j = 0; j < 12; j++)
            check_copy(&copier, random_below(&random, MARGIN), random_below(&random, MARGIN),
                       sizes[i], j % 2 != 0);
    end();
}

#if defined(__SSE2__)

/* Against streaming stores that took nearly no time, all else is slow. */
TEST(slow_ordinary_stores_are_given_up)
{
    struct copier copier = {.streamed_ns = 1};
    uint64_t pause = COPY_PAUSE_MIN;

    begin(1 * MIB);
    check_copy(&copier, 0, 0, COPY_PIECE, true);
    CHECK_EQUAL(copier.slow, 1);
    CHECK_EQUAL(copier.left, 0);
    while (pause <= COPY_PAUSE_MAX) { /* twice as long each time */
        store_relaxed(&copier.streamed_ns, 1);
        store_relaxed(&copier.left, 0);
        check_copy(&copier, 1, 2, 1 * MIB, true);
        CHECK_EQUAL(copier.left, pause);
        CHECK_EQUAL(copier.pause, pause);
        pause *= 2;
    }
    store_relaxed(&copier.streamed_ns, 1);
    store_relaxed(&copier.left, 0);
    check_copy(&copier, 0, 0, 1 * MIB, true);
    CHECK_EQUAL(copier.left, COPY_PAUSE_MAX);
    /* Streamed until the pause is over, which others do not shorten. */
    for (int i = 1; i <= 3; i++) {
        check_copy(&copier, 0, 0, 1 * MIB, true);
        check_copy(&copier, 0, 0, 1 * MIB, false);
        CHECK_EQUAL(copier.left, (uint64_t)COPY_PAUSE_MAX - (uint64_t)i * MIB);
    }
    end();
}

TEST(quick_ordinary_stores_go_on)
{
    struct copier copier = {.streamed_ns = 1000000000, .pause = 3 * MIB, .slow = 1};

    begin(1 * MIB);
    for (int i = 1; i <= 4; i++) {
        check_copy(&copier, 0, 0, 1 * MIB, true);
        CHECK_EQUAL(copier.pause, i < 3 ? (uint64_t)(3 - i) * MIB : 0);
        CHECK_EQUAL(copier.left, 0);
        CHECK_EQUAL(copier.slow, 0);
    }
    CHECK_EQUAL(copier.streamed_ns, 1000000000); /* nothing was streamed */
    end();
}

/* What streaming takes is known before anything is compared with it, and a thread that had to wait for
 * its CPU does not say that it takes long. */
TEST(streaming_stores_are_measured_first)
{
    struct copier copier = {.left = 0};

    begin(1 * MIB);
    check_copy(&copier, 0, 0, 100 * KIB, true);
    CHECK(copier.streamed_ns != 0);
    store_relaxed(&copier.streamed_ns, 16);
    check_copy(&copier, 0, 0, 100 * KIB, false);
    CHECK(copier.streamed_ns <= 18);
    end();
}

#endif

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
