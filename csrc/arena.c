/* arena.c - see arena.h. */
#include "arena.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { FINE = 1 << ARENA_FINE_BITS };

/* So many extents of the exact class are looked at before a larger one is cut. */
enum { EXACT_LOOKS = 8 };

static unsigned highest_bit(uint32_t value)
{
    return 31u - (unsigned)__builtin_clz(value);
}

static uint32_t to_granules(uint64_t bytes)
{
    if (bytes > (uint64_t)(UINT32_MAX - 1) * ARENA_GRANULE)
        return UINT32_MAX;
    return bytes == 0 ? 1 : (uint32_t)((bytes + ARENA_GRANULE - 1) / ARENA_GRANULE);
}

/* The list of extents of this size. Row 0 has one class for each size below FINE, row n those from
 * FINE << (n - 1) on. */
static void class_of(uint32_t count, uint32_t *row, uint32_t *column)
{
    if (count < FINE) {
        *row = 0;
        *column = count;
        return;
    }
    unsigned top = highest_bit(count);
    *row = top - ARENA_FINE_BITS + 1;
    *column = count >> (top - ARENA_FINE_BITS) & (FINE - 1);
}

void arena_init(struct arena *arena)
{
    memset(arena, 0, sizeof *arena);
    memset(arena->lists, 0xff, sizeof arena->lists);
    arena->spare = ARENA_NONE;
}

void arena_free(struct arena *arena)
{
    free(arena->extents);
    arena_init(arena);
}

/* ---- extents ---- */

static struct arena_extent *at(const struct arena *arena, uint32_t index)
{
    return &arena->extents[index];
}

static void list_push(struct arena *arena, uint32_t index)
{
    struct arena_extent *extent = at(arena, index);
    uint32_t row, column;

    class_of(extent->count, &row, &column);
    uint32_t *head = &arena->lists[row][column];
    extent->previous = ARENA_NONE;
    extent->next = *head;
    if (*head != ARENA_NONE)
        at(arena, *head)->previous = index;
    *head = index;
    arena->rows |= 1u << row;
    arena->fine[row] |= 1u << column;
}

static void list_remove(struct arena *arena, uint32_t index)
{
    struct arena_extent *extent = at(arena, index);
    uint32_t row, column;

    if (extent->next != ARENA_NONE)
        at(arena, extent->next)->previous = extent->previous;
    if (extent->previous != ARENA_NONE) {
        at(arena, extent->previous)->next = extent->next;
        return;
    }
    class_of(extent->count, &row, &column);
    arena->lists[row][column] = extent->next;
    if (extent->next != ARENA_NONE)
        return;
    arena->fine[row] &= ~(1u << column);
    if (arena->fine[row] == 0)
        arena->rows &= ~(1u << row);
}

/* Make sure that so many more extents can be had. */
static int reserve(struct arena *arena, uint32_t count)
{
    uint32_t index = arena->spare;

    while (count != 0 && index != ARENA_NONE) {
        index = at(arena, index)->next;
        count--;
    }
    if (arena->extent_capacity - arena->extent_count >= count)
        return 0;
    uint32_t capacity = arena->extent_capacity == 0 ? 64 : arena->extent_capacity * 2;
    if (capacity > ARENA_BLOCKS_MAX)
        return -ENOMEM;
    struct arena_extent *extents = realloc(arena->extents, capacity * sizeof *extents);
    if (extents == NULL)
        return -ENOMEM;
    arena->extents = extents;
    arena->extent_capacity = capacity;
    return 0;
}

static uint32_t take_extent(struct arena *arena)
{
    uint32_t index = arena->spare;

    if (index != ARENA_NONE) {
        arena->spare = at(arena, index)->next;
        return index;
    }
    index = arena->extent_count++;
    *at(arena, index) = (struct arena_extent){.generation = 0};
    return index;
}

static void spare_extent(struct arena *arena, uint32_t index)
{
    at(arena, index)->count = 0;
    at(arena, index)->next = arena->spare;
    arena->spare = index;
}

static void set_extent(struct arena *arena, uint32_t index, uint32_t segment, uint32_t start,
                       uint32_t count)
{
    struct arena_extent *extent = at(arena, index);

    extent->segment = segment;
    extent->start = start;
    extent->count = count;
    extent->uses = extent->lent = 0;
    extent->before = extent->after = ARENA_NONE;
}

/* The extent takes in the one behind it. */
static void join(struct arena *arena, uint32_t index, uint32_t behind)
{
    struct arena_extent *extent = at(arena, index);

    extent->count += at(arena, behind)->count;
    extent->after = at(arena, behind)->after;
    if (extent->after != ARENA_NONE)
        at(arena, extent->after)->before = index;
    spare_extent(arena, behind);
}

