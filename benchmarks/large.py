"""The topic `large`: measures the contenders of arrays.py by turns, in processes of their own.

A contender's server runs from the start to the end of a comparison; each run has a client process
of its own, which does every work over one connection. `python -m benchmarks.large ROLE ...` is
either.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, NoReturn, cast

from shmrpc.bench.figures import Comparison, Figures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.arrays import Connection, Contender
    from shmrpc.bench.team import Effort

_HOMES = {
    "shm": "benchmarks.arrays:SHM",
    "unix": "benchmarks.arrays:UNIX",
    "raw-uds": "benchmarks.arrays:RAW_UDS",
    "raw-uds-gather": "benchmarks.arrays:RAW_UDS_GATHER",
    "iceoryx2": "benchmarks.iceoryx:ICEORYX2",
    "memcpy": "benchmarks.arrays:MEMCPY",
}
ECHOERS = ("shm", "unix", "raw-uds", "raw-uds-gather", "iceoryx2")
STREAMERS = ("shm", "unix", "raw-uds", "raw-uds-gather")
FLOWS = ("down", "up")

SIZES = {
    "64 B": 64,
    "256 B": 256,
    "1 KB": 1 << 10,
    "4 KB": 4 << 10,
    "16 KB": 16 << 10,
    "64 KB": 64 << 10,
    "256 KB": 256 << 10,
    "1 MB": 1 << 20,
    "4 MB": 4 << 20,
    "16 MB": 16 << 20,
    "64 MB": 64 << 20,
}
SOME_SIZES = ("64 B", "4 KB", "64 KB", "1 MB", "16 MB", "64 MB")
LOANS = {"64 KB": 64 << 10, "256 MB": 256 << 20}
COPIED_BYTES = 64 << 20

LOANED = "loaned, two numbers read"
COPIED_IN = "64 MB copied in"
STREAMED = tuple(f"stream of 1 MB {direction}" for direction in FLOWS)

_CALLS_MIN = 5
_CPUCLOCK_SCHED = 2


@dataclass(frozen=True)
class Task:
    """What one contender does, and the row that it fills with it."""

    comparison: Comparison
    row: str
    contender: str
    what: str
    nbytes: int = 0


def tasks(sizes: Sequence[str] = tuple(SIZES)) -> list[Task]:
    """List everything, in the order in which it is done."""
    found = []
    for size in sizes:
        comparison = Comparison("large", f"echo of {size}")
        found += [Task(comparison, name, name, "echo", SIZES[size]) for name in ECHOERS]
    comparison = Comparison("large", LOANED)
    found += [Task(comparison, size, "shm", "loan", nbytes) for size, nbytes in LOANS.items()]
    comparison = Comparison("large", COPIED_IN)
    found += [Task(comparison, name, name, "give", COPIED_BYTES) for name in ("shm", "memcpy")]
    for direction, case in zip(FLOWS, STREAMED, strict=True):
        comparison = Comparison("large", case)
        found += [Task(comparison, name, name, direction) for name in STREAMERS]
    return found


# ---- the harness ----


def compare(effort: Effort, sizes: Sequence[str] = tuple(SIZES)) -> list[Comparison]:
    """Measure everything; what can't be measured here is said in the comparison."""
    everything = tasks(sizes)
    names = list(dict.fromkeys(task.contender for task in everything))
    with contextlib.ExitStack() as stack:
        servers: dict[str, tuple[str, int]] = {}
        for name in names:
            reason = _why_absent(name)
            if reason is None:
                servers[name] = stack.enter_context(_server(name))
            for task in everything:
                if task.contender == name and reason is not None:
                    task.comparison.absent[task.row] = reason
        for _ in range(effort.runs):
            for name in list(servers):
                mine = [task for task in everything if task.contender == name]
                try:
                    _run(mine, *servers[name], effort)
                except subprocess.SubprocessError as error:
                    del servers[name]
                    for task in mine:
                        task.comparison.failed[task.row] = str(error)
                        task.comparison.runs.pop(task.row, None)
    return list({id(task.comparison): task.comparison for task in everything}.values())


