"""How many calls there were, and how long they took: counted without a lock, one cell a thread."""

from __future__ import annotations

import threading

__all__ = ["BUCKETS", "Cell", "Counts"]

BUCKETS = 40  # bit lengths of nanoseconds: the last is 9 minutes and more
_CODES = 17


class Cell:
    """What one thread has counted for one route."""

    __slots__ = ("buckets", "codes", "nanoseconds")

    def __init__(self) -> None:
        self.codes = [0] * _CODES  # calls, by gRPC status number
        self.buckets = [0] * BUCKETS  # calls, by the bit length of their nanoseconds
        self.nanoseconds = 0

    def count(self, status: int, nanoseconds: int) -> None:
        """One call has ended."""
        self.codes[status if status < _CODES else 2] += 1
        self.buckets[min(nanoseconds.bit_length(), BUCKETS - 1)] += 1
        self.nanoseconds += nanoseconds

    def add(self, other: Cell) -> None:
        """Count all that another cell has."""
        self.codes = [a + b for a, b in zip(self.codes, other.codes, strict=True)]
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]
        self.nanoseconds += other.nanoseconds


class Counts:
    """The cells of all threads, by route."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, list[Cell]] = {}
        self._ended: dict[str, Cell] = {}

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
                self._ended.setdefault(prefix, Cell()).add(cell)

    def totals(self) -> dict[str, Cell]:
        """What there is in all, by route."""
        totals: dict[str, Cell] = {}
        with self._lock:
            for prefix, cell in self._ended.items():
                totals.setdefault(prefix, Cell()).add(cell)
            for prefix, cells in self._live.items():
                for cell in cells:
                    totals.setdefault(prefix, Cell()).add(cell)
        return totals