static bool is_free(const struct arena *arena, uint32_t index)
{
    return index != ARENA_NONE && at(arena, index)->uses == 0;
}

/* ---- segments ---- */

static uint32_t find_place(const struct arena *arena)
{
    uint32_t place = 0;

    while (place < ARENA_SEGMENTS_MAX && arena->segments[place].base != NULL)
        place++;
    return place;
}

bool arena_has_place(const struct arena *arena)
{
    return find_place(arena) != ARENA_SEGMENTS_MAX;
}

int arena_add(struct arena *arena, uint8_t *base, uint64_t bytes, uint32_t number, uint64_t now_ns)
{
    uint32_t count = to_granules(bytes);
    uint32_t place = find_place(arena);

    if (place == ARENA_SEGMENTS_MAX || count == UINT32_MAX || bytes % ARENA_GRANULE != 0)
        return -ENOSPC;
    if (reserve(arena, 1) < 0)
        return -ENOMEM;
    uint32_t index = take_extent(arena);
    set_extent(arena, index, place, 0, count);
    arena->segments[place] = (struct arena_segment){
        .base = base, .bytes = bytes, .number = number, .first = index, .idle_ns = now_ns};
    arena->bytes += bytes;
    list_push(arena, index);
    return (int)place;
}

int arena_find_idle(const struct arena *arena, uint64_t now_ns, uint64_t quiet_ns)
{
    for (int i = 0; i < ARENA_SEGMENTS_MAX; i++) {
        const struct arena_segment *segment = &arena->segments[i];
        if (segment->base != NULL && !segment->closed && segment->used == 0 &&
            now_ns - segment->idle_ns >= quiet_ns)
            return i;
    }
    return -ENOENT;
}

bool arena_is_lent(const struct arena *arena)
{
    bool lent = arena->lent_blocks != 0;

    for (int i = 0; i < ARENA_SEGMENTS_MAX && !lent; i++)
        lent = arena->segments[i].base != NULL && arena->segments[i].closed;
    return lent;
}

void arena_close(struct arena *arena, int segment)
{
    arena->segments[segment].closed = true;
    list_remove(arena, arena->segments[segment].first);
}

void arena_remove(struct arena *arena, int segment)
{
    arena->bytes -= arena->segments[segment].bytes;
    spare_extent(arena, arena->segments[segment].first);
    arena->segments[segment] = (struct arena_segment){.base = NULL};
}

/* ---- blocks ---- */

/* An extent of the size's own class that is long enough: their sizes differ by a sixteenth. */
static uint32_t find_exact(const struct arena *arena, uint32_t count, uint32_t looks)
{
    uint32_t row, column;

    class_of(count, &row, &column);
    uint32_t index = arena->lists[row][column];
    while (index != ARENA_NONE && looks-- != 0) {
        if (at(arena, index)->count >= count)
            return index;
        index = at(arena, index)->next;
    }
    return ARENA_NONE;
}

/* One of the next larger class that has any: each of them is long enough. */
static uint32_t find_larger(const struct arena *arena, uint32_t count)
{
    uint32_t row, column;

    class_of(count, &row, &column);
    uint32_t fine = column + 1 < FINE ? arena->fine[row] & ~0u << (column + 1) : 0;
    if (fine == 0) {
        uint32_t rows = row + 1 < ARENA_ROWS ? arena->rows & ~0u << (row + 1) : 0;
        if (rows == 0)
            return ARENA_NONE;
        row = (uint32_t)__builtin_ctz(rows);
        fine = arena->fine[row];
    }
    return arena->lists[row][__builtin_ctz(fine)];
}

static uint32_t find(const struct arena *arena, uint32_t count)
{
    uint32_t index = find_exact(arena, count, EXACT_LOOKS);

    if (index == ARENA_NONE)
        index = find_larger(arena, count);
    return index != ARENA_NONE ? index : find_exact(arena, count, UINT32_MAX);
}

bool arena_fits(const struct arena *arena, uint64_t bytes)
{
    uint32_t count = to_granules(bytes);

    return count != UINT32_MAX && find(arena, count) != ARENA_NONE;
}

