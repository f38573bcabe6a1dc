"""What the machine itself can do: round trips through the kernel, and copying memory.

`python -m shmrpc.bench.limits` measures and prints JSON, in a process of its own, because it forks.
All of it is done from Python, as the contenders are: a look at the clock and a few calls of the
interpreter are in each figure.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Protocol

from .lifetime import end_with_parent
from .pace import now_ns
from .regimes import ONE_CPU, SIZES, TWO_CPUS, placement, size_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Limit", "measure_limits"]

_ROUNDS = 300
_WARM_UP_ROUNDS = 50
_CACHE_LINE_BATCHES = 100
_COPY_NS = 20_000_000
_PATIENCE_S = 60
_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EAGAIN = 11


@dataclass(frozen=True)
class Limit:
    """One figure of the machine."""

    name: str
    where: str
    value: float
    unit: str


class _Doorbell(Protocol):
    """Two ends that wake each other."""

    def ring(self, side: int) -> None:
        """Wake the other side."""

    def wait(self, side: int) -> None:
        """Sleep until the other side rings."""


class _Eventfd:
    def __init__(self) -> None:
        self._fds = [os.eventfd(0), os.eventfd(0)]

    def ring(self, side: int) -> None:
        os.eventfd_write(self._fds[1 - side], 1)

    def wait(self, side: int) -> None:
        os.eventfd_read(self._fds[side])


class _Pipe:
    def __init__(self) -> None:
        self._pipes = [os.pipe(), os.pipe()]

    def ring(self, side: int) -> None:
        os.write(self._pipes[1 - side][1], b"x")

    def wait(self, side: int) -> None:
        os.read(self._pipes[side][0], 1)


class _Futex:
    """Two words in shared memory; a ring is counted there, so none is lost."""

    def __init__(self) -> None:
        number = _FUTEX.get(platform.machine())
        if number is None:
            raise OSError("no futex number for this machine")
        self._number = number
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = [ctypes.c_uint32.from_buffer(self._memory, 64 * side) for side in (0, 1)]
        self._seen = [0, 0]
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def _futex(self, side: int, operation: int, value: int) -> None:
        word = ctypes.byref(self._words[side])
        if self._syscall(self._number, word, operation, value, None) < 0:
            code = ctypes.get_errno()
            if code != _EAGAIN:  # it was rung before we slept
                raise OSError(code, os.strerror(code))

    def ring(self, side: int) -> None:
        self._words[1 - side].value += 1
        self._futex(1 - side, _FUTEX_WAKE, 1)

    def wait(self, side: int) -> None:
        seen = self._seen[side]
        while self._words[side].value == seen:
            self._futex(side, _FUTEX_WAIT, seen)
        self._seen[side] = seen + 1


@contextmanager
def _other_process(place: str, work: Callable[[], None]) -> Iterator[None]:
    """Let another process do the work meanwhile, both pinned as the place says."""
    where = placement(place)
    parent = os.getpid()
    child = os.fork()
    if not child:
        try:
            end_with_parent(parent)
            os.sched_setaffinity(0, where.server or ())
            work()
        finally:
            os._exit(0)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, where.client or ())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        os.kill(child, signal.SIGKILL)  # it has ended, unless we failed
        os.waitpid(child, 0)


def _round_trip_us(make: Callable[[], _Doorbell], place: str) -> float:
    """Bounce between two processes; returns the median of a round trip."""
    bell = make()
    rounds = _WARM_UP_ROUNDS + _ROUNDS

    def answer() -> None:
        for _ in range(rounds):
            bell.wait(1)
            bell.ring(1)

    samples = []
    with _other_process(place, answer):
        for _ in range(rounds):
            then = now_ns()
            bell.ring(0)
            bell.wait(0)
            samples.append(now_ns() - then)
    return median(samples[_WARM_UP_ROUNDS:]) / 1e3


def _cache_line_us() -> float:
    """Bounce a byte between two CPUs, both of which look at nothing else."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    ours, theirs = 0, mmap.PAGESIZE // 2
    batches = []

    def answer() -> None:
        while True:
            for turn in range(256):
                while memory[ours] != turn:
                    pass
                memory[theirs] = turn

    memory[ours] = memory[theirs] = 255  # what comes before the first turn
    with _other_process(TWO_CPUS, answer):
        for _ in range(_CACHE_LINE_BATCHES):
            then = now_ns()
            for turn in range(256):
                memory[ours] = turn
                while memory[theirs] != turn:
                    pass
            batches.append((now_ns() - then) / 256)
    return median(batches) / 1e3


def _copy_bytes_per_us(size: int) -> float:
    """Copy for a while with memcpy; returns the median of its speed."""
    source, target = bytes(range(256)) * (size // 256 + 1), ctypes.create_string_buffer(size)
    samples: list[float] = []
    until = now_ns() + _COPY_NS
    batch = max(1, (64 << 10) // size)
    while not samples or now_ns() < until:
        then = now_ns()
        for _ in range(batch):
            ctypes.memmove(target, source, size)
        samples.append((now_ns() - then) / batch)
    return size / median(samples) * 1e3


def _measure() -> list[Limit]:
    bells: dict[str, Callable[[], _Doorbell]] = {
        "eventfd": _Eventfd,
        "futex": _Futex,
        "pipe": _Pipe,
    }
    places = [ONE_CPU, TWO_CPUS] if len(os.sched_getaffinity(0)) > 1 else [ONE_CPU]
    limits = []
    for name, make in bells.items():
        for place in places:
            try:
                limits.append(Limit(f"{name} round trip", place, _round_trip_us(make, place), "us"))
            except OSError as error:
                print(f"{name}: {error}", file=sys.stderr)
    if TWO_CPUS in places:
        limits.append(Limit("cache line round trip", TWO_CPUS, _cache_line_us(), "us"))
    copies = [
        Limit("memcpy", size_name(size), _copy_bytes_per_us(size) / 1e3, "GB/s") for size in SIZES
    ]
    return limits + copies


def measure_limits() -> list[Limit]:
    """Measure what the machine can do, for less than two seconds, in another process."""
    run = subprocess.run(
        [sys.executable, "-m", "shmrpc.bench.limits"],
        capture_output=True,
        text=True,
        check=True,
        timeout=_PATIENCE_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )
    return [Limit(**limit) for limit in json.loads(run.stdout)]


if __name__ == "__main__":
    print(json.dumps([vars(limit) for limit in _measure()]))
