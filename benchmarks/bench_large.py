"""numpy arrays of 64 B to 64 MB: echoed, lent, copied in, and as items of a stream.

Draws docs/large-values.svg.

Targets: echo of 1 MB at least 10x below raw UDS with msgpack and 1.2x below iceoryx2, of 4 KB at
least 5x below raw UDS; a loan of 256 MB at most 1.5x one of 64 KB; 64 MB copied in at no less than
0.7x of the machine's own memcpy; a stream of 1 MB items at least 5x raw UDS's items/s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import large, plot

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison
    from shmrpc.bench.team import Effort

_ROWS = [(task.comparison.case, task.row) for task in large.tasks()]


@pytest.fixture(scope="module")
def comparisons(effort: Effort) -> dict[str, Comparison]:
    found = large.compare(effort)
    plot.draw(found)
    return {comparison.case: comparison for comparison in found}


@pytest.mark.parametrize("case, row", _ROWS, ids=[f"{row}: {case}" for case, row in _ROWS])
def test_large(comparisons: dict[str, Comparison], case: str, row: str, record: Record) -> None:
    metric = "items_per_s" if case.startswith("stream") else "p50_us"
    record(comparisons[case], row, metric)
