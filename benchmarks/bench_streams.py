"""Items of 64 bytes one way: as a stream, and as calls of which 64 or 512 are under way.

Targets: over shm a stream moves at least 2x the items/s of calls on the same connection, and at
least 3x those of a stream over unix, in both directions and wherever the two sides run.
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
def comparison(effort: Effort, direction: str, place: str) -> Comparison:
    return topics.streams(effort, direction, place)


@pytest.mark.parametrize("place", topics.PLACES, indirect=True, scope="module")
@pytest.mark.parametrize("direction", topics.DIRECTIONS, scope="module")
@pytest.mark.parametrize("contender", topics.STREAM_ROWS)
def test_streams(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "items_per_s")
