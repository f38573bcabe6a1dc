"""The demo's measurement: the same calls over each transport, turn by turn."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import shmrpc

__all__ = ["PAYLOAD_BYTES", "Figures", "measure"]

PAYLOAD_BYTES = 64
_WARMUP_CALLS = 200
_SETTLE_CALLS = 20  # at the start of each turn: the server has just been busy elsewhere


@dataclass
class Figures:
    """What calls over one transport took, all turns together."""

    latencies_ns: array[int] = field(default_factory=lambda: array("q"))
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def percentile(self, fraction: float) -> float:
        """Return the seconds that this part of the calls took at most."""
        ordered = sorted(self.latencies_ns)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] / 1e9

    @property
    def calls_per_second(self) -> float:
        """Calls in a second, one at a time."""
        return len(self.latencies_ns) / self.seconds

    @property
    def cpu_per_call(self) -> float:
        """CPU seconds that one call costs both processes together."""
        return self.cpu_seconds / len(self.latencies_ns)


def measure(
    clients: Mapping[str, shmrpc.Client],
    server_pid: int,
    figures: Mapping[str, Figures],
    *,
    rounds: int,
    turn_seconds: float,
) -> Iterator[None]:
    """Fill in the figures; yields after each of the ``rounds * len(clients)`` turns.

    Turns alternate, and each round begins with another transport: a machine whose speed changes
    meanwhile changes it for all of them.
    """
    names = list(clients)
    payload = bytes(PAYLOAD_BYTES)
    for client in clients.values():
        for _ in range(_WARMUP_CALLS):
            client.call("echo", payload)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            _take_turn(clients[name], server_pid, figures[name], payload, turn_seconds)
            yield


def _take_turn(
    client: shmrpc.Client, server_pid: int, figures: Figures, payload: bytes, seconds: float
) -> None:
    call, clock, note = client.call, time.perf_counter_ns, figures.latencies_ns.append
    for _ in range(_SETTLE_CALLS):
        call("echo", payload)
    cpu = _cpu_seconds(server_pid)
    before = start = clock()
    end = start + int(seconds * 1e9)
    while before < end:
        call("echo", payload)
        now = clock()
        note(now - before)
        before = now
    figures.seconds += (before - start) / 1e9
    figures.cpu_seconds += _cpu_seconds(server_pid) - cpu


def _cpu_seconds(pid: int) -> float:
    """CPU time of this process and another one so far."""
    # The number of another process's CPU clock on Linux, as clock_getcpuclockid(3) makes it:
    # /proc/PID/stat would only count in ticks of 10 ms.
    return time.process_time() + time.clock_gettime(~pid << 3 | 2)
