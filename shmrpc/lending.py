"""Buffers beside messages, as they are sent: in blocks of this side's arena.

The arena is the core's; here is what it can't do by itself: make a further segment when it needs
one, wait for what the peer gives back when it may not grow, and say who holds what when nothing
comes back.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from . import segments
from ._native import ffi, lib
from .buffers import Unwritten
from .errors import ConnectError, ConnectionLost, DeadlineExceeded, MessageTooLarge, Overloaded
from .poller import nanoseconds_until
from .tending import tend

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from typing import TypeAlias

    from .buffers import Source
    from .poller import Connection

__all__ = [
    "MEMORY_BYTES",
    "Need",
    "arena_stats",
    "attach",
    "attaching",
    "connection_stats",
    "finding_room",
    "grow",
    "meet_all",
    "total_stats",
    "wants_room",
]

T = TypeVar("T")

MEMORY_BYTES = 1 << 30  # of values under way on one connection, unless the user says otherwise
PATIENCE = 10.0  # seconds in which something comes back, for a call that waits for ever

_ARRAYS = f"{__package__}.arrays"  # imported if there is a numpy array

_COUNTERS = (
    "spins_hit",
    "spins_missed",
    "yields",
    "sleeps",
    "wakeups_sent",
    "frames_received",
    "frames_dropped",
    "late_replies",
    "outbox_bytes",
)
_INLINE, _LOANED = 1, 2
_GROW, _FULL, _STOPPED = lib.SHMRPC_GROW, lib.SHMRPC_FULL, lib.SHMRPC_STOPPED
_ENDED = frozenset((-errno.EPIPE, -errno.EPROTO, _STOPPED))
_OVER = frozenset((0, -errno.ETIMEDOUT, *_ENDED))


class Need(NamedTuple):
    """What has to happen before room for so many bytes is looked for again.

    The arena has to grow (``until`` is None), or the peer to give something back until then.
    Whoever meets it answers with 0 if that happened, else -errno.
    """

    nbytes: int
    until: float | None


if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Need, int, T]


def attach(
    connection: Connection, slot: Any, sources: Sequence[Source], deadline: float, what: str
) -> list[Any]:
    """Have the next message of this C slot carry these buffers.

    Waits for room until ``deadline``. Returns what has to live until the message was sent.
    Raises ``DeadlineExceeded`` or ``Overloaded`` if there is no room for ``what``, naming who holds
    it, ``MessageTooLarge``, MemoryError. On a lost connection sending fails, and says how.
    """
    return meet_all(connection, attaching(connection, slot, sources, deadline, what))


def meet_all(connection: Connection, steps: Steps[T]) -> T:
    """Do what is needed, in this thread, until it is done."""
    try:
        need = next(steps)
        while True:
            try:
                if need.until is None:
                    status = grow(connection, need.nbytes)
                else:
                    status = _wait(connection, need.nbytes, need.until)
            except BaseException as error:
                need = steps.throw(error)
            else:
                need = steps.send(status)
    except StopIteration as end:
        result: T = end.value
        return result


# ---- what is done, and needed ----


def attaching(
    connection: Connection, slot: Any, sources: Sequence[Source], deadline: float, what: str
) -> Steps[list[Any]]:
    """As ``attach``, for who meets its needs in another way."""
    alive: list[Any] = []
    lib.shmrpc_attach(slot, ffi.NULL, 0)
    try:
        for source in sources:
            if isinstance(source, Unwritten):
                yield from _attach_unwritten(connection, slot, source, alive, deadline, what)
            else:
                data = ffi.from_buffer(source)
                status = yield from _attach(connection, slot, data, len(data), deadline, what)
                if status == _INLINE:
                    alive.append(data)
                elif status == _LOANED:
                    arrays = sys.modules.get(_ARRAYS)
                    if arrays is not None:
                        arrays.freeze(source)
    except BaseException:
        lib.shmrpc_detach(slot)
        raise
    return alive


def _attach(
    connection: Connection, slot: Any, data: Any, size: int, deadline: float, what: str
) -> Steps[int]:
    """``_INLINE`` if it goes with the body, ``_LOANED`` if it lies in a loan."""
    status: int = lib.shmrpc_attach(slot, data, size)
    if wants_room(status):
        status = yield from finding_room(
            connection, size, lambda: lib.shmrpc_attach(slot, data, size), deadline, what
        )
        if status in _ENDED or wants_room(status):
            status = lib.shmrpc_attach_inline(slot, data, size)
    if status == -errno.EMSGSIZE:
        msg = f"{what} has more buffers than a message can: 65536, or 4 GiB outside of an arena"
        raise MessageTooLarge(msg)
    if status == -errno.ENOMEM:
        msg = f"no memory for {what}, with a buffer of {size} bytes"
        raise MemoryError(msg)
    return status


def _attach_unwritten(
    connection: Connection,
    slot: Any,
    source: Unwritten,
    alive: list[Any],
    deadline: float,
    what: str,
) -> Steps[None]:
    """Write it where it is to lie, if that is in the arena."""
    size = source.nbytes
    loan, data = ffi.new("shmrpc_loan **"), ffi.new("uint8_t **")

    def borrow() -> int:
        status: int = lib.shmrpc_loan_new(slot, size, loan, data)
        return status

    status = borrow()
    if wants_room(status):
        status = yield from finding_room(connection, size, borrow, deadline, what)
    if status == 0:
        try:
            source.write(memoryview(ffi.buffer(data[0], size)))
            yield from _attach(connection, slot, data[0], size, deadline, what)
        finally:
            lib.shmrpc_loan_free(loan[0], ffi.NULL)
        return
    if status == -errno.ENOMEM:
        msg = f"no memory for {what}, with a buffer of {size} bytes"
        raise MemoryError(msg)
    room = bytearray(size)
    source.write(memoryview(room))
    copy = ffi.from_buffer(room)
    alive.append(copy)
    lib.shmrpc_attach_inline(slot, copy, size)


# ---- room ----


def wants_room(status: int) -> bool:
    """Whether the core has said that there is no room."""
    return status in (_GROW, _FULL)


def finding_room(
    connection: Connection, size: int, attempt: Callable[[], int], deadline: float, what: str
) -> Steps[int]:
    """Attempt again after growing, or waiting: its status, ``SHMRPC_GROW`` if growing failed."""
    yield Need(size, 0)  # take in what the peer has given back without ringing
    patience = time.monotonic() + PATIENCE
    while True:
        status = attempt()
        if status == _GROW:
            if (yield Need(size, None)) < 0:
                return status
        elif status == _FULL:
            waited = yield Need(size, min(deadline, patience))
            if waited in _ENDED:
                return waited
            if waited == 0:
                patience = time.monotonic() + PATIENCE
            elif time.monotonic() >= deadline:
                raise DeadlineExceeded(_full(connection, size, what))
            elif time.monotonic() >= patience:
                raise Overloaded(_full(connection, size, what))
        else:
            return status


def _wait(connection: Connection, size: int, deadline: float) -> int:
    try:
        slot = connection.slot()
    except ConnectionLost:
        return -errno.EPIPE
    try:
        status: int = lib.shmrpc_wait_blocks(slot.c, size, nanoseconds_until(deadline))
        while status not in _OVER:
            connection.poller.attend(status)
            status = lib.shmrpc_wait(slot.c)
    except BaseException:
        lib.shmrpc_abandon(slot.c)
        raise
    connection.slots.append(slot)
    return status


def grow(connection: Connection, size: int) -> int:
    """Add a segment to the arena; below 0 if there is no memory, or the peer can't take it."""
    try:
        slot = connection.slot()
        with connection.growing:
            wants = lib.shmrpc_arena_wants(slot.c, size)
            if wants:  # else another thread has been faster
                _add_segment(connection, slot.c, wants)
    except (ConnectError, ConnectionLost, OSError):
        return -errno.ENOMEM
    connection.slots.append(slot)
    if not connection.tended:
        tend(connection)
    return 0


