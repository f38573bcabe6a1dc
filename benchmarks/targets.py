"""The speeds that shmrpc is to reach, each a ratio of two contenders measured side by side."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.event_loops import CALLS_CASE, IDLE_CASE, WEB_CASE
from benchmarks.large import COPIED_IN, LOANED, STREAMED
from benchmarks.topics import IDLE_POLICY_CASE, PLACES, pairs_case
from shmrpc.bench import regimes
from shmrpc.bench.regimes import FREE, ONE_CPU, TWO_CPUS

if TYPE_CHECKING:
    from shmrpc.bench.figures import Comparison


@dataclass(frozen=True)
class Target:
    """`metric` of `numerator`, as a multiple of `denominator`'s unless that is None."""

    topic: str
    cases: tuple[str, ...] | None
    subject: str
    metric: str
    numerator: str
    denominator: str | None
    bound: str
    limit: float

    @property
    def text(self) -> str:
        """Say what is divided by what."""
        if self.denominator is None:
            return f"{self.numerator} {self.metric}"
        return f"{self.metric} of {self.numerator} / {self.denominator}"

    @property
    def unit(self) -> str:
        """Say what the figures are in."""
        return "x" if self.denominator else " " + self.metric.rpartition("_")[2]


def _policy(
    *cases: regimes.Regime, calls: float, cpu: float, denominator: str = "raw-uds"
) -> tuple[Target, Target]:
    """Say how many times the calls/s, and what part of the CPU time of a call."""
    names = tuple(case.name for case in cases)
    return (
        Target("policy", names, "shm", "calls_per_s", "shm", denominator, ">=", calls),
        Target("policy", names, "shm", "cpu_us", "shm", denominator, "<=", cpu),
    )


_FREE_PAIR = (regimes.ONE_PAIR_FREE.name,)
_MODEST_RATES = tuple(regimes.paced_regime(rate).name for rate in (1_000, 10_000))
_HIGH_RATE = (regimes.paced_regime(50_000).name,)

POLICY = (
    *_policy(regimes.ONE_PAIR_FREE, calls=5, cpu=0.5),
    *_policy(regimes.ONE_PAIR_ONE_CPU, calls=1.3, cpu=0.8),
    *_policy(regimes.pairs_regime(2), regimes.pairs_regime(4), calls=1.4, cpu=0.8),
    *_policy(regimes.pairs_regime(8), calls=1.25, cpu=0.85),
    *_policy(regimes.clients_regime(8), calls=1.3, cpu=0.85),
    *_policy(regimes.BUSY, calls=1.1, cpu=1),
    Target("policy", _MODEST_RATES, "shm", "p50_us", "shm", "raw-uds", "<=", 1),
    Target("policy", _MODEST_RATES, "shm", "p99_us", "shm", "raw-uds", "<=", 1),
    Target("policy", _MODEST_RATES, "shm", "cpu_us", "shm", "raw-uds", "<=", 1.1),
    Target("policy", _HIGH_RATE, "shm", "p50_us", "raw-uds", "shm", ">=", 3),
    Target("policy", _HIGH_RATE, "shm", "cpu_us", "shm", "raw-uds", "<=", 0.8),
    Target("policy", (IDLE_POLICY_CASE,), "shm", "cpu_ms", "shm", None, "<", 10),
    Target("policy", _FREE_PAIR, "shm", "calls_per_s", "shm", "grpcio", ">=", 100),
    Target("policy", _FREE_PAIR, "shm", "calls_per_s", "shm", "pyzmq", ">=", 20),
    Target("policy", _FREE_PAIR, "shm", "calls_per_s", "shm", "iceoryx2-poll", ">=", 3),
)
"""What the waiting policy has to reach, regime by regime, wherever a wait is spun or slept."""


def _aio(
    subject: str, metric: str, above: str, below: str | None, bound: str, limit: float
) -> Target:
    return Target("aio", (CALLS_CASE,), subject, metric, above, below, bound, limit)


