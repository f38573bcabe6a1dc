/* test_arena.c - the allocator of large blocks: random orders against a model, churn, fragmentation,
 * hostile returns. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "harness.h"
#include "support.h"

enum { MIB = 1 << 20, LIVE_MAX = 600 };

static const uint64_t SECOND = 1000000000;

struct live {
    struct arena_place place;
    uint64_t bytes, seed;
    bool lent;
};

struct world {
    struct arena arena;
    uint8_t *bases[ARENA_SEGMENTS_MAX];
    struct live live[LIVE_MAX];
    unsigned count;
    uint64_t now_ns, seeds;
};

static void world_open(struct world *world)
{
    memset(world, 0, sizeof *world);
    arena_init(&world->arena);
    world->now_ns = 1;
}

static int world_grow(struct world *world, uint64_t bytes)
{
    uint8_t *base = aligned_alloc(ARENA_GRANULE, bytes / ARENA_GRANULE * ARENA_GRANULE);
    int place;

    REQUIRE(base != NULL);
    place = arena_add(&world->arena, base, bytes, (uint32_t)(world->seeds++ + 100), world->now_ns);
    if (place >= 0)
        world->bases[place] = base;
    else
        free(base);
    return place;
}

static void world_close(struct world *world)
{
    arena_free(&world->arena);
    for (int i = 0; i < ARENA_SEGMENTS_MAX; i++)
        free(world->bases[i]);
}

/* Everything that has to be true of an arena at any time. */
static void check(const struct world *world)
{
    const struct arena *arena = &world->arena;
    uint64_t used = 0, lent = 0;
    uint32_t blocks = 0, lent_blocks = 0, listed = 0, free_count = 0;

    for (int i = 0; i < ARENA_SEGMENTS_MAX; i++) {
        const struct arena_segment *segment = &arena->segments[i];
        uint32_t start = 0, segment_used = 0, before = ARENA_NONE;
        bool was_free = false;
        if (segment->base == NULL)
            continue;
        for (uint32_t index = segment->first; index != ARENA_NONE;) {
            const struct arena_extent *extent = &arena->extents[index];
            REQUIRE(extent->start == start && extent->count != 0 && extent->before == before);
            REQUIRE(extent->segment == (uint32_t)i && extent->lent <= extent->uses);
            REQUIRE(!(was_free && extent->uses == 0)); /* free neighbours have joined */
            was_free = extent->uses == 0;
            free_count += was_free;
            if (!was_free) {
                segment_used += extent->count;
                blocks++;
            }
            if (extent->lent != 0) {
                lent += (uint64_t)extent->count * ARENA_GRANULE;
                lent_blocks++;
            }
            start += extent->count;
            before = index;
            index = extent->after;
        }
        REQUIRE((uint64_t)start * ARENA_GRANULE == segment->bytes);
        REQUIRE(segment->used == segment_used);
        used += (uint64_t)segment_used * ARENA_GRANULE;
    }
    for (int row = 0; row < ARENA_ROWS; row++) {
        for (int column = 0; column < 1 << ARENA_FINE_BITS; column++) {
            uint32_t index = arena->lists[row][column];
            REQUIRE((index != ARENA_NONE) == ((arena->fine[row] >> column & 1) != 0));
            for (; index != ARENA_NONE; index = arena->extents[index].next)
                listed++;
        }
        REQUIRE((arena->fine[row] != 0) == ((arena->rows >> row & 1) != 0));
    }
    CHECK_EQUAL(listed, free_count);
    CHECK_EQUAL(arena->used_bytes, used);
    CHECK_EQUAL(arena->lent_bytes, lent);
    CHECK_EQUAL(arena->blocks, blocks);
    CHECK_EQUAL(arena->lent_blocks, lent_blocks);
}

static bool take(struct world *world, uint64_t bytes)
{
    struct live *live = &world->live[world->count];
    bool fits = arena_fits(&world->arena, bytes);
    int status = arena_alloc(&world->arena, bytes, &live->place);

    CHECK_EQUAL(status, fits ? 0 : -ENOSPC);
    if (status < 0)
        return false;
    CHECK(live->place.bytes >= bytes && (uintptr_t)live->place.data % ARENA_GRANULE == 0);
    live->bytes = bytes;
    live->seed = world->seeds++;
    live->lent = false;
    fill(live->place.data, bytes, live->seed);
    world->count++;
    return true;
}