def _add_segment(connection: Connection, slot: Any, nbytes: int) -> None:
    segment = segments.create(nbytes, connection.backing, trusted=connection.trusted)
    try:
        memory = lib.shmrpc_memory_map(segment.own_fd, nbytes)
        if memory == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        status = -errno.EPERM
        try:
            segment.seal()
            status = lib.shmrpc_arena_add(slot, memory, segment.peer_fd)
        finally:
            if status < 0:
                lib.shmrpc_memory_unmap(memory)
        if status < 0 and status != -errno.ENOSPC:
            raise OSError(-status, os.strerror(-status))
    finally:
        segment.close()


# ---- who holds what ----


def arena_stats(connection: Connection) -> dict[str, int | float]:
    """What of both arenas is there, in use, lent and pinned; bytes, numbers and seconds."""
    stats = ffi.new("shmrpc_arena_stats *")
    lib.shmrpc_arena_stats_of(connection.poller.c, connection.conn_id, stats)
    return {
        "arena_bytes": int(stats.bytes),
        "arena_used_bytes": int(stats.used_bytes),
        "lent_blocks": int(stats.lent_blocks),
        "lent_bytes": int(stats.lent_bytes),
        "lent_oldest_s": stats.oldest_ns / 1e9,
        "loans": int(stats.loans),
        "loan_bytes": int(stats.loan_bytes),
        "returned_blocks": int(stats.returned),
        "returned_bytes": int(stats.returned_bytes),
        "peer_arena_bytes": int(stats.peer_bytes),
        "pinned_blocks": int(stats.leases),
        "pinned_bytes": int(stats.leased_bytes),
    }


def connection_stats(connection: Connection) -> dict[str, int | float]:
    """Counters of a client's connection: how it waits, its frames, and its arenas."""
    counters = connection.poller.stats()
    return {**{name: counters[name] for name in _COUNTERS}, **arena_stats(connection)}


def total_stats(connections: Sequence[Connection]) -> dict[str, int | float]:
    """The same over all of them; the oldest block of any."""
    total: dict[str, int | float] = {}
    for stats in map(arena_stats, connections):
        for name, value in stats.items():
            before = total.get(name, 0)
            total[name] = max(before, value) if name == "lent_oldest_s" else before + value
    return total


def _full(connection: Connection, size: int, what: str) -> str:
    stats = arena_stats(connection)
    return (
        f"{what} needs a block of {size} bytes, and the {connection.max_memory_bytes} bytes of "
        f"shared memory for values to {connection.peer} are in use: that holds "
        f"{stats['lent_blocks']} blocks of {stats['lent_bytes']} bytes, the oldest for "
        f"{stats['lent_oldest_s']:.1f} s; {stats['loan_bytes']} bytes are loans of this process, "
        f"{stats['returned_bytes']} bytes values that came back to it and that it keeps. "
        "Let go of received values earlier, or raise max_memory_bytes on both sides"
    )
