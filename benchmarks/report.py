"""Tables for people: what was measured, and the targets beside it."""

from __future__ import annotations

import os
import platform
from timeit import timeit
from typing import TYPE_CHECKING

from shmrpc.bench.pace import now_ns
from shmrpc.bench.tables import notes, rows, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.targets import Verdict
    from shmrpc.bench.figures import Comparison

_TIMER_READS = 100_000
_BUSY_LOAD = 0.3


def machine() -> str:
    """Describe where the figures come from, and how busy it is with other things."""
    timer_ns = timeit(now_ns, number=_TIMER_READS) / _TIMER_READS * 1e9
    cpus = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    busy = " (BUSY: figures are worse than it can)" if load > _BUSY_LOAD * cpus else ""
    return (
        f"{cpus} CPUs, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; load before {load:.2f}{busy}; "
        f"a look at the clock, one a call, costs {timer_ns:.0f} ns"
    )


def grid(lines: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  " + "   ".join(cells).rstrip())
    return "\n".join(text)


def table(comparison: Comparison) -> str:
    """Show the medians over the runs, and how far apart the runs were."""
    lines = [f"{comparison.topic}: {comparison.case}"]
    if comparison.runs:
        lines.append(grid(rows(comparison)))
    lines += [f"  {note}" for note in notes(comparison)]
    return "\n".join(lines)


def policy_table(verdicts: Iterable[Verdict]) -> str:
    """Show the waiting policy's targets: a row for each regime, reached if all of it is."""
    regimes: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        regimes.setdefault(verdict.case, []).append(verdict)
    lines = [["regime", "calls/s or latency", "CPU per call", ""]]
    for regime, found in regimes.items():
        cpu = [verdict for verdict in found if verdict.target.metric.startswith("cpu")]
        speed = [verdict for verdict in found if verdict not in cpu]
        reached = all(verdict.met for verdict in found)
        cells = ["; ".join(map(_ratio, group)) or "-" for group in (speed, cpu)]
        lines.append([regime, *cells, "reached" if reached else "not reached"])
    return grid(lines)


def _ratio(verdict: Verdict) -> str:
    """Write one target beside what was measured, and name what is compared if not shm with UDS."""
    target = verdict.target
    usual = (target.numerator, target.denominator) == ("shm", "raw-uds")
    what = "" if target.metric in {"calls_per_s", "cpu_us"} else target.metric.split("_")[0] + " "
    names = "" if usual else f" {target.numerator}/{target.denominator}"
    names = names if target.denominator else ""
    wanted = f"{target.bound} {target.limit:g}"
    return f"{what}{verdict.measured:.2f}{target.unit}{names} ({wanted})"


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """Show each target beside what was measured."""
    lines = [["target", "case", "wanted", "measured", "runs", ""]]
    for verdict in verdicts:
        target = verdict.target
        lines.append(
            [
                f"{target.topic}: {target.text}",
                verdict.case,
                f"{target.bound} {target.limit:g}{target.unit}",
                f"{verdict.measured:.2f}{target.unit}",
                spread(verdict.runs, "{:.2f}"),
                "met" if verdict.met else "MISSED",
            ]
        )
    if len(lines) == 1:
        return "  no target could be measured"
    return grid(lines)
