"""Eight threads that share one client, over shared memory and over a Unix socket.

Targets: shm at least 3x the calls/s of unix, with a p99 below 1 ms. raw-uds, a socket with a lock
around each call, is shown beside them.
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
def comparison(effort: Effort) -> Comparison:
    return topics.threads(effort)


@pytest.mark.parametrize("contender", topics.THREADS)
def test_threads(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "calls_per_s")
