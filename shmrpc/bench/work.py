"""The work that every contender does: known bytes there and back, read on both sides.

The caller sends `pattern(size)`, the server passes what it received through `answer`, which
compares all of it with what it has to be and counts it. So a contender that moves no bytes, other
bytes, or answers from the caller's side is found out: the two sides' counts differ.
"""

from __future__ import annotations

from itertools import count
from random import Random

__all__ = ["PAYLOAD", "WrongPayloadError", "answer", "answered", "pattern"]

_patterns: dict[int, bytes] = {}


class WrongPayloadError(Exception):
    """What arrived is not what had been sent."""


def pattern(size: int) -> bytes:
    """Give the bytes that a payload of this size consists of, the same in every process.

    They can't be compressed, so that nobody is faster by trying.
    """
    known = _patterns.get(size)
    if known is None:
        known = _patterns[size] = Random(size).randbytes(size)
    return known


PAYLOAD = pattern(64)

_tick = count().__next__  # one step per answer, atomic between threads
_looks = 0


def answer(payload: bytes) -> bytes:
    """Be the method that is called: read the payload, count it and return it.

    Raises `WrongPayloadError` if a byte is wrong. May be called from any thread.
    """
    size = len(payload)
    if payload != (_patterns.get(size) or pattern(size)):
        raise WrongPayloadError(f"{size} bytes arrived, and not those that were sent")
    _tick()
    return payload


def answered() -> int:
    """Say how many payloads this process has answered so far. Not for two threads at once."""
    global _looks  # noqa: PLW0603 - a look at the counter is a step of it too
    total = _tick() - _looks
    _looks += 1
    return total
