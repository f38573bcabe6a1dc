"""Calls at a steady rate, and latencies that do not hide what a slow reply does to the next calls.

A client that waits for each reply sends late when one is slow. Timed from the moment it did send,
the calls behind look fast although their users waited: coordinated omission. So each call has an
instant at which it is due, and its latency counts from there. What the client's own sleep
overshoots is no fault of the contender, and is taken off until it has been made up for.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING

from .figures import Laps
from .work import WrongPayloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    Pacer = Callable[[int], tuple[int, int]]
    """Waits until an instant; returns what the clock says then, and the CPU time it took."""

__all__ = ["now_ns", "paced_laps", "pacer"]

_SPIN_NS_MAX = 30_000
"""Shorter waits are no sleeps: waking up from one takes about as long."""
_PR_SET_TIMERSLACK = 29

now_ns = time.perf_counter_ns


def pacer() -> Pacer:
    """Give what waits for the next call's instant; the thread's sleeps are precise from now on."""
    with suppress(AttributeError):  # a libc without it: sleeps last up to 50 us longer
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

    def wait(due_ns: int) -> tuple[int, int]:
        remaining_ns = due_ns - now_ns()
        if remaining_ns > _SPIN_NS_MAX:
            time.sleep(remaining_ns / 1e9)
            return now_ns(), 0
        before = time.thread_time_ns()
        while (now := now_ns()) < due_ns:
            pass
        return now, time.thread_time_ns() - before

    return wait


def paced_laps(
    echo: Callable[[bytes], bytes],
    payload: bytes,
    interval_ns: float,
    start_ns: int,
    stop_ns: int,
    wait: Pacer,
    clock: Callable[[], int] = now_ns,
) -> Laps:
    """Call once in each interval until `stop_ns`.

    Calls that were due and could no longer be made have waited until the end at least, and count
    among the latencies with that; they do not count as calls.
    """
    samples = array("q")
    calls = waiting_cpu_ns = 0
    now = clock()
    begun_ns = max(now, start_ns)  # the warm-up's last call may have ended late
    due = float(begun_ns)
    late = 0.0  # how far we are behind because of our own sleep
    # One at least: the warm-up's last call may have ended after the window, too.
    while not calls or (due < stop_ns and now < stop_ns):
        if now < due:
            now, spun_ns = wait(int(due))
            waiting_cpu_ns += spun_ns
            late = max(0.0, now - due)
        else:
            late = min(late, now - due)
        reply = echo(payload)
        now = clock()
        if reply != payload:
            raise WrongPayloadError("other bytes came back than were sent")
        calls += 1
        samples.append(now - int(due + late))
        due += interval_ns
    elapsed_ns = max(now, stop_ns) - begun_ns
    while due < stop_ns:
        samples.append(stop_ns - int(due))
        due += interval_ns
    return Laps(samples, calls, 0, elapsed_ns, waiting_cpu_ns)
