"""Messages with buffers beside their body, as they were received.

A buffer in the peer's shared memory becomes a read-only memoryview of it, without a copy. When that
and everything made of it is gone, a finalizer gives the block back, from whatever thread, at
whatever moment: all that it does is one call into the core, which takes no lock of Python's, and in
a forked child gives nothing back. The memory stays mapped as long as a view of it lives, whatever
becomes of the connection, of its peer or of this library.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ._native import ffi, lib
from .owned import free_after
from .values import decode

__all__ = ["Parcel", "value_of"]

_buffer = ffi.buffer
_free = lib.shmrpc_lease_free
_take = lib.shmrpc_lease_take


class Parcel:
    """The body of a message and its buffers, which nobody has decoded yet."""

    __slots__ = ("_untrusted", "_weight", "body", "buffers")

    def __init__(self, body: bytes | memoryview, weight: int, *, untrusted: bool) -> None:
        self.body = body
        self.buffers: list[memoryview] = []
        self._weight = weight
        self._untrusted = untrusted

    def __len__(self) -> int:
        """What it counts for in a stream's credit: see ``shmrpc_message_weight``."""
        return len(self.body) + self._weight

    def decode(self) -> Any:
        """The value; ValueError if it is none. What it consists of lives as long as it does."""
        return decode(self.body, self.buffers, untrusted=self._untrusted)

    def fill(self, slot: Any, message: Any) -> None:
        """Take the buffers out of the slot's message, from where an interruption left them."""
        take_buffers(self.buffers, slot, message, untrusted=self._untrusted)


def take_buffers(buffers: list[memoryview], slot: Any, message: Any, *, untrusted: bool) -> None:
    """Move the buffers of a slot's message that are not in the list yet to its end."""
    blocks = message.blocks
    for index in range(len(buffers), message.block_count):
        block = blocks[index]
        size, start = block.bytes, block.data
        if not block.lease:  # it lies in memory that the slot uses again
            view = memoryview(bytes(_buffer(start, size)))
        elif untrusted or block.loaned:  # or it could change before, or after, it is used
            view = memoryview(bytes(_buffer(start, size)))
            _free(_take(slot, index), ffi.NULL)
        else:
            free_after(start, partial(_free, _take(slot, index)))
            view = memoryview(_buffer(start, size)).toreadonly()
        buffers.append(view)


def value_of(slot: Any, message: Any, *, untrusted: bool) -> Any:
    """The value that a slot's message with ``SHMRPC_FLAG_BLOCKS`` is; ValueError if it is none."""
    buffers: list[memoryview] = []
    take_buffers(buffers, slot, message, untrusted=untrusted)
    return decode(_buffer(message.body, message.body_bytes), buffers, untrusted=untrusted)
