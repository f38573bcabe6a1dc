"""What a server tells of itself: its methods, whether it serves, and what it does just now.

The same answers are given to calls (``shmrpc.describe``, ``shmrpc.health``, ``shmrpc.stats``),
which wait for a worker like any call, and to those who ask the acceptor (inquiries.py), who wait
for none.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import msgpack

from .errors import Error
from .lending import total_stats
from .reflection import describe_method
from .timing import Timings, percentile

if TYPE_CHECKING:
    from collections.abc import Callable

    from .poller import Poller, Running
    from .registry import Registry

__all__ = ["Inspection"]

_SLOWEST = 10


class Inspection:
    """Answers for one server. Safe to use from any thread."""

    def __init__(self, registry: Registry) -> None:
        """Offer the answers as methods of this registry, too."""
        self._registry = registry
        self._timings = Timings(registry)
        self._started = 0.0
        self._status = "stopped"
        self._addresses: list[str] = []
        self._poller: Poller | None = None
        self._workers: Callable[[], list[int]] = list
        self._running: Callable[[], list[Running]] = self._running_in_workers
        self._seen: dict[tuple[int, int], float] = {}  # calls whose start is not known
        # An event loop calls them itself: they take microseconds.
        registry.add(self.describe, "shmrpc.describe", idempotent=True, inline=True)
        registry.add(self.health, "shmrpc.health", idempotent=True, inline=True)
        registry.add(self.stats, "shmrpc.stats", idempotent=True, inline=True)

    # ---- the server's life ----

    def started(
        self,
        poller: Poller,
        addresses: list[str],
        workers: Callable[[], list[int]],
        running: Callable[[], list[Running]] | None = None,
    ) -> None:
        """It serves.

        ``workers`` tells the pids of all that serve these addresses, ``running`` the calls under
        way; by default those that run in workers do.
        """
        self._poller, self._addresses, self._workers = poller, addresses, workers
        self._started = time.monotonic()
        self._status = "serving"
        if running is not None:
            self._running = running

    def draining(self) -> None:
        """It refuses calls, and lets those under way end."""
        self._status = "draining"

    def stopped(self) -> None:
        """It is over."""
        self._status = "stopped"
        self._poller = None

    # ---- what it tells ----

    def describe(self, name: str | None = None) -> Any:
        """One method as a map, None if there is none of this name; without a name a list of all.

        The keys are name, kind ("unary", "server_streaming", "client_streaming" or
        "bidirectional"), signature, doc, requests (whether its first parameter iterates over the
        caller's messages), streams and idempotent.
        """
        if name is not None:
            method = self._registry.find(name)
            return describe_method(method) if method is not None else None
        numbers = self._registry.names()
        return [describe_method(self._registry.methods[numbers[name]]) for name in sorted(numbers)]

    def health(self) -> dict[str, str]:
        """{"status": "serving"}, or "draining" when it stops: then it takes no more calls."""
        return {"status": self._status}

    def stats(self) -> dict[str, Any]:
        """Who it is, the counters of ``Server.stats``, methods and the calls that run longest.

        Times are in seconds but for those whose name says otherwise.
        """
        return self._stats()

    def _stats(self) -> dict[str, Any]:
        poller = self._poller
        now = time.monotonic()
        running = self._running()
        shown: dict[str, Any] = {
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "status": self._status,
            "addresses": self._addresses,
            "time": now,
            "workers": self._workers(),
            "uptime": now - self._started if poller is not None else 0.0,
            **(poller.stats() if poller is not None else {}),
            **total_stats(list(poller.connections.values()) if poller is not None else []),
            "methods": self._methods(poller),
            "slowest": self._slowest(running, now),
        }
        shown["running"] = max(shown.get("running", 0), len(running))
        return shown

    def _methods(self, poller: Poller | None) -> dict[str, Any]:
        numbers = self._registry.names()
        counts = poller.method_counts(len(self._registry.methods)) if poller is not None else []
        found: dict[str, Any] = {}
        for name, number in numbers.items():
            known: dict[str, Any] = {"calls": counts[number] if number < len(counts) else 0}
            buckets = self._timings.buckets(name)
            if buckets is not None and not name.startswith("shmrpc."):
                known["p50"], known["p99"] = (percentile(buckets, q) for q in (0.5, 0.99))
                known["buckets"] = buckets
            found[name] = known
        return found

    def _slowest(self, running: list[Running], now: float) -> list[dict[str, Any]]:
        # Where nobody has noted when a call began, it is when it was seen first.
        seen = self._seen
        self._seen = {call.key: seen.get(call.key, now) for call in running if call.since is None}

        def since(call: Running) -> float:
            return call.since if call.since is not None else self._seen[call.key]

        calls = [call for call in running if not call.method.startswith("shmrpc.")]
        return [
            {
                "method": call.method,
                "seconds": max(0.0, now - since(call)),
                "peer_pid": call.peer_pid,
            }
            for call in sorted(calls, key=since)[:_SLOWEST]
        ]

    def _running_in_workers(self) -> list[Running]:
        poller = self._poller
        names = [method.name for method in list(self._registry.methods)]
        return poller.running(names) if poller is not None else []

    # ---- for those who ask the acceptor ----

    def answer(self, request: bytes, watcher: object) -> bytes:
        """Answer ``[name, argument...]``; ``Error`` if that is nothing to ask.

        ``["shmrpc.stats", True]`` has the time of handlers measured as long as ``watcher`` asks.
        """
        try:
            words = msgpack.unpackb(request)
        except (ValueError, TypeError):
            words = None
        if not isinstance(words, list) or not words:
            msg = "a request is a list of a name and its arguments, in msgpack"
            raise Error(msg)
        name, *args = words
        result: Any
        if name == "shmrpc.stats" and args in ([], [False], [True]):
            if args == [True]:
                self._timings.watch(watcher)
            result = self._stats()
        elif name == "shmrpc.health" and not args:
            result = self.health()
        elif name == "shmrpc.describe" and (
            not args or (len(args) == 1 and isinstance(args[0], str))
        ):
            result = self.describe(*args)
        else:
            msg = f"can't be asked for {request[:80]!r}"
            raise Error(msg)
        packed: bytes = msgpack.packb(result)
        return packed

    def leave(self, watcher: object) -> None:
        """It asks no more."""
        self._timings.leave(watcher)
