"""How long handlers take, measured only while somebody looks.

A server that nobody watches has nothing of this on the way of its calls: ``Timings`` puts itself
around the functions of a registry when the first watcher comes, and goes with the last.
"""

from __future__ import annotations

import functools
import math
import threading
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from types import CodeType

    from .registry import Method, Registry

__all__ = ["TRANSPARENT", "Histogram", "Timings", "percentile"]

_STEPS_BITS = 3  # eight buckets to each power of two: a value is known to an eighth
_STEPS = 1 << _STEPS_BITS

# What runs around a handler without being part of it: tracebacks leave it out.
TRANSPARENT: set[CodeType] = set()


def _bucket_of(nanoseconds: int) -> int:
    shift = max(0, nanoseconds.bit_length() - _STEPS_BITS - 1)
    return (shift << _STEPS_BITS) + (nanoseconds >> shift)


def _seconds_of(bucket: int) -> float:
    """The middle of a bucket."""
    if bucket < 2 * _STEPS:
        return bucket / 1e9
    shift = (bucket >> _STEPS_BITS) - 1
    return (bucket - (shift << _STEPS_BITS) + 0.5) * 2.0**shift / 1e9


def percentile(buckets: Iterable[tuple[int, int]], fraction: float) -> float | None:
    """The seconds that this fraction of what was counted took at most; None of nothing.

    ``buckets`` are pairs of a bucket and its count, as ``Histogram.buckets`` has them.
    """
    ordered = sorted(buckets)
    rank = math.ceil(fraction * sum(count for _, count in ordered))
    for bucket, count in ordered:
        rank -= count
        if rank <= 0 and count:
            return _seconds_of(bucket)
    return None


class Histogram:
    """How often something took how long. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}

    def add(self, nanoseconds: int) -> None:
        """Count one."""
        bucket = _bucket_of(nanoseconds)
        with self._lock:
            self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def buckets(self) -> list[tuple[int, int]]:
        """Pairs of a bucket and its count."""
        with self._lock:
            return sorted(self._counts.items())


class Timings:
    """Times the handlers of a registry while it has watchers. Safe to use from any thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._watchers: set[object] = set()
        self._histograms: dict[str, Histogram] = {}

    def watch(self, watcher: object) -> None:
        """Begin, if nobody watched; once for each watcher."""
        with self._lock:
            if not self._watchers:
                self._histograms = {}
                self._registry.surround(self._around)
            self._watchers.add(watcher)

    def leave(self, watcher: object) -> None:
        """End, if nobody else watches. Calls under way are not counted any more."""
        with self._lock:
            if watcher in self._watchers:
                self._watchers.remove(watcher)
                if not self._watchers:
                    self._registry.surround(None)

    def buckets(self, method: str) -> list[tuple[int, int]] | None:
        """What was counted since the first watcher came; None if nobody watches."""
        if not self._watchers:
            return None
        histogram = self._histograms.get(method)
        return histogram.buckets() if histogram is not None else []

    def _around(self, method: Method, function: Callable[..., Any]) -> Callable[..., Any]:
        add = self._histograms.setdefault(method.name, Histogram()).add
        if not method.is_async:
            timed = _timed_generator if method.generator else _timed
        else:
            timed = _timed_async_generator if method.generator else _timed_async
        return functools.wraps(function)(timed(function, add))


def _timed(function: Callable[..., Any], add: Callable[[int], None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            add(perf_counter_ns() - start)

    TRANSPARENT.add(run.__code__)
    return run


def _timed_generator(
    function: Callable[..., Any], add: Callable[[int], None]
) -> Callable[..., Iterator[Any]]:
    def items(made: Any, start: int) -> Iterator[Any]:
        try:
            yield from made
        finally:
            add(perf_counter_ns() - start)

    def run(*args: Any, **kwargs: Any) -> Iterator[Any]:
        start = perf_counter_ns()
        return items(function(*args, **kwargs), start)

    TRANSPARENT.update((items.__code__, run.__code__))
    return run


def _timed_async(function: Callable[..., Any], add: Callable[[int], None]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter_ns()
        try:
            return await function(*args, **kwargs)
        finally:
            add(perf_counter_ns() - start)

    TRANSPARENT.add(run.__code__)
    return run


def _timed_async_generator(
    function: Callable[..., Any], add: Callable[[int], None]
) -> Callable[..., AsyncIterator[Any]]:
    async def items(made: Any, start: int) -> AsyncIterator[Any]:
        try:
            async for item in made:
                yield item
        finally:
            await made.aclose()
            add(perf_counter_ns() - start)

    def run(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        start = perf_counter_ns()
        return items(function(*args, **kwargs), start)

    TRANSPARENT.update((items.__code__, run.__code__))
    return run
