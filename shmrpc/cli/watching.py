"""Looking at the processes that serve an address, again and again: what ls and top show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import shmrpc
from shmrpc.timing import percentile

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Look", "Watcher"]


@dataclass
class Look:
    """One process as it was just now. Rates are those since the look before; None at the first."""

    address: str
    pid: int
    uid: int
    status: str
    uptime_seconds: float
    connections: int
    calls: int
    in_flight: int
    queued: int
    calls_per_second: float | None = None
    p50_seconds: float | None = None
    p99_seconds: float | None = None
    queue_delay_seconds: float | None = None
    sleeps_per_second: float | None = None
    wakeups_per_second: float | None = None
    fullest_ring_percent: int = 0
    arena_bytes: int = 0
    arena_used_bytes: int = 0
    pinned_blocks: int = 0
    pinned_bytes: int = 0
    outbox_bytes: int = 0
    methods: list[dict[str, Any]] = field(default_factory=list)
    slowest: list[dict[str, Any]] = field(default_factory=list)


class Watcher:
    """All processes that serve one address. For one thread at a time."""

    def __init__(
        self, address: str, *, watch: bool, timeout: float = 1.0, allow_uids: Iterable[int] = ()
    ) -> None:
        """``watch`` has the servers time their handlers, as long as this is not closed."""
        self._address = address
        self._watch = watch
        self._options: dict[str, Any] = {"timeout": timeout, "allow_uids": list(allow_uids)}
        self._inspectors: dict[int, shmrpc.Inspector] = {}  # by pid; 0: any
        self._before: dict[int, dict[str, Any]] = {}

    def look(self) -> list[Look]:
        """Ask each process; ``shmrpc.Error`` if none answers."""
        stats = self._ask(0)
        found = {int(stats["pid"]): stats}
        for pid in stats["workers"]:
            if pid not in found:
                try:
                    found[pid] = self._ask(pid)
                except shmrpc.Error:  # it has just ended
                    self._forget(pid)
        for pid in set(self._inspectors) - set(found) - {0}:
            self._forget(pid)
        looks = [self._compare(found[pid], self._before.get(pid)) for pid in sorted(found)]
        self._before = found
        return looks

    def close(self) -> None:
        """Hang up."""
        for pid in list(self._inspectors):
            self._forget(pid)

    def _ask(self, pid: int) -> dict[str, Any]:
        inspector = self._inspectors.get(pid)
        if inspector is None:
            inspector = shmrpc.inspect(self._address, worker=pid, **self._options)
            self._inspectors[pid] = inspector
        return inspector.stats(watch=self._watch)

    def _forget(self, pid: int) -> None:
        inspector = self._inspectors.pop(pid, None)
        if inspector is not None:
            inspector.close()

    def _compare(self, now: dict[str, Any], before: dict[str, Any] | None) -> Look:
        look = Look(
            self._address,
            now["pid"],
            now["uid"],
            now["status"],
            now["uptime"],
            now.get("conns", 0),
            now.get("calls_started", 0),
            now.get("running", 0),
            now.get("queued", 0),
            fullest_ring_percent=now.get("fullest_ring_percent", 0),
            arena_bytes=now.get("arena_bytes", 0),
            arena_used_bytes=now.get("arena_used_bytes", 0),
            pinned_blocks=now.get("pinned_blocks", 0),
            pinned_bytes=now.get("pinned_bytes", 0),
            outbox_bytes=now.get("outbox_bytes", 0),
            slowest=now["slowest"],
        )
        if before is None or now["uptime"] < before["uptime"]:
            look.methods = _methods(now, {"methods": {}}, None)
            return look
        seconds = max(now["time"] - before["time"], 1e-6)

        def rate(name: str) -> float:
            return float((now.get(name, 0) - before.get(name, 0)) / seconds)

        look.calls_per_second = rate("calls_started")
        look.sleeps_per_second = rate("sleeps")
        look.wakeups_per_second = rate("wakeups_sent")
        look.queue_delay_seconds = _queue_delay(now, before)
        look.methods = _methods(now, before, seconds)
        buckets = [
            pair
            for name, method in now["methods"].items()
            for pair in _new_buckets(method, before["methods"].get(name, {}))
        ]
        look.p50_seconds = percentile(buckets, 0.5)
        look.p99_seconds = percentile(buckets, 0.99)
        return look


def _queue_delay(now: dict[str, Any], before: dict[str, Any]) -> float:
    """How long calls waited for a worker: those that have been started, or the one that waits."""
    queued = now.get("calls_queued", 0) - before.get("calls_queued", 0)
    waited = now.get("queued_ns", 0) - before.get("queued_ns", 0)
    return float(max(waited / queued if queued else 0.0, now.get("oldest_queued_ns", 0)) / 1e9)


def _methods(
    now: dict[str, Any], before: dict[str, Any], seconds: float | None
) -> list[dict[str, Any]]:
    """The methods that were called at all, those with the most calls first."""
    shown = []
    for name, method in now["methods"].items():
        if not method["calls"]:
            continue
        earlier = before["methods"].get(name, {})
        buckets = _new_buckets(method, earlier)
        new = method["calls"] - earlier.get("calls", 0)
        shown.append(
            {
                "name": name,
                "calls": method["calls"],
                "calls_per_second": new / seconds if seconds is not None else None,
                "p50_seconds": percentile(buckets, 0.5),
                "p99_seconds": percentile(buckets, 0.99),
            }
        )
    return sorted(shown, key=lambda method: (-(method["calls_per_second"] or 0), -method["calls"]))


def _new_buckets(now: dict[str, Any], before: dict[str, Any]) -> list[tuple[int, int]]:
    """What was counted since; a server that begins anew counts from nothing."""
    earlier = dict(map(tuple, before.get("buckets", [])))
    new = [(bucket, count - earlier.get(bucket, 0)) for bucket, count in now.get("buckets", [])]
    return [pair for pair in new if pair[1] > 0]
