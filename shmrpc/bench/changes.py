"""Two results files compared: what got slower, and what is only noise.

Machines are not the same a day later, so a contender's figure is first divided by the bare Unix
socket's of the same case, run by run; only that one's own are compared as they are. The noise is
how far the runs were apart, in the old and the new file together, the less the more runs there are,
and never less than 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .figures import Comparison

__all__ = ["Change", "changes"]

REFERENCE = "raw-uds"
_NOISE_MIN = 0.05
_NOISE_OF_FEW_RUNS = 0.25
_RUNS_ENOUGH = 3
_RANGE_SHARE = 4.0
"""Of the runs' range, divided by their number, that is noise. The range of three runs often is much
smaller than that of ten; with this, one figure in a hundred at most moves by chance, with 3 to 10
normally distributed runs on each side, and one that doubles is found (tests/test_bench.py)."""
_HIGHER_IS_BETTER = {"calls_per_s", "items_per_s", "bytes_per_s"}
_COMPARED = ("calls_per_s", "items_per_s", "bytes_per_s", "cpu_us", "cpu_ms")
_COMPARED_PACED = ("p50_us", "p99_us", "cpu_us")
_CPU_MS_MIN = 1.0
"""Less than a millisecond in some seconds of silence is none."""


@dataclass(frozen=True)
class Change:
    """One metric of one contender, before and now; relative to the bare socket if `relative`."""

    topic: str
    case: str
    contender: str
    metric: str
    old: float
    new: float
    relative: bool
    noise: float

    @property
    def cost(self) -> float:
        """How many times as expensive it is now: above 1 is worse, whatever the metric."""
        return self.old / self.new if self.metric in _HIGHER_IS_BETTER else self.new / self.old

    @property
    def verdict(self) -> str:
        """Say "slower", "faster" or "same", which is within the noise."""
        if self.cost > 1 + self.noise:
            return "slower"
        return "faster" if self.cost < 1 / (1 + self.noise) else "same"


def _values(comparison: Comparison, contender: str, metric: str, *, relative: bool) -> list[float]:
    if relative:
        return comparison.ratios(contender, REFERENCE, metric)
    return [value for value in comparison.values(contender, metric) if value > 0]


def _noise(*files: Sequence[float]) -> float:
    if min(map(len, files)) < _RUNS_ENOUGH:
        return _NOISE_OF_FEW_RUNS
    return max(
        _NOISE_MIN,
        sum(
            (max(values) - min(values)) * _RANGE_SHARE / len(values) / median(values)
            for values in files
        ),
    )


def _change(old: Comparison, new: Comparison, contender: str, metric: str) -> Change | None:
    has_reference = all(
        metric in run for file in (old, new) for run in file.runs.get(REFERENCE, ({},))
    )
    relative = contender != REFERENCE and metric != "cpu_ms" and has_reference
    before = _values(old, contender, metric, relative=relative)
    now = _values(new, contender, metric, relative=relative)
    if not before or not now:
        return None
    if metric == "cpu_ms" and max(*before, *now) < _CPU_MS_MIN:
        return None
    return Change(
        new.topic,
        new.case,
        contender,
        metric,
        median(before),
        median(now),
        relative,
        _noise(before, now),
    )


def changes(old: Iterable[Comparison], new: Iterable[Comparison]) -> list[Change]:
    """Compare every case and contender that is in both."""
    known = {(comparison.topic, comparison.case): comparison for comparison in old}
    found = []
    for comparison in new:
        before = known.get((comparison.topic, comparison.case))
        if before is None:
            continue
        metrics = _COMPARED_PACED if comparison.facts.get("rate") else _COMPARED
        for contender, runs in comparison.runs.items():
            shared = before.runs.get(contender)
            for metric in metrics:
                if shared and metric in runs[0] and metric in shared[0]:
                    change = _change(before, comparison, contender, metric)
                    if change is not None:
                        found.append(change)
    return found
