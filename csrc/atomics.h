/* atomics.h - the one file that spells memory orders.
 *
 * Words shared with the peer process or with other threads are `_Atomic` and reached only through
 * the functions here. Three strengths are enough:
 *
 *   relaxed    the value alone matters (statistics, hints, re-checks that a fence already orders)
 *   release /  "what I wrote before is visible to whoever sees this word": publishing an index,
 *   acquire    a state; always used in pairs
 *   full_fence orders an earlier store before a later load of another word, which release and
 *              acquire do not: the sleep/wake and the not-full handshakes need it (store buffering)
 *
 * Every use across processes carries a letter; docs/memory-model.md lists what each pairs with.
 */
#ifndef SHMRPC_ATOMICS_H
#define SHMRPC_ATOMICS_H

#include <stdatomic.h>
#include <stdint.h>

typedef _Atomic uint64_t atomic_u64;
typedef _Atomic uint32_t atomic_u32;
typedef void *_Atomic atomic_pointer;

_Static_assert(sizeof(atomic_u64) == 8, "shared words must be plain 64-bit words");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics must be lock-free in both processes");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "32-bit atomics must be lock-free");

static inline uint64_t load_relaxed(const atomic_u64 *word)
{
    return atomic_load_explicit((atomic_u64 *)word, memory_order_relaxed);
}

static inline uint64_t load_acquire(const atomic_u64 *word)
{
    return atomic_load_explicit((atomic_u64 *)word, memory_order_acquire);
}

static inline void store_relaxed(atomic_u64 *word, uint64_t value)
{
    atomic_store_explicit(word, value, memory_order_relaxed);
}

static inline void store_release(atomic_u64 *word, uint64_t value)
{
    atomic_store_explicit(word, value, memory_order_release);
}

/* A statistics counter of which one thread at a time is the writer. */
static inline void count_own(atomic_u64 *word, uint64_t value)
{
    store_relaxed(word, load_relaxed(word) + value);
}

/* A statistics counter that any thread may add to. */
static inline void count_add(atomic_u64 *word, uint64_t value)
{
    if (value != 0)
        atomic_fetch_add_explicit(word, value, memory_order_relaxed);
}

static inline uint64_t exchange(atomic_u64 *word, uint64_t value)
{
    return atomic_exchange_explicit(word, value, memory_order_relaxed);
}

static inline void count_subtract(atomic_u64 *word, uint64_t value)
{
    atomic_fetch_sub_explicit(word, value, memory_order_relaxed);
}

/* References to what the last one to let go frees. */
static inline void reference_take(atomic_u64 *count)
{
    atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
}

static inline int reference_drop(atomic_u64 *count)
{
    return atomic_fetch_sub_explicit(count, 1, memory_order_acq_rel) == 1;
}

static inline uint32_t load_acquire32(const atomic_u32 *word)
{
    return atomic_load_explicit((atomic_u32 *)word, memory_order_acquire);
}

static inline void store_release32(atomic_u32 *word, uint32_t value)
{
    atomic_store_explicit(word, value, memory_order_release);
}

static inline uint32_t exchange32(atomic_u32 *word, uint32_t value)
{
    return atomic_exchange_explicit(word, value, memory_order_acq_rel);
}

static inline void *exchange_pointer(atomic_pointer *word, void *value)
{
    return atomic_exchange_explicit(word, value, memory_order_acq_rel);
}

/* Returns whether *word was `expected` and is now `desired`. */
static inline int compare_exchange32(atomic_u32 *word, uint32_t expected, uint32_t desired)
{
    return atomic_compare_exchange_strong_explicit(word, &expected, desired, memory_order_acq_rel,
                                                   memory_order_acquire);
}

/* Orders every store before it against every load after it, on both sides of a handshake. */
static inline void full_fence(void)
{
    atomic_thread_fence(memory_order_seq_cst);
}

/* Streaming stores (copy.c) are in no order with others, unlike all else that x86 stores: after this
 * they come before every later store, so that publishing an index with release covers them, too. */
static inline void streamed_fence(void)
{
#if defined(__SSE2__)
    __builtin_ia32_sfence();
#endif
}

/* What was copied from memory that the peer writes was copied once: the compiler may not go back to
 * where it came from. No instruction. */
static inline void fetched(const void *copy)
{
    __asm__ __volatile__("" : : "r"(copy) : "memory");
}

/* Tells the CPU that this is a spin loop; never a memory barrier. */
static inline void cpu_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

#endif
