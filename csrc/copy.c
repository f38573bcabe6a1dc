/* copy.c - see copy.h. */
#include "copy.h"

#include <string.h>

#include "atomics.h"

#if defined(__SSE2__)

#include <emmintrin.h>

enum { LINE = 64 };

/* Whole lines, of which `to` is the beginning of the first: written in part, each would have to be
 * read from memory first. */
static void stream_lines(uint8_t *to, const uint8_t *from, uint64_t lines)
{
    for (; lines != 0; lines--, to += LINE, from += LINE) {
        const __m128i *source = (const __m128i *)(const void *)from;
        __m128i *target = (__m128i *)(void *)to;
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
}

void copy_out(void *to, const void *from, uint64_t bytes)
{
    uint8_t *target = to;
    const uint8_t *source = from;

    if (bytes >= COPY_STREAM_MIN) {
        uint64_t before = -(uintptr_t)target % LINE;
        uint64_t streamed = (bytes - before) / LINE * LINE;
        memcpy(target, source, before);
        stream_lines(target + before, source + before, streamed / LINE);
        streamed_fence();
        target += before + streamed;
        source += before + streamed;
        bytes -= before + streamed;
    }
    memcpy(target, source, bytes);
}

#else

void copy_out(void *to, const void *from, uint64_t bytes)
{
    memcpy(to, from, bytes);
}

#endif
