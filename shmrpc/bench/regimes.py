"""The circumstances under which calls are compared: who runs where, how many, how often."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from .team import Crowd, Load, Placement

__all__ = [
    "FREE",
    "ONE_CPU",
    "RATES",
    "SIZES",
    "TWO_CPUS",
    "Regime",
    "depth_for",
    "placement",
    "regimes",
    "size_name",
]

SIZES = (64, 4 << 10, 64 << 10, 1 << 20, 16 << 20)
DEPTH = 64
_UNDER_WAY_BYTES_MAX = 64 << 20
RATES = (100, 1_000, 10_000, 50_000)
PAIRS = (2, 4, 8)
CLIENTS = (1, 8, 64)
IDLE_CONNECTIONS = 1000

FREE = "free"
TWO_CPUS = "two CPUs"
ONE_CPU = "one CPU"


def depth_for(size: int) -> int:
    """Say how many calls of this size are kept under way: 64, but no more than 64 MiB together."""
    return max(1, min(DEPTH, _UNDER_WAY_BYTES_MAX // size))


def size_name(size: int) -> str:
    """Name a size as people do."""
    for unit, bytes_each in (("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= bytes_each:
            return f"{size // bytes_each} {unit}"
    return f"{size} B"


def placement(place: str) -> Placement:
    """Turn a place into CPUs: the first and the last of those that we may use."""
    cpus = sorted(os.sched_getaffinity(0))
    if place == TWO_CPUS:
        return Placement(client=(cpus[0],), server=(cpus[-1],))
    if place == ONE_CPU:
        return Placement(client=(cpus[0],), server=(cpus[0],))
    return Placement()


def two_cpus() -> Placement:
    """Let everybody use the same two CPUs."""
    cpus = tuple(sorted(os.sched_getaffinity(0))[:2])
    return Placement(cpus, cpus)


@dataclass(frozen=True)
class Regime:
    """One set of circumstances; with `disturbed` a third process keeps a CPU busy."""

    name: str
    placement: Placement = field(default_factory=Placement)
    crowd: Crowd = field(default_factory=Crowd)
    load: Load = field(default_factory=Load)
    disturbed: bool = False
    cpus: int = 2

    @property
    def facts(self) -> dict[str, float]:
        """Give the case in numbers, for drawing."""
        return {
            "size": self.load.size,
            "depth": self.load.depth,
            "rate": self.load.rate,
            "pairs": self.crowd.pairs,
            "clients": self.crowd.clients,
        }


def pairs_regime(count: int) -> Regime:
    """Let so many pairs of processes run at once on two CPUs."""
    return Regime(f"{count} pairs on two CPUs", two_cpus(), Crowd(pairs=count))


def clients_regime(count: int) -> Regime:
    """Let so many client processes share a server, all on two CPUs."""
    name = "1 client" if count == 1 else f"{count} clients"
    return Regime(f"one server, {name}", two_cpus(), Crowd(clients=count))


def paced_regime(rate: int) -> Regime:
    """Let one client call at a steady rate."""
    return Regime(f"{rate:,} calls/s", load=Load(rate=rate))


ONE_PAIR_FREE = Regime("one pair, free", cpus=1)
ONE_PAIR_ONE_CPU = Regime("one pair, one CPU", placement(ONE_CPU), cpus=1)
BUSY = Regime("a third process keeps a CPU busy", disturbed=True)
GIL = Regime("another thread of the client computes", load=Load(gil=True))


def regimes() -> list[Regime]:
    """Give all that this machine has the CPUs for, but the paced ones and idleness."""
    every = [
        ONE_PAIR_FREE,
        Regime("one pair, two CPUs", placement(TWO_CPUS)),
        ONE_PAIR_ONE_CPU,
        *map(pairs_regime, PAIRS),
        *map(clients_regime, CLIENTS),
        BUSY,
        GIL,
    ]
    cpus = len(os.sched_getaffinity(0))
    return [regime for regime in every if regime.cpus <= cpus]
