"""What both processes of a call use, read from the kernel: CPU time, wake-ups, calls, memory."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Meter", "Usage", "cpu_ns", "memory_bytes", "wakeups"]

_CPUCLOCK_SCHED = 2
_TRACEPOINT = 2  # PERF_TYPE_TRACEPOINT
_INHERIT = 1 << 1  # perf_event_attr's second flag: threads that begin meanwhile count too
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_CLOEXEC = 1 << 3  # PERF_FLAG_FD_CLOEXEC
_EVENT_IDS = (
    Path("/sys/kernel/tracing/events/raw_syscalls/sys_enter/id"),
    Path("/sys/kernel/debug/tracing/events/raw_syscalls/sys_enter/id"),
)


def cpu_ns(pid: int) -> int:
    """Read the CPU time that a process has used, all its threads, also those that have ended.

    This is clock_getcpuclockid(3): nanoseconds, where /proc/PID/stat has ticks of 10 ms and
    /proc/PID/schedstat only the first thread.
    """
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def wakeups(pid: int) -> int:
    """Count how often the living threads of a process went to sleep, and so had to be woken."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            _, _, rest = status.read_text().partition("\nvoluntary_ctxt_switches:")
            total += int(rest.split(maxsplit=1)[0])
    return total


def memory_bytes(pids: Iterable[int]) -> int:
    """Count the memory of these processes that belongs to no file: their own, and what they share.

    A segment of shared memory counts once and whole, also where nobody has written to it yet: it
    may be reserved.
    """
    total = 0
    shared: dict[str, int] = {}
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += 1024 * int(rollup.partition("\nAnonymous:")[2].split(maxsplit=1)[0])
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, _, _, _, inode, *path = line.split(maxsplit=5)
            if path and path[0].startswith(("/dev/shm/", "/memfd:")):
                start, _, end = span.partition("-")
                size = int(end, 16) - int(start, 16)
                shared[inode] = max(size, shared.get(inode, 0))
    return total + sum(shared.values())


class _PerfEventAttr(ctypes.Structure):
    """The first fields of struct perf_event_attr; the kernel takes the rest as zero."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("bp_addr", ctypes.c_uint64),
    ]


class _SystemCalls:
    """Counts the system calls of processes, as perf(1) does, from now until it is closed."""

    def __init__(self, pids: list[int]) -> None:
        """Begin; raises OSError where that is not allowed."""
        event = next((int(path.read_text()) for path in _EVENT_IDS if os.access(path, os.R_OK)), -1)
        number = _PERF_EVENT_OPEN.get(platform.machine())
        if event < 0 or number is None:
            raise OSError("the kernel does not let us count system calls")
        attr = _PerfEventAttr(
            type=_TRACEPOINT, size=ctypes.sizeof(_PerfEventAttr), config=event, flags=_INHERIT
        )
        open_event = ctypes.CDLL(None, use_errno=True).syscall
        self._fds: list[int] = []
        threads = [int(path.name) for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()]
        for thread in threads:
            fd = open_event(number, ctypes.byref(attr), thread, -1, -1, ctypes.c_ulong(_CLOEXEC))
            if fd < 0:
                self.close()
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            self._fds.append(fd)

    def close(self) -> int:
        """End; returns how many there were."""
        total = 0
        for fd in self._fds:
            total += int.from_bytes(os.read(fd, 8), "little")
            os.close(fd)
        self._fds = []
        return total


@dataclass(frozen=True)
class Usage:
    """What was used between two instants; `system_calls` is nan where nobody counted."""

    client_cpu_ns: int
    server_cpu_ns: int
    wakeups: int
    system_calls: float


class Meter:
    """Reads the counters of this process and of the servers at the begin and the end of a window.

    Counting system calls makes each of them slower, so that is done in runs of its own.
    """

    def __init__(self, server_pid: int | None, *, system_calls: bool = False) -> None:
        """Watch this process and, unless another client does it, the server's."""
        self._server_pid = server_pid
        self._pids = [os.getpid(), *filter(None, [server_pid])]
        self._counts_calls = system_calls

    def begin(self) -> None:
        """Take the first reading."""
        self._calls: _SystemCalls | None = None
        if self._counts_calls:
            with suppress(OSError):
                self._calls = _SystemCalls(self._pids)
        self._wakeups = sum(map(wakeups, self._pids))
        self._cpu = self._read_cpu()

    def end(self) -> Usage:
        """Take the second one, and say what lies between."""
        client, server = self._read_cpu()
        woken = sum(map(wakeups, self._pids)) - self._wakeups
        calls = math.nan if self._calls is None else self._calls.close()
        return Usage(client - self._cpu[0], server - self._cpu[1], woken, calls)

    def _read_cpu(self) -> tuple[int, int]:
        server = 0 if self._server_pid is None else cpu_ns(self._server_pid)
        return cpu_ns(self._pids[0]), server
