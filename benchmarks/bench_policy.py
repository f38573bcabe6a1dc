"""Calls beside a bare socket's in every regime: whom a wait disturbs, and what it costs.

Targets: targets.POLICY; `python -m benchmarks policy` shows them regime by regime.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest

from benchmarks import topics
from benchmarks.targets import POLICY

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison
    from shmrpc.bench.harness import Effort

CASES = list(dict.fromkeys(case for target in POLICY for case in target.cases or ()))


@cache
def measure(effort: Effort) -> dict[str, Comparison]:
    return {comparison.case: comparison for comparison in topics.policy(effort)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("contender", topics.POLICY)
def test_policy(effort: Effort, case: str, contender: str, record: Record) -> None:
    comparison = measure(effort).get(case)
    if comparison is None:
        pytest.skip("not so many CPUs here")
    record(comparison, contender, "cpu_ms" if case == topics.IDLE_POLICY_CASE else "p50_us")
