"""A 64-byte echo from one thread: wherever the kernel puts it, on two CPUs, and on one.

Targets: p50 within 1.6x of the floor; on two CPUs at least 10x below raw UDS's; on one CPU at least
1.3x raw UDS's calls/s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import topics

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison
    from shmrpc.bench.harness import Effort


@pytest.fixture(scope="module")
def comparison(effort: Effort, place: str) -> Comparison:
    return topics.unary(effort, place)


@pytest.mark.parametrize("place", topics.PLACES, indirect=True, scope="module")
@pytest.mark.parametrize("contender", topics.UNARY)
def test_unary(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "p50_us")
