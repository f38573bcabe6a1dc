"""What a route enforces: limits on calls at a time and a second, and a circuit breaker.

Each is asked before a call; all may be used by many threads at once.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Breaker", "Concurrency", "Rate"]


class Concurrency:
    """At most so many calls at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._running = 0
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Whether one more may run; then ``leave`` is due."""
        with self._lock:
            if self._running >= self.limit:
                return False
            self._running += 1
            return True

    def leave(self) -> None:
        """It has ended."""
        with self._lock:
            self._running -= 1


class Rate:
    """At most ``rate`` calls a second in the long run, and ``burst`` at once: a token bucket."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self.burst = burst
        self._tokens = burst
        self._clock = clock
        self._filled = clock()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether one more call may start now."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.rate)
            self._filled = now
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True


class Breaker:
    """Lets nothing through for ``seconds`` after ``failures`` in a row; then one call, to try.

    That call closes it again by its success, or opens it for as long once more.
    """

    def __init__(
        self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failures = failures
        self.seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened: float | None = None
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether it refuses calls now."""
        return self._opened is not None

    def allows(self) -> bool:
        """Whether a call may go through; then ``succeeded``, ``failed`` or ``spared`` is due."""
        with self._lock:
            if self._opened is None:
                return True
            if self._trying or self._clock() < self._opened + self.seconds:
                return False
            self._trying = True
            return True

    def succeeded(self) -> None:
        """The upstream has answered, whatever it was."""
        if self._in_a_row or self._opened is not None:
            with self._lock:
                self._in_a_row = 0
                self._opened = None
                self._trying = False

    def failed(self) -> None:
        """There was no answer."""
        with self._lock:
            self._in_a_row += 1
            if self._trying or self._in_a_row >= self.failures:
                self._opened = self._clock()
                self._trying = False

    def spared(self) -> None:
        """The call has told nothing: it was cancelled, or refused on our side."""
        if self._trying:
            with self._lock:
                self._trying = False
