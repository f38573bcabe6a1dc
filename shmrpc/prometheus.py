"""Metrics of calls for Prometheus: ``pip install 'shmrpc[prometheus]'``."""

from __future__ import annotations

import functools
import threading
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:
    msg = "shmrpc.prometheus needs prometheus_client: pip install 'shmrpc[prometheus]'"
    raise ImportError(msg) from error

from .interceptors import status_of, when_done

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .interceptors import CallInfo

__all__ = ["Prometheus"]

_BUCKETS = [*(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5)), 10.0]


class Prometheus:
    """Interceptor for clients and servers that counts and times calls.

    - ``shmrpc_calls_started_total``: calls, by ``side``, ``method`` and ``kind``
    - ``shmrpc_calls_handled_total``: those that have ended, by ``code`` too
    - ``shmrpc_calls_in_flight``: those that have not
    - ``shmrpc_call_seconds``: a histogram of how long they took, from 1 us to 10 s

    There are as many series as there are methods: a server's are registered, calls of others
    never get here; a client's are those that its program names. Let no input choose the method
    that a client calls.

    A stream counts until its end. To see when a future ends, the client reads in the background.

    ``registry`` is the global one by default. Those who share a registry share its metrics.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._metrics = _metrics_of(REGISTRY if registry is None else registry)
        self._series: dict[tuple[str, str, str], _Series] = {}

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        """See ``Interceptor``."""
        ended = self._start(call)
        try:
            result = proceed(call)
        except BaseException as error:
            ended(error)
            raise
        when_done(call, result, ended)
        return result

    async def intercept_async(
        self, call: CallInfo, proceed: Callable[[CallInfo], Awaitable[Any]]
    ) -> Any:
        """See ``AsyncInterceptor``."""
        ended = self._start(call)
        try:
            result = await proceed(call)
        except BaseException as error:
            ended(error)
            raise
        when_done(call, result, ended)
        return result

    def _start(self, call: CallInfo) -> Callable[[BaseException | None], None]:
        labels = (call.side, call.method, call.kind)
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(self._metrics, labels)
        series.started.inc()
        series.in_flight.inc()
        return functools.partial(series.ended, perf_counter())


class _Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("side", "method", "kind")
        self.started = Counter(
            "shmrpc_calls_started", "Calls that were started.", labels, registry=registry
        )
        self.handled = Counter(
            "shmrpc_calls_handled", "Calls that have ended.", (*labels, "code"), registry=registry
        )
        self.in_flight = Gauge(
            "shmrpc_calls_in_flight", "Calls that have not ended yet.", labels, registry=registry
        )
        self.seconds = Histogram(
            "shmrpc_call_seconds",
            "How long calls took.",
            labels,
            registry=registry,
            buckets=_BUCKETS,
        )


class _Series:
    """The metrics of one method: looked up once, which costs more than counting."""

    def __init__(self, metrics: _Metrics, labels: tuple[str, str, str]) -> None:
        self.started = metrics.started.labels(*labels)
        self.in_flight = metrics.in_flight.labels(*labels)
        self._seconds = metrics.seconds.labels(*labels)
        self._all_handled = metrics.handled
        self._labels = labels
        self._handled: dict[str, Counter] = {}

    def ended(self, start: float, error: BaseException | None) -> None:
        self._seconds.observe(perf_counter() - start)
        self.in_flight.dec()
        code = status_of(error)
        handled = self._handled.get(code)
        if handled is None:
            handled = self._handled[code] = self._all_handled.labels(*self._labels, code)
        handled.inc()


_lock = threading.Lock()
_registries: weakref.WeakKeyDictionary[CollectorRegistry, _Metrics] = weakref.WeakKeyDictionary()


def _metrics_of(registry: CollectorRegistry) -> _Metrics:
    """A registry takes a name only once, and a program may have many clients and servers."""
    with _lock:
        metrics = _registries.get(registry)
        if metrics is None:
            metrics = _registries[registry] = _Metrics(registry)
        return metrics
