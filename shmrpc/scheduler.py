"""Functions that run later, on a few threads that exist only while something waits."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Scheduler"]


class Scheduler:
    """Runs functions when they are due; ``threads_max`` of them may block at the same time.

    Safe to use from any thread. In the child of a fork it starts anew, with nothing to do.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._threads = 0
        self._waiting = 0

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Run ``function``, which must not raise, in so many seconds.

        ``RuntimeError`` if no thread can be started, as when the program is ending.
        """
        when = time.monotonic() + seconds
        with self._changed:
            self._need_thread()
            heapq.heappush(self._due, (when, next(self._numbers), function))

    def _need_thread(self) -> None:
        """With the lock held: see that some thread waits for what is due first."""
        if self._waiting:
            self._changed.notify()
        elif self._threads < self._threads_max:
            thread = threading.Thread(
                target=self._run, name=f"{self._name}-{self._threads}", daemon=True
            )
            thread.start()
            self._threads += 1

    def _run(self) -> None:
        while True:
            with self._changed:
                function = self._next()
            if function is None:
                return
            function()
            del function  # and what it refers to, while this thread waits

    def _next(self) -> Callable[[], None] | None:
        """Wait for what is due, with the lock held; None when nothing is left and we end."""
        while self._due:
            pause = self._due[0][0] - time.monotonic()
            if pause <= 0:
                function = heapq.heappop(self._due)[2]
                if self._due:
                    with contextlib.suppress(RuntimeError):
                        self._need_thread()  # for the rest, in case this one blocks
                else:
                    self._changed.notify_all()  # so that the others end
                return function
            self._waiting += 1
            self._changed.wait(pause)
            self._waiting -= 1
        self._threads -= 1
        return None