int arena_alloc(struct arena *arena, uint64_t bytes, struct arena_place *place)
{
    uint32_t count = to_granules(bytes);

    if (count == UINT32_MAX)
        return -ENOSPC;
    uint32_t index = find(arena, count);
    if (index == ARENA_NONE)
        return -ENOSPC;
    if (reserve(arena, 1) < 0)
        return -ENOMEM;
    list_remove(arena, index);
    struct arena_extent *extent = at(arena, index);
    if (extent->count > count) {
        uint32_t rest = take_extent(arena);
        set_extent(arena, rest, extent->segment, extent->start + count, extent->count - count);
        at(arena, rest)->before = index;
        at(arena, rest)->after = extent->after;
        if (extent->after != ARENA_NONE)
            at(arena, extent->after)->before = rest;
        extent->after = rest;
        extent->count = count;
        list_push(arena, rest);
    }
    extent->generation++;
    extent->uses = 1;
    extent->loaned = false;
    struct arena_segment *segment = &arena->segments[extent->segment];
    segment->used += count;
    arena->used_bytes += (uint64_t)count * ARENA_GRANULE;
    arena->blocks++;
    uint64_t offset = (uint64_t)extent->start * ARENA_GRANULE;
    *place = (struct arena_place){
        .data = segment->base + offset,
        .offset = offset,
        .bytes = (uint64_t)count * ARENA_GRANULE,
        .number = segment->number,
        .index = index,
        .generation = extent->generation,
    };
    return 0;
}

int arena_share(struct arena *arena, uint32_t index)
{
    struct arena_extent *extent = at(arena, index);

    if (extent->uses == UINT32_MAX)
        return -EOVERFLOW;
    extent->uses++;
    return 0;
}

void arena_drop(struct arena *arena, uint32_t index, uint64_t now_ns)
{
    struct arena_extent *extent = at(arena, index);
    struct arena_segment *segment = &arena->segments[extent->segment];

    if (--extent->uses != 0)
        return;
    segment->used -= extent->count;
    if (segment->used == 0)
        segment->idle_ns = now_ns;
    arena->used_bytes -= (uint64_t)extent->count * ARENA_GRANULE;
    arena->blocks--;
    if (is_free(arena, extent->after)) {
        list_remove(arena, extent->after);
        join(arena, index, extent->after);
    }
    if (is_free(arena, extent->before)) {
        uint32_t before = extent->before;
        list_remove(arena, before);
        join(arena, before, index);
        index = before;
    }
    list_push(arena, index);
}

void arena_lend(struct arena *arena, uint32_t index, uint64_t now_ns)
{
    struct arena_extent *extent = at(arena, index);

    if (extent->lent++ != 0)
        return;
    extent->lent_ns = now_ns;
    arena->lent_bytes += (uint64_t)extent->count * ARENA_GRANULE;
    arena->lent_blocks++;
}

static void unlend(struct arena *arena, uint32_t index)
{
    struct arena_extent *extent = at(arena, index);

    if (--extent->lent != 0)
        return;
    arena->lent_bytes -= (uint64_t)extent->count * ARENA_GRANULE;
    arena->lent_blocks--;
}

/* Whether the peer has it. */
static bool has_block(const struct arena *arena, uint32_t index, uint32_t generation)
{
    if (index >= arena->extent_count)
        return false;
    const struct arena_extent *extent = at(arena, index);
    return extent->count != 0 && extent->lent != 0 && extent->generation == generation;
}

int arena_return(struct arena *arena, uint32_t index, uint32_t generation, uint64_t now_ns)
{
    if (!has_block(arena, index, generation))
        return -EPROTO;
    unlend(arena, index);
    arena_drop(arena, index, now_ns);
    return 0;
}

int arena_reclaim(struct arena *arena, const struct block_entry *entry, uint8_t **data,
                  bool *loaned)
{
    if (!has_block(arena, entry->index, entry->generation))
        return -EPROTO;
    struct arena_extent *extent = at(arena, entry->index);
    const struct arena_segment *segment = &arena->segments[extent->segment];
    uint64_t start = (uint64_t)extent->start * ARENA_GRANULE;
    uint64_t bytes = (uint64_t)extent->count * ARENA_GRANULE;
    if (segment->number != entry->segment || entry->offset < start ||
        entry->offset - start > bytes || entry->bytes > bytes - (entry->offset - start))
        return -EPROTO;
    *data = segment->base + entry->offset;
    *loaned = extent->loaned;
    return arena_share(arena, entry->index);
}

uint64_t arena_oldest_ns(const struct arena *arena)
{
    uint64_t oldest = 0;

    for (uint32_t i = 0; i < arena->extent_count; i++) {
        const struct arena_extent *extent = at(arena, i);
        if (extent->count != 0 && extent->lent != 0 &&
            (oldest == 0 || extent->lent_ns < oldest))
            oldest = extent->lent_ns;
    }
    return oldest;
}
