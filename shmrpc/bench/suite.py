"""What a user can have measured: plans, each of which gives one comparison after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from . import regimes as circumstances
from .contenders import AsyncContender, home_of, load
from .contenders import names as all_contenders
from .figures import Comparison
from .harness import Crowd, Effort, Load, Placement, compare, compare_loads, compare_quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from .harness import Step
    from .regimes import Regime

__all__ = ["QUICK", "QUICK_EFFORT", "TOPICS", "Plan", "compare_regime", "plans", "quick_plans"]

QUICK = ("shm", "unix", "tcp", "raw-uds", "mp-pipe")
"""What needs nothing but shmrpc itself."""
QUICK_EFFORT = Effort(runs=3, seconds=0.2, warm_up_seconds=0.1)
_CROWDED = ("shm", "unix", "raw-uds", "pyzmq", "thriftpy2")
_RESTING = ("shm", "unix", "raw-uds", "shm-aio")
_QUIET_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """Some comparisons: `run` makes them, and tells its argument of each of `steps` turns."""

    topic: str
    cases: tuple[str, ...]
    steps: int
    run: Callable[[Step], Iterator[Comparison]]


def compare_regime(
    topic: str,
    regime: Regime,
    contenders: Sequence[str],
    effort: Effort,
    step: Step | None = None,
) -> Comparison:
    """Measure contenders under one set of circumstances."""
    return compare(
        Comparison(topic, regime.name, facts=regime.facts),
        contenders,
        effort,
        regime.placement,
        regime.crowd,
        regime.load,
        disturbed=regime.disturbed,
        step=step,
    )


def _regime_plan(topic: str, regime: Regime, contenders: Sequence[str], effort: Effort) -> Plan:
    def run(step: Step) -> Iterator[Comparison]:
        yield compare_regime(topic, regime, contenders, effort, step)

    return Plan(topic, (regime.name,), (effort.runs + 1) * len(contenders), run)


def _loads_plan(
    topic: str, loads: Sequence[tuple[str, Load]], contenders: Sequence[str], effort: Effort
) -> Plan:
    """Measure several loads with the same processes."""

    def run(step: Step) -> Iterator[Comparison]:
        cases = []
        for name, load_ in loads:
            facts: dict[str, float] = {
                "size": load_.size,
                "depth": load_.depth,
                "rate": load_.rate,
            }
            cases.append((Comparison(topic, name, facts=facts), load_))
        return compare_loads(cases, contenders, effort, Placement(), Crowd(), step=step)

    cases = tuple(name for name, _ in loads)
    return Plan(topic, cases, len(loads) * (effort.runs + 1) * len(contenders), run)


def _usual(contenders: Sequence[str], usual: Collection[str], *, asked: bool) -> list[str]:
    """Those that are measured here unless somebody asks for others."""
    return [name for name in contenders if asked or name in usual]


def _sizes(contenders: Sequence[str], effort: Effort, *, asked: bool) -> list[Plan]:
    _ = asked
    loads = [
        (f"{circumstances.size_name(size)}, one at a time", Load(size))
        for size in circumstances.SIZES
    ]
    return [_loads_plan("sizes", loads, contenders, effort)]


def _inflight(contenders: Sequence[str], effort: Effort, *, asked: bool) -> list[Plan]:
    _ = asked
    depths = {size: circumstances.depth_for(size) for size in circumstances.SIZES}
    loads = [
        (f"{circumstances.size_name(size)}, {depth} in flight", Load(size, depth))
        for size, depth in depths.items()
    ]
    return [_loads_plan("inflight", loads, contenders, effort)]


def _regimes(contenders: Sequence[str], effort: Effort, *, asked: bool) -> list[Plan]:
    """Give crowds to those that are most used only: each takes a process per client."""
    crowded = _usual(contenders, _CROWDED, asked=asked)
    return [
        _regime_plan("regimes", regime, contenders if regime.crowd == Crowd() else crowded, effort)
        for regime in circumstances.regimes()
    ]


def _rates(contenders: Sequence[str], effort: Effort, *, asked: bool) -> list[Plan]:
    sync = [name for name in contenders if asked or not _is_async(name)]
    loads = [(f"{rate:,} calls/s", Load(rate=rate)) for rate in circumstances.RATES]
    return [_loads_plan("rates", loads, sync, effort)]


def _is_async(name: str) -> bool:
    try:
        return isinstance(load(home_of(name)), AsyncContender)
    except (ImportError, OSError):
        return False  # it will be reported as missing


def _idle(contenders: Sequence[str], effort: Effort, *, asked: bool) -> list[Plan]:
    _ = effort
    resting = _usual(contenders, _RESTING, asked=asked)
    return [idle_plan(count, resting) for count in (1, circumstances.IDLE_CONNECTIONS)]


def idle_plan(connections: int, contenders: Sequence[str], seconds: float = _QUIET_SECONDS) -> Plan:
    """Let clients connect, call for a moment and fall silent."""
    count = f"{connections:,} connections" if connections > 1 else "1 connection"
    case = f"{count}, {seconds:.0f} s of silence"

    def run(step: Step) -> Iterator[Comparison]:
        comparison = Comparison("idle", case)
        crowd = Crowd(connections=connections)
        yield compare_quiet(comparison, contenders, seconds, crowd, step=step)

    return Plan("idle", (case,), 3 * len(contenders), run)


class _Topic(Protocol):
    def __call__(self, contenders: Sequence[str], effort: Effort, *, asked: bool) -> list[Plan]: ...


TOPICS: dict[str, _Topic] = {
    "sizes": _sizes,
    "inflight": _inflight,
    "regimes": _regimes,
    "rates": _rates,
    "idle": _idle,
}


def plans(
    topics: Sequence[str],
    effort: Effort,
    contenders: Sequence[str] | None = None,
    *,
    asked: bool = False,
) -> list[Plan]:
    """Plan topics, all if none is named; without `contenders`, all that are registered.

    With `asked` somebody wants these contenders everywhere; else each topic has those that are
    usual there.
    """
    chosen = list(contenders or all_contenders())
    found = [TOPICS[topic](chosen, effort, asked=asked) for topic in topics or TOPICS]
    return [plan for plans_of_topic in found for plan in plans_of_topic]


def quick_plans(
    effort: Effort = QUICK_EFFORT, contenders: Sequence[str] = QUICK, *, asked: bool = False
) -> list[Plan]:
    """Plan what decides whether shmrpc is worth it here, for less than a minute."""
    two = _usual(contenders, ("shm", "raw-uds"), asked=asked)
    regime_plan = partial(_regime_plan, "regimes", effort=effort)
    sizes = [("64 B, one at a time", Load()), ("64 KB, one at a time", Load(64 << 10))]
    found = [
        _loads_plan("sizes", sizes, contenders, effort),
        regime_plan(circumstances.ONE_PAIR_ONE_CPU, contenders),
        _loads_plan("rates", [("1,000 calls/s", Load(rate=1000))], two, effort),
        idle_plan(1, two, seconds=2.0),
    ]
    if len(circumstances.two_cpus().client or ()) > 1:
        found.insert(2, regime_plan(circumstances.pairs_regime(4), two))
    return found
