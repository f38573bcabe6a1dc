"""Tables for people: what was measured, and the targets beside it."""

from __future__ import annotations

import os
import platform
from timeit import timeit
from typing import TYPE_CHECKING

from benchmarks.measure import now_ns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.figures import Comparison
    from benchmarks.targets import Verdict

_COLUMNS = {
    "calls_per_s": ("calls/s", "{:,.0f}"),
    "p50_us": ("p50 us", "{:,.1f}"),
    "p99_us": ("p99 us", "{:,.1f}"),
    "p999_us": ("p99.9 us", "{:,.1f}"),
    "client_cpu_us": ("client CPU us/call", "{:,.1f}"),
    "server_cpu_us": ("server CPU us/call", "{:,.1f}"),
    "items_per_s": ("items/s", "{:,.0f}"),
    "bytes_per_s": ("bytes/s", "{:,.0f}"),
    "client_item_us": ("client CPU us/item", "{:,.2f}"),
    "server_item_us": ("server CPU us/item", "{:,.2f}"),
    "cpu_ms": ("CPU ms together", "{:,.2f}"),
}
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


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} .. {form.format(max(values))}"


def _grid(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells).rstrip())
    return "\n".join(lines)


def table(comparison: Comparison) -> str:
    """Show the medians over the runs, and how far apart the runs were."""
    lines = [f"{comparison.topic}: {comparison.case}"]
    if comparison.runs:
        medians = {name: comparison.medians(name) for name in comparison.runs}
        metrics = list(next(iter(medians.values())))
        lead = metrics[0]
        rows = [["", *(_COLUMNS[metric][0] for metric in metrics), f"{_COLUMNS[lead][0]}, runs"]]
        for name, figures in medians.items():
            cells = [_COLUMNS[metric][1].format(figures[metric]) for metric in metrics]
            spread = _spread(comparison.values(name, lead), _COLUMNS[lead][1])
            rows.append([name, *cells, spread])
        lines.append(_grid(rows))
    lines += [f"  {name}: not here ({why})" for name, why in comparison.absent.items()]
    lines += [f"  {name}: FAILED ({why})" for name, why in comparison.failed.items()]
    return "\n".join(lines)


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """Show each target beside what was measured."""
    rows = [["target", "case", "wanted", "measured", "runs", ""]]
    for verdict in verdicts:
        target = verdict.target
        rows.append(
            [
                f"{target.topic}: {target.text}",
                verdict.case,
                f"{target.bound} {target.limit:g}{target.unit}",
                f"{verdict.measured:.2f}{target.unit}",
                _spread(verdict.runs, "{:.2f}"),
                "met" if verdict.met else "MISSED",
            ]
        )
    if len(rows) == 1:
        return "  no target could be measured"
    return _grid(rows)
