"""What is compared: one function per topic, each giving a `Comparison` for targets.py to judge.

What every user can measure, installed or not, is in shmrpc/bench; these are the topics with targets
that shmrpc has to reach, and those that need more than its public API.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shmrpc.bench import regimes
from shmrpc.bench.figures import Comparison
from shmrpc.bench.flows import DOWN, UP
from shmrpc.bench.harness import Crowd, Placement, compare, compare_flows, compare_quiet
from shmrpc.bench.regimes import FREE, ONE_CPU, TWO_CPUS, placement
from shmrpc.bench.suite import compare_regime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmrpc.bench.harness import Effort

UNARY = ("floor", "shm", "unix", "tcp", "raw-uds", "raw-tcp", "mp-pipe")
THREADS = ("shm", "unix", "raw-uds")
PAIRS = ("shm", "raw-uds")
IDLE = ("shm", "unix", "raw-uds")
LAYER = ("unix", "raw-uds")
STREAMS = {"shm": ("stream", "64 calls", "512 calls"), "unix": ("stream",), "tcp": ("stream",)}
STREAM_ROWS = tuple(f"{name} {flow}" for name, flows in STREAMS.items() for flow in flows)

PLACES = (FREE, TWO_CPUS, ONE_CPU)

DIRECTIONS = (DOWN, UP)
PAIR_COUNTS = (1, 2, 4, 8)
THREAD_COUNT = 8
QUIET_SECONDS = 10.0

POLICY = ("shm", "raw-uds")
POLICY_FREE = (*POLICY, "grpcio", "pyzmq", "iceoryx2-poll")
POLICY_RATES = (1_000, 10_000, 50_000)
IDLE_CONNECTIONS = 1_000
IDLE_POLICY_CASE = f"{IDLE_CONNECTIONS:,} idle connections, {QUIET_SECONDS:.0f} s"


def pairs_case(count: int) -> str:
    """Name the case of so many pairs at once."""
    return f"{count} at once"


def cpus_wanted(place: str) -> int:
    """Say how many CPUs a place needs to mean what it says."""
    return 1 if place == ONE_CPU else 2


def unary(effort: Effort, place: str) -> Comparison:
    """Echo 64 bytes from one thread."""
    return compare(Comparison("unary", place), UNARY, effort, placement(place), Crowd())


def layer(effort: Effort, place: str) -> Comparison:
    """Compare shmrpc over a Unix socket with the bare socket: what the RPC layer itself costs."""
    return compare(Comparison("layer", place), LAYER, effort, placement(place), Crowd())


def threads(effort: Effort) -> Comparison:
    """Let threads share one client."""
    case = f"{THREAD_COUNT} threads"
    crowd = Crowd(threads=THREAD_COUNT)
    return compare(Comparison("threads", case), THREADS, effort, Placement(), crowd)


def pairs(effort: Effort, count: int) -> Comparison:
    """Run so many client/server pairs at once, all on the same two CPUs."""
    cpus = tuple(sorted(os.sched_getaffinity(0))[:2])
    case = Comparison("pairs", pairs_case(count))
    return compare(case, PAIRS, effort, Placement(cpus, cpus), Crowd(pairs=count))


def idle(quiet_seconds: float = QUIET_SECONDS) -> Comparison:
    """Connect, call for a moment and fall silent."""
    case = Comparison("idle", f"{quiet_seconds:.0f} s of silence")
    return compare_quiet(case, IDLE, quiet_seconds)


def streams(effort: Effort, direction: str, place: str) -> Comparison:
    """Move items of 64 bytes one way: as a stream, and as calls with many under way."""
    case = Comparison("streams", f"{direction}, {place}")
    return compare_flows(case, direction, STREAMS, effort, placement(place))


def policy(effort: Effort) -> Iterator[Comparison]:
    """Compare the waiting policy with a bare socket's in every regime that has a target."""
    circumstances = [
        regimes.ONE_PAIR_FREE,
        regimes.ONE_PAIR_ONE_CPU,
        *map(regimes.pairs_regime, (2, 4, 8)),
        regimes.clients_regime(8),
        regimes.BUSY,
        *map(regimes.paced_regime, POLICY_RATES),
    ]
    for regime in circumstances:
        if regime.cpus <= len(os.sched_getaffinity(0)):
            contenders = POLICY_FREE if regime is regimes.ONE_PAIR_FREE else POLICY
            yield compare_regime("policy", regime, contenders, effort)
    case = Comparison("policy", IDLE_POLICY_CASE)
    yield compare_quiet(case, POLICY, QUIET_SECONDS, Crowd(connections=IDLE_CONNECTIONS))
