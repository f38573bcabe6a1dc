"""What `shmrpc bench` measures, through pytest-benchmark: sizes, calls in flight, regimes, rates.

The contenders are those of the extra `bench`; one that is not installed is skipped, and says why.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest

from shmrpc.bench import suite
from shmrpc.bench.contenders import names
from shmrpc.bench.harness import Effort

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison

CONTENDERS = [name for name in names() if name != "floor"]
TOPICS = ("sizes", "inflight", "regimes", "rates")
CASES = [(plan.topic, case) for plan in suite.plans(TOPICS, Effort()) for case in plan.cases]


@cache
def measure(topic: str, effort: Effort) -> dict[str, Comparison]:
    plans = suite.plans([topic], effort, CONTENDERS)
    measured = [comparison for plan in plans for comparison in plan.run(lambda _: None)]
    return {comparison.case: comparison for comparison in measured}


@pytest.mark.parametrize("topic, case", CASES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_suite(effort: Effort, topic: str, case: str, contender: str, record: Record) -> None:
    comparison = measure(topic, effort)[case]
    if contender not in {*comparison.runs, *comparison.absent, *comparison.failed}:
        pytest.skip(f"{contender} is not in this comparison")
    record(comparison, contender, "p50_us")
