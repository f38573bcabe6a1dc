"""The numbers of a comparison: one set of figures per contender and run, medians and ratios.

Ratios are taken run by run, between neighbours in time, and only then is their median taken: what
the machine did meanwhile then hits both sides of the fraction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Figures = dict[str, float]
"""By metric: calls_per_s, p50_us, p99_us, p999_us, client_cpu_us, server_cpu_us; or cpu_ms; or
items_per_s, client_item_us, server_item_us."""


@dataclass(frozen=True)
class Window:
    """What one client process saw between two instants."""

    calls: int
    calls_per_s: float
    p50_ns: int
    p99_ns: int
    p999_ns: int
    client_cpu_ns: int
    server_cpu_ns: int


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
    """All that was measured of one case of a topic; who could not be measured is in `absent`."""

    topic: str
    case: str
    runs: dict[str, list[Figures]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

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
        return [above / below for above, below in pairs if below]


def combine(windows: Sequence[Window]) -> Figures:
    """Sum up clients that ran at the same time: total rate, middle p50, the worst client's tail."""
    calls = sum(window.calls for window in windows)
    return {
        "calls_per_s": sum(window.calls_per_s for window in windows),
        "p50_us": median(window.p50_ns for window in windows) / 1e3,
        "p99_us": max(window.p99_ns for window in windows) / 1e3,
        "p999_us": max(window.p999_ns for window in windows) / 1e3,
        "client_cpu_us": sum(window.client_cpu_ns for window in windows) / calls / 1e3,
        "server_cpu_us": sum(window.server_cpu_ns for window in windows) / calls / 1e3,
    }


def as_json(comparison: Comparison) -> Mapping[str, object]:
    """Give what was measured in a form that `json` can write."""
    return {
        "topic": comparison.topic,
        "case": comparison.case,
        "medians": {name: comparison.medians(name) for name in comparison.runs},
        "runs": comparison.runs,
        "absent": comparison.absent,
        "failed": comparison.failed,
    }
