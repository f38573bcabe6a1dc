"""One window of calls in the client's process: what each call took, and what both sides used.

Windows are given as two instants of CLOCK_MONOTONIC, which is one clock for all processes, so that
several clients measure the same stretch of time. Calls before its start are the warm-up.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from dataclasses import replace
from math import ceil
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from .contenders import PipelinedConnection, UnsupportedError
from .figures import Laps, Movement, Window
from .pace import now_ns, paced_laps, pacer
from .usage import Meter
from .work import WrongPayloadError, pattern

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from .contenders import Connection
    from .figures import Order
    from .usage import Usage

    Echo = Callable[[bytes], bytes]
    AsyncEcho = Callable[[bytes], Awaitable[bytes]]
    Flow = Callable[[int], int]
    """Moves items until an instant; returns how many, when all of them have arrived."""

__all__ = ["measure", "measure_async", "measure_flow", "now_ns"]

_CALLS_PER_S_MAX = 500_000
"""How many samples each thread has room for; a client in Python stays below."""
_LONG_BYTES = 1 << 20


def _check(reply: bytes, payload: bytes) -> None:
    if reply != payload:
        raise WrongPayloadError(f"{len(reply)} bytes came back, and not those that were sent")


def _warm_up(echo: Echo, payload: bytes, start_ns: int) -> int:
    count = 0
    while now_ns() < start_ns:
        _check(echo(payload), payload)
        count += 1
    return count


def _laps(echo: Echo, payload: bytes, start_ns: int, stop_ns: int, warm_up_calls: int) -> Laps:
    """Call until `stop_ns`; the end of one call is the begin of the next: one clock read a call.

    The time counts from `start_ns` even where this thread got no turn until later.
    """
    samples = array("q", bytes(8 * (max(0, stop_ns - start_ns) * _CALLS_PER_S_MAX // 10**9 + 1)))
    clock = now_ns
    count = len(samples)
    then = clock()
    for i in range(count):
        reply = echo(payload)
        if reply != payload:
            _check(reply, payload)
        now = clock()
        samples[i] = now - then
        then = now
        if now >= stop_ns:
            count = i + 1
            break
    return Laps(samples[:count], count, warm_up_calls, then - start_ns)


def _pipelined(connection: PipelinedConnection, payload: bytes, depth: int, stop_ns: int) -> Laps:
    """Keep `depth` calls under way, begun and finished in the same order."""
    begin, finish, clock = connection.begin, connection.finish, now_ns
    samples = array("q")
    start_ns = clock()
    under_way: deque[tuple[int, Any]] = deque()
    for _ in range(depth):
        under_way.append((clock(), begin(payload)))
    while under_way:
        then, token = under_way.popleft()
        reply = finish(token)
        if reply != payload:
            _check(reply, payload)
        now = clock()
        samples.append(now - then)
        if now < stop_ns:
            under_way.append((now, begin(payload)))
    return Laps(samples, len(samples), 0, clock() - start_ns)


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


def _window(laps: Sequence[Laps], usage: Usage) -> Window:
    samples = sorted(sample for lap in laps for sample in lap.samples)
    return Window(
        calls=sum(lap.calls for lap in laps),
        made=sum(lap.calls + lap.warm_up_calls for lap in laps),
        calls_per_s=sum(lap.calls / lap.elapsed_ns * 1e9 for lap in laps),
        p50_ns=_percentile(samples, 0.5),
        p99_ns=_percentile(samples, 0.99),
        p999_ns=_percentile(samples, 0.999),
        client_cpu_ns=usage.client_cpu_ns - sum(lap.waiting_cpu_ns for lap in laps),
        server_cpu_ns=usage.server_cpu_ns,
        wakeups=usage.wakeups,
        system_calls=usage.system_calls,
    )


def measure(connection: Connection, order: Order, *, thread_safe: bool) -> Window:
    """Warm up until the window's start, then call as ordered and sum up the window."""
    payload = pattern(order.size)
    meter = Meter(order.server_pid, system_calls=order.system_calls)
    if order.threads > 1:
        echo = connection.echo if thread_safe else _locked(connection.echo)
        return _measure_threads(echo, payload, order, meter)
    if order.depth > 1:
        if not isinstance(connection, PipelinedConnection):
            raise UnsupportedError("one call at a time")
        warm_up = _pipelined(connection, payload, order.depth, order.start_ns)
        meter.begin()
        laps = _pipelined(connection, payload, order.depth, order.stop_ns)
        return _window([replace(laps, warm_up_calls=warm_up.calls)], meter.end())
    warm_up_calls = _warm_up(connection.echo, payload, order.start_ns)
    meter.begin()
    if order.rate:
        interval_ns = 1e9 / order.rate
        laps = paced_laps(
            connection.echo, payload, interval_ns, order.start_ns, order.stop_ns, pacer()
        )
        laps = replace(laps, warm_up_calls=warm_up_calls)
    else:
        # A long call of the warm-up that reached into the window is no lack of CPU time.
        begin_ns = now_ns() if order.size >= _LONG_BYTES else order.start_ns
        laps = _laps(connection.echo, payload, begin_ns, order.stop_ns, warm_up_calls)
    return _window([laps], meter.end())


