"""What the figures say to who has to choose: where shared memory wins here, and where not."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .figures import Comparison

__all__ = ["SUBJECT", "advantage", "conclusions"]

SUBJECT = "shm"
_BARELY = 1.05
"""Less of an advantage is none: it is within the noise of most machines."""


def advantage(comparison: Comparison, other: str, subject: str = SUBJECT) -> float:
    """Say how many times as good as another contender the subject was; nan if that is unknown.

    Good is calls/s, and latency at the median where the rate was given.
    """
    if comparison.facts.get("rate"):
        ratios = comparison.ratios(other, subject, "p50_us")
    else:
        ratios = _ratios_of(comparison, subject, other, "calls_per_s")
    return median(ratios) if ratios else math.nan


def _ratios_of(comparison: Comparison, subject: str, other: str, metric: str) -> list[float]:
    if metric not in (comparison.runs.get(subject) or [{}])[0]:
        return []
    return comparison.ratios(subject, other, metric)


def conclusions(comparisons: Iterable[Comparison]) -> Iterator[str]:
    """Give one sentence for each case, and a last one that answers the question."""
    lost = []
    count = 0
    for comparison in comparisons:
        if SUBJECT not in comparison.runs:
            continue
        if comparison.topic == "idle":
            yield _idleness(comparison)
            continue
        others = {
            name: ratio
            for name in comparison.runs
            if name != SUBJECT and not math.isnan(ratio := advantage(comparison, name))
        }
        if not others:
            continue
        count += 1
        yield _sentence(comparison, others)
        lost += [
            f"{name} ({comparison.case}, {ratio:.2f}x)"
            for name, ratio in others.items()
            if ratio < _BARELY
        ]
    if count and lost:
        yield f"Shared memory was not clearly better than {'; '.join(lost)}."
    elif count:
        cases = "the one case" if count == 1 else f"all {count} cases"
        yield f"Shared memory was better than all others in {cases}."


def _sentence(comparison: Comparison, others: dict[str, float]) -> str:
    figures = comparison.medians(SUBJECT)
    times = ", ".join(
        f"{ratio:.1f}x {name}{_cpu(comparison, name)}" for name, ratio in others.items()
    )
    if comparison.facts.get("rate"):
        return f"{comparison.case}: p50 {figures['p50_us']:.1f} us; shorter by {times}."
    return (
        f"{comparison.case}: {figures['calls_per_s']:,.0f} calls/s, "
        f"p50 {figures['p50_us']:,.1f} us; calls/s {times}."
    )


def _cpu(comparison: Comparison, other: str) -> str:
    ratios = comparison.ratios(SUBJECT, other, "cpu_us")
    return f" (CPU {median(ratios):.2f}x)" if ratios else ""


def _idleness(comparison: Comparison) -> str:
    used = comparison.medians(SUBJECT)["cpu_ms"]
    return f"{comparison.case}: {used:.2f} ms of CPU time."