AIO = (
    _aio("shm-aio 1", "p50_us", "asyncio 1", "shm-aio 1", ">=", 5),
    _aio("shm-aio 1", "p50_us", "shm-aio 1", None, "<", 12),
    _aio("shm-uvloop 1", "p50_us", "uvloop 1", "shm-uvloop 1", ">=", 1.5),
    _aio("shm-aio 64", "calls_per_s", "shm-aio 64", "asyncio 64", ">=", 2),
    _aio("shm-uvloop 64", "calls_per_s", "shm-uvloop 64", "uvloop 64", ">=", 2),
    _aio("shm-aio 1,000", "calls_per_s", "shm-aio 1,000", "shm-aio 64", ">=", 1),
    _aio("shm-uvloop 1,000", "calls_per_s", "shm-uvloop 1,000", "shm-uvloop 64", ">=", 1),
    _aio("shm-aio 64", "calls_per_s", "shm-aio 64", "grpcio-aio 64", ">=", 30),
    _aio("shm-aio 200 clients", "calls_per_s", "shm-aio 200 clients", "shm-aio 64", ">=", 0.7),
    _aio(
        "shm-uvloop 200 clients",
        "calls_per_s",
        "shm-uvloop 200 clients",
        "shm-uvloop 64",
        ">=",
        0.7,
    ),
    Target("aio", (IDLE_CASE,), "shm-aio", "cpu_ms", "shm-aio", None, "<", 10),
    Target("aio", (IDLE_CASE,), "shm-aio", "connection_kib", "shm-aio", None, "<", 200),
    Target("aio", (WEB_CASE,), "fastapi", "calls_per_s", "fastapi", "fastapi-uds", ">=", 1),
)
"""What calls of event loops have to reach."""

TARGETS = (
    *POLICY,
    *AIO,
    Target("unary", (FREE, TWO_CPUS), "shm", "p50_us", "shm", "floor", "<=", 1.6),
    Target("unary", (TWO_CPUS,), "shm", "p50_us", "raw-uds", "shm", ">=", 10),
    Target("unary", (ONE_CPU,), "shm", "calls_per_s", "shm", "raw-uds", ">=", 1.3),
    Target("threads", None, "shm", "calls_per_s", "shm", "unix", ">=", 3),
    Target("threads", None, "shm", "p99_us", "shm", None, "<", 1000),
    Target("pairs", (pairs_case(4),), "shm", "calls_per_s", "shm", "raw-uds", ">=", 1.3),
    Target("idle", None, "shm", "cpu_ms", "shm", None, "<", 10),
    Target("layer", PLACES, "unix", "p50_us", "unix", "raw-uds", "<=", 1.5),
    Target("sidecar", (FREE,), "sidecar", "p50_us", "sidecar", "shm", "<=", 2.2),
    Target("sidecar", (FREE,), "sidecar", "p50_us", "uds-proxy", "sidecar", ">=", 5),
    Target("sidecar", (FREE,), "sidecar 1 MB", "p50_us", "sidecar 1 MB", "shm 1 MB", "<=", 1.5),
    Target("streams", None, "shm stream", "items_per_s", "shm stream", "shm 64 calls", ">=", 2),
    Target("streams", None, "shm stream", "items_per_s", "shm stream", "shm 512 calls", ">=", 2),
    Target("streams", None, "shm stream", "items_per_s", "shm stream", "unix stream", ">=", 3),
    Target("large", ("echo of 1 MB",), "shm", "p50_us", "raw-uds", "shm", ">=", 10),
    Target("large", ("echo of 1 MB",), "shm", "p50_us", "iceoryx2", "shm", ">=", 1.2),
    Target("large", ("echo of 4 KB",), "shm", "p50_us", "raw-uds", "shm", ">=", 5),
    Target("large", (LOANED,), "256 MB", "p50_us", "256 MB", "64 KB", "<=", 1.5),
    Target("large", (COPIED_IN,), "shm", "p50_us", "memcpy", "shm", ">=", 0.7),
    Target("large", STREAMED, "shm", "items_per_s", "shm", "raw-uds", ">=", 5),
    Target("bytes", None, "shm", "bytes_per_s", "shm", "raw-uds", ">=", 2),
)
"""`cases` None: every case of the topic. `subject` is whose speed it is about."""


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured: the median over the runs, and the runs themselves."""

    target: Target
    case: str
    measured: float
    runs: tuple[float, ...]

    @property
    def met(self) -> bool:
        """Say whether the median reaches the target."""
        if self.target.bound == ">=":
            return self.measured >= self.target.limit
        if self.target.bound == "<":
            return self.measured < self.target.limit
        return self.measured <= self.target.limit


def judge(comparison: Comparison) -> list[Verdict]:
    """Find the targets of a comparison and what became of them; those not measured are left out."""
    verdicts = []
    for target in TARGETS:
        if target.topic != comparison.topic:
            continue
        if target.cases is not None and comparison.case not in target.cases:
            continue
        if target.denominator is None:
            runs = comparison.values(target.numerator, target.metric)
        else:
            runs = comparison.ratios(target.numerator, target.denominator, target.metric)
        if runs:
            verdicts.append(Verdict(target, comparison.case, median(runs), tuple(runs)))
    return verdicts
