"""Calls of event loops: in flight, from many clients, idle; FastAPI beside itself over UDS.

Targets: targets.AIO. `python -m benchmarks aio` shows them together with those of `bytes`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest

from benchmarks import event_loops
from benchmarks.event_loops import IDLE_CASE, ROWS

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison
    from shmrpc.bench.harness import Effort


@cache
def measure(effort: Effort) -> dict[str, Comparison]:
    return {comparison.case: comparison for comparison in event_loops.compare(effort)}


@pytest.mark.parametrize("case, row", [(case, row) for case, rows in ROWS.items() for row in rows])
def test_aio(effort: Effort, case: str, row: str, record: Record) -> None:
    record(measure(effort)[case], row, "cpu_ms" if case == IDLE_CASE else "calls_per_s")
