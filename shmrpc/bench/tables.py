"""Figures as text, for tables on the terminal and in the report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figures import Comparison

__all__ = ["COLUMNS", "notes", "rows", "spread"]

COLUMNS = {
    "calls_per_s": ("calls/s", "{:,.0f}"),
    "p50_us": ("p50 us", "{:,.1f}"),
    "p99_us": ("p99 us", "{:,.1f}"),
    "p999_us": ("p99.9 us", "{:,.1f}"),
    "client_cpu_us": ("client CPU us/call", "{:,.1f}"),
    "server_cpu_us": ("server CPU us/call", "{:,.1f}"),
    "system_calls": ("sys/call", "{:,.1f}"),
    "wakeups": ("wake/call", "{:,.1f}"),
    "items_per_s": ("items/s", "{:,.0f}"),
    "bytes_per_s": ("bytes/s", "{:,.0f}"),
    "client_item_us": ("client CPU us/item", "{:,.2f}"),
    "server_item_us": ("server CPU us/item", "{:,.2f}"),
    "cpu_ms": ("CPU ms together", "{:,.2f}"),
    "connection_kib": ("KiB a connection", "{:,.0f}"),
}
"""What each metric is called and how it is written; those that are not here are not shown."""


def cell(metric: str, value: float) -> str:
    """Write one figure; what nobody could measure is a question mark."""
    return "?" if math.isnan(value) else COLUMNS[metric][1].format(value)


def spread(values: Sequence[float], form: str) -> str:
    """Say how far apart the runs were."""
    return f"{form.format(min(values))} .. {form.format(max(values))}"


def rows(comparison: Comparison) -> list[list[str]]:
    """Give the medians over the runs, a heading first; nothing if nobody was measured."""
    if not comparison.runs:
        return []
    medians = {name: comparison.medians(name) for name in comparison.runs}
    measured = next(iter(medians.values()))
    metrics = [metric for metric in COLUMNS if metric in measured]
    lead = metrics[0]
    title, form = COLUMNS[lead]
    table = [["", *(COLUMNS[metric][0] for metric in metrics), f"{title}, runs"]]
    for name, figures in medians.items():
        cells = [cell(metric, figures[metric]) for metric in metrics]
        table.append([name, *cells, spread(comparison.values(name, lead), form)])
    return table


def notes(comparison: Comparison) -> list[str]:
    """Say who is missing, and why."""
    absent = [f"{name}: not here ({why})" for name, why in comparison.absent.items()]
    return absent + [f"{name}: FAILED ({why})" for name, why in comparison.failed.items()]