/* Give one back: as the peer does, or as its owner who has not sent it. */
static void give(struct world *world, unsigned which)
{
    struct live *live = &world->live[which];

    CHECK(filled(live->place.data, live->bytes, live->seed)); /* nobody else had that memory */
    if (live->lent)
        CHECK_EQUAL(arena_return(&world->arena, live->place.index, live->place.generation,
                                 world->now_ns),
                    0);
    else
        arena_drop(&world->arena, live->place.index, world->now_ns);
    *live = world->live[--world->count];
}

TEST(ten_thousand_random_orders)
{
    struct random random = {harness_seed()};
    struct world *world = malloc(sizeof *world);

    world_open(world);
    CHECK(world_grow(world, 4 * MIB) >= 0);
    CHECK(world_grow(world, 1 * MIB) >= 0);
    for (int step = 0; step < 30000; step++) {
        uint64_t choice = random_below(&random, 10);
        unsigned which = world->count != 0 ? (unsigned)random_below(&random, world->count) : 0;
        world->now_ns += 1000;
        if (choice < 5 && world->count < LIVE_MAX) {
            uint64_t scale = random_below(&random, 4);
            take(world, random_below(&random, scale == 0 ? 300000 : scale == 1 ? 256 : 9000));
        } else if (choice < 7 && world->count != 0 && !world->live[which].lent) {
            arena_lend(&world->arena, world->live[which].place.index, world->now_ns);
            world->live[which].lent = true;
        } else if (world->count != 0) {
            give(world, which);
        }
        if (step % 64 == 0)
            check(world);
    }
    while (world->count != 0)
        give(world, (unsigned)random_below(&random, world->count));
    check(world);
    CHECK_EQUAL(world->arena.used_bytes, 0);
    CHECK_EQUAL(world->arena.lent_blocks, 0);
    CHECK(arena_fits(&world->arena, 4 * MIB)); /* all that was split has joined again */
    CHECK(arena_fits(&world->arena, 1 * MIB));
    world_close(world);
    free(world);
}

/* An hour of a thousand calls a second, with blocks that live for very different times: memory and
 * the table of extents stop growing early. */
TEST(an_hour_of_churn_leaves_no_growth)
{
    static const uint64_t sizes[] = {5000, 12288, 70000, 262144, 1000000, 65, 4 * MIB - 1};
    struct random random = {harness_seed()};
    struct world *world = malloc(sizeof *world);
    uint32_t capacity = 0;
    unsigned refused = 0;

    world_open(world);
    CHECK(world_grow(world, 64 * MIB) >= 0);
    for (int step = 0; step < 3600000; step++) {
        struct arena_place place;
        if (world->count >= 24) {
            struct live *live = &world->live[random_below(&random, world->count)];
            arena_drop(&world->arena, live->place.index, world->now_ns);
            *live = world->live[--world->count];
        }
        if (arena_alloc(&world->arena, sizes[random_below(&random, 7)], &place) == 0)
            world->live[world->count++].place = place;
        else
            refused++;
        if (step == 360000)
            capacity = world->arena.extent_capacity;
        if (step % 360000 == 0)
            harness_progress(HANG_SECONDS);
    }
    CHECK_EQUAL(world->arena.extent_capacity, capacity);
    /* 24 blocks of 0.8 MB on average, in 64 MB: hardly ever more than fit, however they lie. */
    CHECK(refused < 3600);
    check(world);
    while (world->count != 0)
        arena_drop(&world->arena, world->live[--world->count].place.index, 1);
    CHECK(arena_fits(&world->arena, 64 * MIB));
    world_close(world);
    free(world);
}

