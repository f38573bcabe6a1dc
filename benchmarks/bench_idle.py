"""A client and a server, connected and quiet for 10 s: the CPU time that both use together.

Target: less than 10 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import topics

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return topics.idle()


@pytest.mark.parametrize("contender", topics.IDLE)
def test_idle(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "cpu_ms")
