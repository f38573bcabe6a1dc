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
from .values import decode

__all__ = ["Parcel", "parcel_of"]

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
        for index in range(len(self.buffers), message.block_count):
            block = message.blocks[index]
            size = block.bytes
            if not block.lease:  # it lies in memory that the slot uses again
                view = memoryview(bytes(ffi.buffer(block.data, size)))
            elif self._untrusted or block.loaned:  # or it could change before, or after, it is used
                view = memoryview(bytes(ffi.buffer(block.data, size)))
                _free(_take(slot, index), ffi.NULL)
            else:
                data = ffi.gc(block.data, partial(_free, _take(slot, index)), size)
                view = memoryview(ffi.buffer(data, size)).toreadonly()
            self.buffers.append(view)


def parcel_of(slot: Any, message: Any, body: bytes | memoryview, *, untrusted: bool) -> Parcel:
    """All of a slot's message that has ``SHMRPC_FLAG_BLOCKS``."""
    parcel = Parcel(body, lib.shmrpc_message_weight(message), untrusted=untrusted)
    parcel.fill(slot, message)
    return parcel
