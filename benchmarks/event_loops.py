"""The topic `aio`: calls, idle connections, bytes and HTTP of event loops beside what they replace.

All on two CPUs, client and server pinned to one each, and what is divided by each other measured
in turns of one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import bench_bytes
from shmrpc.bench.figures import Comparison
from shmrpc.bench.harness import Crowd, Load, compare_quiet, compare_rows
from shmrpc.bench.regimes import TWO_CPUS, placement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmrpc.bench.harness import Effort

__all__ = ["CALLS_CASE", "IDLE_CASE", "ROWS", "WEB_CASE", "compare"]

_DEPTHS = {"1": Load(), "64": Load(depth=64), "1,000": Load(depth=1000)}
_CLIENTS = {"200 clients": Load(depth=200, connections=200)}
_CALLERS = {
    "shm-aio": _DEPTHS | _CLIENTS,
    "asyncio": _DEPTHS,
    "shm-uvloop": _DEPTHS | _CLIENTS,
    "uvloop": _DEPTHS,
    "grpcio-aio": {"64": _DEPTHS["64"]},
}
_WEB = ("fastapi", "fastapi-uds")

CALLS_CASE = "echo of 64 B"
WEB_CASE = "FastAPI behind uvicorn, aiohttp's client"
_IDLE_CONNECTIONS = 1_000
_QUIET_SECONDS = 10.0
IDLE_CASE = f"{_IDLE_CONNECTIONS:,} idle connections, {_QUIET_SECONDS:.0f} s"
_RESTING = ("shm-aio", "asyncio")


def _rows(loads: dict[str, dict[str, Load]]) -> dict[str, dict[str, Load]]:
    return {
        name: {f"{name} {row}": load for row, load in chosen.items()}
        for name, chosen in loads.items()
    }


ROWS = {
    CALLS_CASE: [row for rows in _rows(_CALLERS).values() for row in rows],
    WEB_CASE: list(_WEB),
    IDLE_CASE: list(_RESTING),
}
"""What each case compares."""


def calls(effort: Effort) -> Comparison:
    """Echo with 1, 64 and 1,000 calls in flight, and from 200 clients with one each."""
    where = placement(TWO_CPUS)
    return compare_rows(Comparison("aio", CALLS_CASE), _rows(_CALLERS), effort, where)


def web(effort: Effort) -> Comparison:
    """Post 64 bytes and get them back, one request at a time on one connection."""
    rows = {name: {name: Load()} for name in _WEB}
    return compare_rows(Comparison("aio", WEB_CASE), rows, effort, placement(TWO_CPUS))


def idle() -> Comparison:
    """Connect, make a call on each connection and fall silent."""
    crowd = Crowd(connections=_IDLE_CONNECTIONS)
    return compare_quiet(Comparison("aio", IDLE_CASE), _RESTING, _QUIET_SECONDS, crowd)


def compare(effort: Effort) -> Iterator[Comparison]:
    """Measure all of it."""
    yield calls(effort)
    yield idle()
    yield bench_bytes.compare(effort)
    yield web(effort)