def _why_absent(name: str) -> str | None:
    try:
        _load(name)
    except ImportError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _server(name: str) -> Iterator[tuple[str, int]]:
    """Run a contender's server; gives its address and pid."""
    with tempfile.TemporaryDirectory(prefix="shmrpc-bench-", dir="/tmp") as directory:
        command = [sys.executable, "-m", "benchmarks.large", "serve", name, directory]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                answer = process.stdout.readline() if process.stdout is not None else ""
                yield answer.strip(), process.pid
            finally:
                process.terminate()


def _run(mine: Sequence[Task], address: str, server_pid: int, effort: Effort) -> None:
    works = [[task.what, task.nbytes] for task in mine]
    command = [sys.executable, "-m", "benchmarks.large", "drive", mine[0].contender, address]
    command += [str(server_pid), json.dumps(works), str(effort.seconds)]
    patience = (effort.seconds * 3 + 30) * len(works)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=patience)
    for task, figures in zip(mine, json.loads(done.stdout), strict=True):
        task.comparison.runs.setdefault(task.row, []).append(figures)


# ---- the processes ----


def _load(name: str) -> Contender:
    module, _, attribute = _HOMES[name].partition(":")
    return cast("Contender", getattr(importlib.import_module(module), attribute))


def _cpu_ns(pid: int) -> int:
    """Read the CPU time that a process has used: clock_getcpuclockid(3)."""
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def _serve(name: str, directory: str) -> None:
    def end(*_: object) -> NoReturn:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    service = _load(name).start(directory)
    try:
        print(service.address, flush=True)
        service.serve()
    finally:
        service.close()


def _drive(name: str, address: str, server_pid: int, works: Any, seconds: float) -> None:
    connection = _load(name).connect(address)
    figures = []
    for what, nbytes in works:
        measure = _measure_flow if what in FLOWS else _measure
        figures.append(measure(connection, what, nbytes, server_pid, int(seconds * 1e9)))
    connection.close()
    print(json.dumps(figures))


def _measure(
    connection: Connection, what: str, nbytes: int, server_pid: int, window_ns: int
) -> Figures:
    """Do it until the window ends, after as much as half of that of warming up."""
    work = connection.work(what, nbytes)
    clock = time.perf_counter_ns
    end = clock() + window_ns // 2
    work()
    while clock() < end:
        work()
    pids = os.getpid(), server_pid
    before = [_cpu_ns(pid) for pid in pids]
    samples: list[int] = []
    then = begin = clock()
    end = begin + window_ns
    while then < end or len(samples) < _CALLS_MIN:
        work()
        now = clock()
        samples.append(now - then)
        then = now
    count = len(samples)
    used = [(_cpu_ns(pid) - cpu_ns) / count / 1e3 for pid, cpu_ns in zip(pids, before, strict=True)]
    samples.sort()
    p50, p99, p999 = (samples[ceil(share * count) - 1] / 1e3 for share in (0.5, 0.99, 0.999))
    return {
        "calls_per_s": count / (then - begin) * 1e9,
        "p50_us": p50,
        "p99_us": p99,
        "p999_us": p999,
        "client_cpu_us": used[0],
        "server_cpu_us": used[1],
    }


def _measure_flow(
    connection: Connection, direction: str, _nbytes: int, server_pid: int, window_ns: int
) -> Figures:
    flow = connection.flow(direction)
    clock = time.perf_counter_ns
    flow(clock() + window_ns // 2)
    pids = os.getpid(), server_pid
    before = [_cpu_ns(pid) for pid in pids]
    begin = clock()
    count = flow(begin + window_ns)
    elapsed_ns = clock() - begin
    used = [(_cpu_ns(pid) - cpu_ns) / count / 1e3 for pid, cpu_ns in zip(pids, before, strict=True)]
    return {
        "items_per_s": count / elapsed_ns * 1e9,
        "client_item_us": used[0],
        "server_item_us": used[1],
    }


def main() -> None:
    """Be the process that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("serve", "drive"))
    parser.add_argument("contender", choices=_HOMES)
    parser.add_argument("place", help="the server's directory, or its address")
    parser.add_argument("rest", nargs="*", help="drive: the server's pid, works as JSON, seconds")
    options = parser.parse_args()
    if options.role == "serve":
        _serve(options.contender, options.place)
    else:
        pid, works, seconds = options.rest
        _drive(options.contender, options.place, int(pid), json.loads(works), float(seconds))


if __name__ == "__main__":
    main()