/* Who echoes gets the pages that its caches have. */
TEST(the_same_size_gets_the_same_memory)
{
    static const uint64_t sizes[] = {1, 4096, 65536, 1000000, 1 * MIB};
    struct world *world = malloc(sizeof *world);
    struct arena_place place, again, other;

    world_open(world);
    CHECK(world_grow(world, 8 * MIB) >= 0);
    CHECK(world_grow(world, 2 * MIB) >= 0);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CHECK_EQUAL(arena_alloc(&world->arena, sizes[i], &place), 0);
        arena_drop(&world->arena, place.index, 1);
        CHECK_EQUAL(arena_alloc(&world->arena, sizes[i], &again), 0);
        CHECK(again.data == place.data && again.index == place.index);
        CHECK(again.generation != place.generation);
        /* Also with others in use around it. */
        CHECK_EQUAL(arena_alloc(&world->arena, 100, &other), 0);
        arena_drop(&world->arena, again.index, 1);
        CHECK_EQUAL(arena_alloc(&world->arena, sizes[i], &again), 0);
        CHECK(again.data == place.data);
        arena_drop(&world->arena, other.index, 1);
        arena_drop(&world->arena, again.index, 1);
    }
    world_close(world);
    free(world);
}

/* A segment that was made for one block holds it, whatever its size. */
TEST(a_block_as_large_as_the_segment)
{
    for (uint64_t bytes = ARENA_GRANULE; bytes < 3 * MIB; bytes += 61 * ARENA_GRANULE) {
        struct world *world = malloc(sizeof *world);
        struct arena_place place;
        world_open(world);
        CHECK(world_grow(world, bytes) >= 0);
        CHECK(!arena_fits(&world->arena, bytes + 1));
        CHECK_EQUAL(arena_alloc(&world->arena, bytes + 1, &place), -ENOSPC);
        CHECK_EQUAL(arena_alloc(&world->arena, bytes, &place), 0);
        CHECK_EQUAL(arena_alloc(&world->arena, 1, &place), -ENOSPC);
        world_close(world);
        free(world);
    }
}

TEST(sizes_beyond_all_memory)
{
    struct world *world = malloc(sizeof *world);
    struct arena_place place;

    world_open(world);
    CHECK(world_grow(world, MIB) >= 0);
    CHECK_EQUAL(arena_alloc(&world->arena, UINT64_MAX, &place), -ENOSPC);
    CHECK_EQUAL(arena_alloc(&world->arena, (uint64_t)UINT32_MAX * ARENA_GRANULE, &place), -ENOSPC);
    CHECK(!arena_fits(&world->arena, UINT64_MAX - 1));
    CHECK_EQUAL(arena_add(&world->arena, world->bases[0], UINT64_MAX, 1, 1), -ENOSPC);
    CHECK_EQUAL(arena_add(&world->arena, world->bases[0], 100, 1, 1), -ENOSPC);
    check(world);
    world_close(world);
    free(world);
}

TEST(hostile_returns_are_refused)
{
    struct world *world = malloc(sizeof *world);
    struct arena_place place, other;
    uint64_t now = 5;

    world_open(world);
    CHECK(world_grow(world, MIB) >= 0);
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &place), 0);
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &other), 0);
    /* Not the peer's. */
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, now), -EPROTO);
    arena_lend(&world->arena, place.index, now);
    CHECK_EQUAL(arena_oldest_ns(&world->arena), now);
    /* Wrong generation, another's block, free memory, indices that never were. */
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation + 1, now), -EPROTO);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation - 1, now), -EPROTO);
    CHECK_EQUAL(arena_return(&world->arena, other.index, other.generation, now), -EPROTO);
    for (uint32_t index = 0; index < 200; index++)
        if (index != place.index)
            for (uint32_t generation = 0; generation < 3; generation++)
                CHECK_EQUAL(arena_return(&world->arena, index, generation, now), -EPROTO);
    CHECK_EQUAL(arena_return(&world->arena, UINT32_MAX, place.generation, now), -EPROTO);
    check(world);
    /* Twice. */
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, now), 0);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, now), -EPROTO);
    /* Again after somebody else has got it. */
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &other), 0);
    CHECK_EQUAL(other.index, place.index);
    arena_lend(&world->arena, other.index, now);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, now), -EPROTO);
    CHECK_EQUAL(arena_oldest_ns(&world->arena), now);
    check(world);
    world_close(world);
    free(world);
}

