"""Hands to pytest-benchmark what was measured in other processes.

It times what a test does here, but contenders have to be measured in turns and each in processes of
its own. So the test moves a clock of its own by each run's figure, and pytest-benchmark reads that
clock: its table, comparison and JSON file then work on the runs as if they were its own rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.targets import judge
from shmrpc.bench.results import extra_info

if TYPE_CHECKING:
    from shmrpc.bench.figures import Comparison


class ReplayClock:
    """A timer that stands still between calls of `advance`."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        """Read the clock, in seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        self._now_s += seconds


CLOCK = ReplayClock()

Record = Callable[["Comparison", str, str], None]
"""What the fixture `record` gives: to be called with a comparison, a contender and a metric."""

_SECONDS: dict[str, Callable[[float], float]] = {
    "p50_us": lambda p50_us: p50_us / 1e6,
    "calls_per_s": lambda calls_per_s: 1 / calls_per_s,
    "items_per_s": lambda items_per_s: 1 / items_per_s,
    "cpu_ms": lambda cpu_ms: cpu_ms / 1e3,
}


def replay(benchmark: Any, comparison: Comparison, contender: str, metric: str) -> None:
    """Give one contender's runs to the `benchmark` fixture, and all figures as its extra_info."""
    seconds = iter([_SECONDS[metric](value) for value in comparison.values(contender, metric)])
    benchmark.group = f"{comparison.topic}: {comparison.case}, {metric} as time"
    benchmark.extra_info.update(
        **extra_info(comparison, contender),
        targets=[
            {
                "ratio": verdict.target.text,
                "wanted": f"{verdict.target.bound} {verdict.target.limit:g}",
                "measured": verdict.measured,
                "runs": verdict.runs,
                "met": verdict.met,
            }
            for verdict in judge(comparison)
            if verdict.target.subject == contender
        ],
    )
    rounds = len(comparison.runs[contender])
    benchmark.pedantic(lambda: CLOCK.advance(next(seconds)), rounds=rounds)
