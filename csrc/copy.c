/* copy.c - see copy.h. */
#include "copy.h"

#include <string.h>

#include "wake.h"

#if defined(__SSE2__)

#include <emmintrin.h>

enum { LINE = 64 };

/* What was streamed to us lies in memory, and the processor asks for it too late by itself: it does not
 * look beyond a page. Copying 1 M of it takes 42 us with so many bytes asked for ahead, else 50 to 59;
 * a source that is in the cache takes as long as before. */
enum { AHEAD = 4096 };

/* Whole lines, of which `to` is the beginning of the first: written in part, each would have to be
 * read from memory first. */
static void stream_lines(uint8_t *to, const uint8_t *from, uint64_t lines)
{
    for (; lines != 0; lines--, to += LINE, from += LINE) {
        const __m128i *source = (const __m128i *)(const void *)from;
        __m128i *target = (__m128i *)(void *)to;
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
}

static void stream(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    uint64_t before = -(uintptr_t)to % LINE;
    uint64_t streamed = (bytes - before) / LINE * LINE;

    memcpy(to, from, before);
    stream_lines(to + before, from + before, streamed / LINE);
    streamed_fence();
    memcpy(to + before + streamed, from + before + streamed, bytes - before - streamed);
}

static uint64_t ns_a_piece(uint64_t begin_ns, uint64_t bytes)
{
    return (clock_now_ns() - begin_ns) * COPY_PIECE / bytes;
}

/* Streaming stores always take about as long: the shortest time of late is what they take, longer
 * ones are those of a thread that had to wait for its CPU. */
static void stream_measured(struct copier *copier, uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    uint64_t begin = clock_now_ns();
    stream(to, from, bytes);
    uint64_t ns = ns_a_piece(begin, bytes);
    uint64_t before = load_relaxed(&copier->streamed_ns);
    uint64_t allowed = before + before / 16 + 1;
    store_relaxed(&copier->streamed_ns, before == 0 || ns < allowed ? ns : allowed);
}

static void pause_ordinary(struct copier *copier)
{
    uint64_t pause = 2 * load_relaxed(&copier->pause);

    if (pause < COPY_PAUSE_MIN)
        pause = COPY_PAUSE_MIN;
    if (pause > COPY_PAUSE_MAX)
        pause = COPY_PAUSE_MAX;
    store_relaxed(&copier->pause, pause);
    store_relaxed(&copier->left, pause);
    store_relaxed(&copier->slow, 0);
}

/* At most a piece, by ordinary stores. What went well for as long as the last pause makes up for it. */
static void store_measured(struct copier *copier, uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    uint64_t begin = clock_now_ns();
    memcpy(to, from, bytes);
    bool slow = ns_a_piece(begin, bytes) > COPY_SLOW * load_relaxed(&copier->streamed_ns);
    uint64_t pause = load_relaxed(&copier->pause);
    if (slow && load_relaxed(&copier->slow) != 0) {
        pause_ordinary(copier);
        return;
    }
    store_relaxed(&copier->slow, slow);
    if (!slow && pause != 0)
        store_relaxed(&copier->pause, pause > bytes ? pause - bytes : 0);
}

/* Whether ordinary stores may be better now. */
static bool may_store(struct copier *copier, uint64_t bytes)
{
    uint64_t left = load_relaxed(&copier->left);

    if (left != 0)
        store_relaxed(&copier->left, left > bytes ? left - bytes : 0);
    return left == 0 && load_relaxed(&copier->streamed_ns) != 0;
}

void copy_out(struct copier *copier, void *to, const void *from, uint64_t bytes, bool ahead)
{
    uint8_t *target = to;
    const uint8_t *source = from;

    if (ahead && may_store(copier, bytes)) {
        while (bytes != 0 && load_relaxed(&copier->left) == 0) {
            uint64_t piece = bytes < COPY_PIECE ? bytes : COPY_PIECE;
            store_measured(copier, target, source, piece);
            target += piece;
            source += piece;
            bytes -= piece;
        }
    }
    if (bytes >= COPY_STREAM_MIN)
        stream_measured(copier, target, source, bytes);
    else if (bytes != 0)
        memcpy(target, source, bytes);
}

#else

void copy_out(struct copier *copier, void *to, const void *from, uint64_t bytes, bool ahead)
{
    (void)copier;
    (void)ahead;
    memcpy(to, from, bytes);
}

#endif
