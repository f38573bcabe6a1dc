"""Memory that values are made of: ``Buffer`` for users, ``Unwritten`` for what is copied late.

Pure: what to do with a block of shared memory, and when it goes back, is for others.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Buffer", "Source", "Unwritten", "flat"]


class Buffer:
    """Bytes of any length that arrive as a ``Buffer``: without a copy if they are many.

    Wraps, and does not copy, what has the buffer protocol and is contiguous: bytes, bytearray,
    memoryview, array.array, mmap, numpy arrays. One that was received is read-only and keeps the
    shared memory that it lies in occupied until it and all views of it are gone, or ``release``
    or the end of its ``with`` block. From Python 3.12 on it has the buffer protocol itself.
    """

    __slots__ = ("__weakref__", "_view")

    def __init__(self, data: Any) -> None:
        """Wrap this memory. TypeError without buffer protocol, ValueError if not contiguous."""
        view = memoryview(data)
        if not view.c_contiguous:
            msg = "a Buffer needs contiguous memory; copy it first, such as with bytes()"
            raise ValueError(msg)
        self._view = flat(view)

    @property
    def view(self) -> memoryview:
        """Its bytes as a flat memoryview of format ``B``; ValueError once it is released."""
        return self._view[:]

    @property
    def nbytes(self) -> int:
        """How many bytes; ValueError once it is released."""
        return self._view.nbytes

    def release(self) -> None:
        """Give the memory back now. BufferError while somebody still uses a view of it."""
        self._view.release()

    def __len__(self) -> int:
        return self._view.nbytes

    def __bytes__(self) -> bytes:
        return bytes(self._view)

    if sys.version_info >= (3, 12):

        def __buffer__(self, flags: int) -> memoryview:
            return self.view

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        try:
            return f"<shmrpc.Buffer of {self._view.nbytes} bytes>"
        except ValueError:
            return "<shmrpc.Buffer, released>"


class Unwritten(NamedTuple):
    """A buffer that has still to be made: by one copy, into wherever it is to lie.

    ``write(target)`` fills a writable memoryview of ``nbytes`` bytes, format ``B``.
    """

    nbytes: int
    write: Callable[[memoryview], None]


# What a message's buffers come from: memory of the caller's, to be copied, or to be written.
Source: TypeAlias = memoryview | Unwritten


def flat(view: memoryview) -> memoryview:
    """The bytes of a contiguous view, without a copy where Python can do it."""
    if view.format == "B" and view.ndim == 1:
        return view
    try:
        return view.cast("B")
    except TypeError:  # of a format that memoryview does not know
        return memoryview(view.tobytes())
