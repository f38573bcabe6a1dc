"""Several client/server pairs at once on two CPUs: from the second on, more processes than CPUs.

Target: at four pairs, at least 1.3x raw UDS's calls/s in total.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import topics

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison
    from shmrpc.bench.harness import Effort


@pytest.fixture(scope="module", params=topics.PAIR_COUNTS, ids=topics.pairs_case)
def comparison(effort: Effort, request: pytest.FixtureRequest) -> Comparison:
    return topics.pairs(effort, request.param)


@pytest.mark.parametrize("contender", topics.PAIRS)
def test_pairs(comparison: Comparison, contender: str, record: Record) -> None:
    record(comparison, contender, "calls_per_s")
