"""One window of calls in the client's process: latency of each call, rate, CPU time of both sides.

Windows are given as two instants of CLOCK_MONOTONIC, which is one clock for all processes, so that
several clients measure the same stretch of time. Calls before its start are the warm-up.
"""

from __future__ import annotations

import os
import time
from array import array
from dataclasses import dataclass
from math import ceil
from threading import Lock, Thread
from typing import TYPE_CHECKING

from benchmarks.figures import Movement, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Echo = Callable[[bytes], bytes]
    Flow = Callable[[int], int]
    """Moves items until an instant; returns how many, when all of them have arrived."""

PAYLOAD = bytes(range(64))
"""The work item: a bytes value of 64 bytes."""

_CALLS_PER_S_MAX = 500_000
"""How many samples each thread has room for; a client in Python stays below."""

_CPUCLOCK_SCHED = 2

now_ns = time.perf_counter_ns


class WrongReplyError(Exception):
    """A contender answered, but not with what it had been sent."""


def cpu_ns(pid: int) -> int:
    """Read the CPU time that a process has used, all its threads, also those that have ended.

    This is clock_getcpuclockid(3): nanoseconds, where /proc/PID/stat has ticks of 10 ms and
    /proc/PID/schedstat only the first thread.
    """
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


@dataclass(frozen=True)
class _Laps:
    """The calls of one thread: the latency of each, and the time that it had for them."""

    samples: Sequence[int]
    elapsed_ns: int


def _warm_up(echo: Echo, start_ns: int) -> None:
    while now_ns() < start_ns:
        if echo(PAYLOAD) != PAYLOAD:
            raise WrongReplyError


def _laps(echo: Echo, start_ns: int, stop_ns: int, samples: array[int]) -> _Laps:
    """Call until `stop_ns`; the end of one call is the begin of the next: one clock read a call.

    The time counts from `start_ns` even where this thread got no turn until later.
    """
    payload = PAYLOAD
    clock = now_ns
    reply = payload
    count = len(samples)
    then = clock()
    for i in range(count):
        reply = echo(payload)
        now = clock()
        samples[i] = now - then
        then = now
        if now >= stop_ns:
            count = i + 1
            break
    if reply != payload:
        raise WrongReplyError
    return _Laps(samples[:count], then - start_ns)


def _sleep_until(instant_ns: int) -> None:
    time.sleep(max(0, instant_ns - now_ns()) / 1e9)


def _percentile(samples: Sequence[int], share: float) -> int:
    return samples[ceil(share * len(samples)) - 1]


def _locked(echo: Echo) -> Echo:
    lock = Lock()

    def call(payload: bytes) -> bytes:
        with lock:
            return echo(payload)

    return call


def measure(
    echo: Echo,
    *,
    thread_safe: bool,
    threads: int,
    start_ns: int,
    stop_ns: int,
    server_pid: int,
) -> Window:
    """Call `echo` from `threads` threads at once and sum up the window."""
    pids = os.getpid(), server_pid
    room = (stop_ns - start_ns) * _CALLS_PER_S_MAX // 10**9 + 1
    buffers = [array("q", bytes(8 * room)) for _ in range(threads)]
    laps: list[_Laps] = []
    errors: list[Exception] = []

    def work(echo: Echo, samples: array[int]) -> None:
        try:
            _warm_up(echo, start_ns)
            laps.append(_laps(echo, start_ns, stop_ns, samples))
        except Exception as error:
            errors.append(error)

    if threads == 1:
        _warm_up(echo, start_ns)
        before = [cpu_ns(pid) for pid in pids]
        laps.append(_laps(echo, start_ns, stop_ns, buffers[0]))
    else:
        shared = echo if thread_safe else _locked(echo)
        workers = [Thread(target=work, args=(shared, buffer), daemon=True) for buffer in buffers]
        for worker in workers:
            worker.start()
        _sleep_until(start_ns)
        before = [cpu_ns(pid) for pid in pids]
        for worker in workers:
            worker.join()
    after = [cpu_ns(pid) for pid in pids]
    if errors:
        raise errors[0]
    samples = sorted(sample for lap in laps for sample in lap.samples)
    return Window(
        calls=len(samples),
        calls_per_s=sum(len(lap.samples) / lap.elapsed_ns * 1e9 for lap in laps),
        p50_ns=_percentile(samples, 0.5),
        p99_ns=_percentile(samples, 0.99),
        p999_ns=_percentile(samples, 0.999),
        client_cpu_ns=after[0] - before[0],
        server_cpu_ns=after[1] - before[1],
    )


def measure_flow(flow: Flow, *, start_ns: int, stop_ns: int, server_pid: int) -> Movement:
    """Warm up by one flow, and sum up another one."""
    pids = os.getpid(), server_pid
    flow(start_ns)
    before = [cpu_ns(pid) for pid in pids]
    begin = now_ns()
    items = flow(stop_ns)
    elapsed_ns = now_ns() - begin
    after = [cpu_ns(pid) for pid in pids]
    return Movement(items, elapsed_ns, after[0] - before[0], after[1] - before[1])
