"""How many calls there were, and how long they took: counted without a lock, one cell a thread."""

from __future__ import annotations

import threading
from typing import Any

from shmrpc._native import ffi

__all__ = ["BUCKETS", "Cell", "Counts", "Total"]

_NEW = ffi.new("shmrpc_tally *")
_CODES = len(_NEW.codes)
BUCKETS = len(_NEW.buckets)  # bit lengths of nanoseconds: the last is 9 minutes and more


class Cell:
    """What one thread has counted for one route, and the core for it."""

    __slots__ = ("c",)

    def __init__(self) -> None:
        self.c = ffi.new("shmrpc_tally *")

    def count(self, status: int, nanoseconds: int) -> None:
        """One call has ended."""
        tally = self.c
        tally.codes[status if status < _CODES else 2] += 1
        tally.buckets[min(nanoseconds.bit_length(), BUCKETS - 1)] += 1
        tally.nanoseconds += nanoseconds


class Total:
    """What several cells have."""

    def __init__(self) -> None:
        self.codes = [0] * _CODES  # calls, by gRPC status number
        self.buckets = [0] * BUCKETS  # calls, by the bit length of their nanoseconds
        self.nanoseconds = 0
        self.running = 0  # calls that the core passes on now

    def add(self, tally: Any) -> None:
        """Count what a tally has, or another total."""
        self.codes = [a + b for a, b in zip(self.codes, tally.codes, strict=True)]
        self.buckets = [a + b for a, b in zip(self.buckets, tally.buckets, strict=True)]
        self.nanoseconds += tally.nanoseconds
        self.running += tally.running


class Counts:
    """The cells of all threads, by route."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, list[Cell]] = {}
        self._ended: dict[str, Total] = {}

    def cell(self, prefix: str) -> Cell:
        """A new cell of the calling thread."""
        cell = Cell()
        with self._lock:
            self._live.setdefault(prefix, []).append(cell)
        return cell

    def end(self, cells: dict[str, Cell]) -> None:
        """A thread ends: keep what it has counted, not its cells."""
        with self._lock:
            for prefix, cell in cells.items():
                self._live[prefix].remove(cell)
                self._ended.setdefault(prefix, Total()).add(cell.c)

    def totals(self) -> dict[str, Total]:
        """What there is in all, by route."""
        totals: dict[str, Total] = {}
        with self._lock:
            for prefix, total in self._ended.items():
                totals.setdefault(prefix, Total()).add(total)
            for prefix, cells in self._live.items():
                for cell in cells:
                    totals.setdefault(prefix, Total()).add(cell.c)
        return totals