def _measure_threads(echo: Echo, payload: bytes, order: Order, meter: Meter) -> Window:
    laps: list[Laps] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            warm_up_calls = _warm_up(echo, payload, order.start_ns)
            laps.append(_laps(echo, payload, order.start_ns, order.stop_ns, warm_up_calls))
        except Exception as error:
            errors.append(error)

    workers = [Thread(target=work, daemon=True) for _ in range(order.threads)]
    for worker in workers:
        worker.start()
    _sleep_until(order.start_ns)
    meter.begin()
    for worker in workers:
        worker.join()
    usage = meter.end()
    if errors:
        raise errors[0]
    return _window(laps, usage)


async def measure_async(echoes: Sequence[AsyncEcho], order: Order) -> Window:
    """As `measure`, with `depth` tasks of which each makes one call after the other.

    Each calls on one of the connections that have these.
    """
    if order.rate or order.threads > 1:
        raise UnsupportedError("calls of an event loop are neither paced nor shared by threads")
    payload = pattern(order.size)
    meter = Meter(order.server_pid, system_calls=order.system_calls)
    callers = [echoes[i % len(echoes)] for i in range(order.depth)]
    warm_up = await _tasks(callers, payload, order.start_ns)
    meter.begin()
    laps = await _tasks(callers, payload, order.stop_ns)
    return _window([replace(laps, warm_up_calls=warm_up.calls)], meter.end())


async def _tasks(callers: Sequence[AsyncEcho], payload: bytes, stop_ns: int) -> Laps:
    samples = array("q")
    clock = now_ns

    async def task(echo: AsyncEcho) -> None:
        now = clock()
        while now < stop_ns:
            then = now
            reply = await echo(payload)
            if reply != payload:
                _check(reply, payload)
            now = clock()
            samples.append(now - then)

    start_ns = clock()
    if len(callers) == 1:
        await task(callers[0])
    else:
        await asyncio.gather(*map(task, callers))
    if not samples:  # the warm-up took longer than warm-up and window together
        reply = await callers[0](payload)
        _check(reply, payload)
        samples.append(clock() - start_ns)
    return Laps(samples, len(samples), 0, clock() - start_ns)


def measure_flow(flow: Flow, *, warm_up_ns: int, window_ns: int, server_pid: int) -> Movement:
    """Warm up by one flow, and sum up another one.

    The window begins when the warm-up has ended: on a busy machine that may be late.
    """
    flow(now_ns() + warm_up_ns)
    meter = Meter(server_pid)
    meter.begin()
    begin = now_ns()
    items = flow(begin + window_ns)
    elapsed_ns = now_ns() - begin
    usage = meter.end()
    return Movement(items, elapsed_ns, usage.client_cpu_ns, usage.server_cpu_ns)
