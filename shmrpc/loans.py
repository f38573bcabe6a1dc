"""Memory of a connection's arena that users write to, and then send without a copy.

Where a connection has no shared memory, or not so much, it is ordinary memory, and sent as that.
"""

from __future__ import annotations

import errno
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from ._native import ffi, lib
from .lending import finding_room, meet_all, wants_room
from .owned import free_after

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lending import Steps
    from .poller import Connection

__all__ = ["borrow", "borrowing", "check_size", "empty", "making"]


def check_size(nbytes: Any) -> int:
    """Refuse what is no number of bytes."""
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
        msg = f"a loan is a number of bytes from 0 on, not {nbytes!r}"
        raise ValueError(msg)
    return nbytes


def borrow(connection: Connection, nbytes: int, deadline: float) -> memoryview:
    """A writable view of so many bytes; waits for room as ``lending.attach``, and raises so."""
    return meet_all(connection, borrowing(connection, check_size(nbytes), deadline))


def empty(connection: Connection, shape: Any, dtype: Any, deadline: float) -> Any:
    """The same as a numpy array."""
    return meet_all(connection, making(connection, shape, dtype, deadline))


def borrowing(connection: Connection, nbytes: int, deadline: float) -> Steps[memoryview]:
    """As ``borrow``, for who meets its needs in another way."""
    if not nbytes:
        return memoryview(bytearray())
    loan, data = ffi.new("shmrpc_loan **"), ffi.new("uint8_t **")
    slot = connection.slot()

    def attempt() -> int:
        status: int = lib.shmrpc_loan_new(slot.c, nbytes, loan, data)
        return status

    try:
        status = attempt()
        if wants_room(status):
            what = f"a loan of {nbytes} bytes"
            status = yield from finding_room(connection, nbytes, attempt, deadline, what)
    finally:
        connection.slots.append(slot)
    if status == 0:
        # Goes back when the last view of it dies, from whatever thread.
        start = data[0]
        free_after(start, partial(_give_back, loan[0], weakref.ref(connection)))
        return memoryview(ffi.buffer(start, nbytes))
    if status == -errno.ENOMEM:
        msg = f"no memory for a loan of {nbytes} bytes"
        raise MemoryError(msg)
    return memoryview(bytearray(nbytes))


def _give_back(
    loan: Any,
    connection: weakref.ref[Connection],
    data: Any,
    # Bound, because it also runs while the interpreter ends.
    free: Callable[[Any, Any], int] = lib.shmrpc_loan_free,
    tell: Callable[[Any, int], None] = lib.shmrpc_tell_blocks,
) -> None:
    """Free a loan, and tell who waits for room: the peer says nothing of what it never had."""
    if free(loan, data):
        here = connection()
        if here is not None and not here.closed:
            tell(here.poller.c, here.conn_id)


def making(connection: Connection, shape: Any, dtype: Any, deadline: float) -> Steps[Any]:
    """As ``empty``, for who meets its needs in another way."""
    try:
        from . import arrays
    except ImportError as error:
        msg = f"empty() makes a numpy array ({error}): pip install 'shmrpc[numpy]', or use loan()"
        raise ImportError(msg) from error
    nbytes, make = arrays.plan(shape, dtype)
    view = yield from borrowing(connection, nbytes, deadline)
    return make(view)
