/* gil.h - when the Python module lets go of the interpreter's lock (GIL). Not part of the C library:
 * cffi_build.py puts it before the functions that cffi generates.
 *
 * cffi lets go of the GIL around every call, as it should where nobody else wants it. But where
 * another thread computes, who lets go gets the GIL back after a switch interval (5 ms), however
 * soon its reply came: 2,400 calls/s. So a thread that had to wait for the GIL for so long may
 * keep it for as long in turn, through calls that are answered while they spin; it lets go before
 * it sleeps, and when that time is over. The other thread has half of the time, as if the caller
 * computed as well.
 *
 * And what only puts a message into a ring keeps it: no wait of its own, nothing that somebody
 * who has one of our mutexes needs the GIL for, and letting go costs as much as sending.
 */
#include <string.h>
#include <time.h>

#include "shmrpc.h"

#ifdef Py_BEGIN_ALLOW_THREADS

/* Two looks at this clock are no more than 10 ns, and its ticks, 1 to 10 ms, as long as the waits
 * that matter. */
#define GIL_COARSE CLOCK_MONOTONIC_COARSE

struct gil {
    PyThreadState *released; /* null: this thread has it */
    uint64_t keep_until_ns;  /* 0: it is not kept */
};
static _Thread_local struct gil gil;

static uint64_t gil_clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int gil_held(void)
{
    return gil.released == NULL;
}

static void gil_release(void)
{
    if (gil.released == NULL)
        gil.released = PyEval_SaveThread();
}

/* For the compiler to decide, which knows the name of each function that cffi wrote. */
static inline int gil_stays(const char *function)
{
    return strcmp(function, "_cffi_f_shmrpc_send_request") == 0 ||
           strcmp(function, "_cffi_f_shmrpc_send_reply") == 0;
}

static void gil_enter(void)
{
    if (gil.keep_until_ns != 0 && gil_clock_ns(GIL_COARSE) < gil.keep_until_ns)
        return;
    gil.keep_until_ns = 0;
    gil.released = PyEval_SaveThread();
}

static void gil_leave(void)
{
    PyThreadState *released = gil.released;

    if (released == NULL)
        return;
    gil.released = NULL;
    uint64_t before_ns = gil_clock_ns(GIL_COARSE);
    PyEval_RestoreThread(released);
    uint64_t waited_ns = gil_clock_ns(GIL_COARSE) - before_ns;
    gil.keep_until_ns = waited_ns != 0 ? gil_clock_ns(CLOCK_MONOTONIC) + waited_ns : 0;
}

__attribute__((constructor)) static void gil_init(void)
{
    shmrpc_use_lock(gil_held, gil_release);
}

#undef Py_BEGIN_ALLOW_THREADS
#undef Py_END_ALLOW_THREADS
#define Py_BEGIN_ALLOW_THREADS { if (!gil_stays(__func__)) gil_enter();
#define Py_END_ALLOW_THREADS gil_leave(); }

#endif
