"""The numbers of a comparison: one set of figures per contender and run, medians and ratios.

Ratios are taken run by run, between neighbours in time, and only then is their median taken: what
the machine did meanwhile then hits both sides of the fraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Figures = dict[str, float]
"""By metric: calls_per_s, p50_us, p99_us, p999_us, client_cpu_us, server_cpu_us, cpu_us (both
together), wakeups and system_calls per call; or cpu_ms; or items_per_s, client_item_us,
server_item_us. nan is what could not be measured."""

__all__ = [
    "Comparison",
    "Figures",
    "Laps",
    "Movement",
    "Order",
    "Window",
    "as_json",
    "combine",
    "known",
]


@dataclass(frozen=True)
class Order:
    """What the harness asks a client to do; `peers.py` gets it as JSON.

    `rate` is in calls/s, 0 for as fast as replies come. `server_pid` is None for all clients of a
    server but one: its CPU time must not be counted twice.
    """

    size: int
    depth: int
    threads: int
    rate: float
    start_ns: int
    stop_ns: int
    server_pid: int | None
    system_calls: bool


@dataclass(frozen=True)
class Laps:
    """The calls of one thread: what each took, in ns, and the time that it had for them.

    `calls` are those of the window, `warm_up_calls` those before; `waiting_cpu_ns` went into
    waiting for the instants at which calls were due, and is nobody's cost.
    """

    samples: Sequence[int]
    calls: int
    warm_up_calls: int
    elapsed_ns: int
    waiting_cpu_ns: int = 0


@dataclass(frozen=True)
class Window:
    """What one client process saw between two instants."""

    calls: int
    made: int  # with those of the warm-up: what the server must have answered
    calls_per_s: float
    p50_ns: int
    p99_ns: int
    p999_ns: int
    client_cpu_ns: int
    server_cpu_ns: int
    wakeups: int
    system_calls: float


@dataclass(frozen=True)
class Movement:
    """What one client process saw of items that went one way."""

    items: int
    elapsed_ns: int
    client_cpu_ns: int
    server_cpu_ns: int

    def figures(self) -> Figures:
        """Give the rate, and the CPU time that an item takes on each side."""
        return {
            "items_per_s": self.items / self.elapsed_ns * 1e9,
            "client_item_us": self.client_cpu_ns / self.items / 1e3,
            "server_item_us": self.server_cpu_ns / self.items / 1e3,
        }


@dataclass
class Comparison:
    """All that was measured of one case of a topic.

    Who can't take part here is in `absent`, who crashed, hung or lied in `failed`, with the reason.
    `facts` are the case in numbers, for drawing it: size, depth, rate.
    """

    topic: str
    case: str
    runs: dict[str, list[Figures]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def values(self, contender: str, metric: str) -> list[float]:
        """Give one metric of a contender, run by run."""
        return [figures[metric] for figures in self.runs.get(contender, ())]

    def medians(self, contender: str) -> Figures:
        """Give the median over the runs of each metric."""
        runs = self.runs[contender]
        return {metric: median(figures[metric] for figures in runs) for metric in runs[0]}

    def ratios(self, numerator: str, denominator: str, metric: str) -> list[float]:
        """Divide two contenders run by run; empty if one of them is missing."""
        pairs = zip(self.values(numerator, metric), self.values(denominator, metric), strict=False)
        return [above / below for above, below in pairs if below and math.isfinite(above / below)]


def combine(windows: Sequence[Window]) -> Figures:
    """Sum up clients that ran at the same time: total rate, middle p50, the worst client's tail."""
    calls = sum(window.calls for window in windows)
    client_us = sum(window.client_cpu_ns for window in windows) / calls / 1e3
    server_us = sum(window.server_cpu_ns for window in windows) / calls / 1e3
    return {
        "calls_per_s": sum(window.calls_per_s for window in windows),
        "p50_us": median(window.p50_ns for window in windows) / 1e3,
        "p99_us": max(window.p99_ns for window in windows) / 1e3,
        "p999_us": max(window.p999_ns for window in windows) / 1e3,
        "client_cpu_us": client_us,
        "server_cpu_us": server_us,
        "cpu_us": client_us + server_us,
        "wakeups": sum(window.wakeups for window in windows) / calls,
        "system_calls": sum(window.system_calls for window in windows) / calls,
    }


def as_json(comparison: Comparison) -> Mapping[str, object]:
    """Give what was measured in a form that `json` can write: what is unknown becomes null."""
    return {
        "topic": comparison.topic,
        "case": comparison.case,
        "facts": comparison.facts,
        "medians": {name: known(comparison.medians(name)) for name in comparison.runs},
        "runs": {name: [known(run) for run in runs] for name, runs in comparison.runs.items()},
        "absent": comparison.absent,
        "failed": comparison.failed,
    }


def known(figures: Figures) -> dict[str, float | None]:
    """Replace nan, which JSON has no word for."""
    return {metric: None if math.isnan(value) else value for metric, value in figures.items()}