/* A block that is sent twice, and kept, is free when all have given it back, in any order. */
TEST(uses_are_counted)
{
    struct world *world = malloc(sizeof *world);
    struct arena_place place;

    world_open(world);
    CHECK(world_grow(world, MIB) >= 0);
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &place), 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(arena_share(&world->arena, place.index), 0);
        arena_lend(&world->arena, place.index, 7);
    }
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, 8), 0);
    arena_drop(&world->arena, place.index, 8);
    CHECK_EQUAL(world->arena.blocks, 1);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, 8), 0);
    CHECK_EQUAL(world->arena.blocks, 0);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, 8), -EPROTO);
    /* One that was not sent, after all, and that the peer has guessed and given back: it is the next
     * one's already. */
    struct arena_place next;
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &place), 0);
    arena_lend(&world->arena, place.index, 9);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, 9), 0);
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &next), 0);
    CHECK_EQUAL(next.index, place.index);
    arena_lend(&world->arena, next.index, 9);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, 9), -EPROTO);
    CHECK_EQUAL(world->arena.lent_blocks, 1);
    CHECK_EQUAL(arena_return(&world->arena, next.index, next.generation, 9), 0);
    CHECK_EQUAL(world->arena.blocks, 0);
    check(world);
    world_close(world);
    free(world);
}

/* What was free for a while goes, and nothing of it is given out meanwhile; what is in use stays. */
TEST(idle_segments_go)
{
    struct world *world = malloc(sizeof *world);
    struct arena_place place, rest;

    world_open(world);
    CHECK(world_grow(world, MIB) >= 0);
    CHECK_EQUAL(arena_alloc(&world->arena, 5000, &place), 0);
    CHECK_EQUAL(arena_find_idle(&world->arena, 100 * SECOND, SECOND), -ENOENT);
    int second = world_grow(world, 2 * MIB);
    CHECK_EQUAL(arena_find_idle(&world->arena, world->now_ns + SECOND - 1, SECOND), -ENOENT);
    CHECK_EQUAL(arena_find_idle(&world->arena, world->now_ns + SECOND, SECOND), second);
    arena_close(&world->arena, second);
    CHECK_EQUAL(arena_find_idle(&world->arena, 100 * SECOND, SECOND), -ENOENT);
    CHECK(!arena_fits(&world->arena, 2 * MIB));
    CHECK_EQUAL(world->arena.bytes, 3 * MIB); /* the peer may have it mapped still */
    arena_remove(&world->arena, second);
    CHECK_EQUAL(world->arena.bytes, MIB);
    arena_drop(&world->arena, place.index, 50 * SECOND);
    CHECK_EQUAL(arena_find_idle(&world->arena, 50 * SECOND, SECOND), -ENOENT);
    CHECK_EQUAL(arena_find_idle(&world->arena, 51 * SECOND, SECOND), 0);
    arena_close(&world->arena, 0);
    arena_remove(&world->arena, 0);
    CHECK_EQUAL(arena_alloc(&world->arena, 1, &rest), -ENOSPC);
    CHECK_EQUAL(arena_return(&world->arena, place.index, place.generation, 1), -EPROTO);
    free(world->bases[second]); /* place 1 is used again below */
    world->bases[second] = NULL;
    free(world->bases[0]);
    world->bases[0] = NULL;
    CHECK(world_grow(world, MIB) >= 0);
    CHECK_EQUAL(arena_alloc(&world->arena, MIB, &rest), 0);
    check(world);
    world_close(world);
    free(world);
}

TEST(no_more_segments_than_there_may_be)
{
    struct world *world = malloc(sizeof *world);

    world_open(world);
    for (int i = 0; i < ARENA_SEGMENTS_MAX; i++)
        CHECK_EQUAL(world_grow(world, 4096), i);
    CHECK_EQUAL(world_grow(world, 4096), -ENOSPC);
    while (take(world, 2048) && world->count < LIVE_MAX)
        check(world);
    CHECK_EQUAL(world->count, 2 * ARENA_SEGMENTS_MAX);
    world_close(world);
    free(world);
}

int main(int argc, char **argv)
{
    return harness_main(argc, argv);
}
