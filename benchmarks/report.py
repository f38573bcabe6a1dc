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

    from shmrpc.bench.figures import Comparison
    from benchmarks.targets import Verdict

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
