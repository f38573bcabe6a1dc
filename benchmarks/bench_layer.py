"""shmrpc over a Unix socket beside the bare socket: what the RPC layer itself costs.

Target: p50 within 1.5x of raw UDS's, wherever the two sides run.
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
    return topics.layer(effort, place)


@pytest.mark.parametrize("place", topics.PLACES, indirect=True, scope="module")
@pytest.mark.parametrize("contender", topics.LAYER)
def test_layer(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "p50_us")
