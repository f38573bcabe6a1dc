"""A 64-byte echo, and one of 1 MB, direct and through a sidecar; through a plain proxy beside them.

Targets: p50 through the sidecar at most 2.2x the direct one and at least 5x below the proxy's; with
1 MB at most 1.5x. The server's CPU time is without the middleman's.
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
    return topics.sidecar(effort, place)


@pytest.mark.parametrize("place", topics.PLACES, indirect=True, scope="module")
@pytest.mark.parametrize("contender", topics.SIDECAR)
def test_sidecar(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "p50_us")
