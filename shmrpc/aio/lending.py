"""Buffers beside messages under asyncio: as ``shmrpc.lending``, and the loop goes on meanwhile.

What is copied is copied in the loop; for room a task waits, and further memory is made on a thread.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc import lending
from shmrpc.errors import Overloaded

from .loop import poller_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shmrpc.buffers import Source
    from shmrpc.lending import Need, Steps
    from shmrpc.poller import Connection

__all__ = ["attach", "meet_all", "meet_now"]

T = TypeVar("T")


async def attach(
    connection: Connection, slot: Any, sources: Sequence[Source], deadline: float, what: str
) -> list[Any]:
    """As ``shmrpc.lending.attach``. The slot has to stay the caller's meanwhile."""
    return await meet_all(connection, lending.attaching(connection, slot, sources, deadline, what))


async def meet_all(connection: Connection, steps: Steps[T]) -> T:
    """Do what is needed, until it is done."""
    try:
        need = next(steps)
        while True:
            try:
                status = await _meet(connection, need)
            except BaseException as error:
                need = steps.throw(error)
            else:
                need = steps.send(status)
    except StopIteration as end:
        result: T = end.value
        return result


def meet_now(connection: Connection, steps: Steps[T]) -> T:
    """The same in a callback, which can't wait: ``Overloaded`` if it would have to."""
    try:
        need = next(steps)
        while True:
            if need.until is None:
                status = lending.grow(connection, need.nbytes)
            elif need.until:
                steps.close()
                msg = f"no room for {need.nbytes} bytes now, and an inline method can't wait for it"
                raise Overloaded(msg)
            else:  # nor look what the peer has given back
                status = 0
            need = steps.send(status)
    except StopIteration as end:
        result: T = end.value
        return result


async def _meet(connection: Connection, need: Need) -> int:
    poller = poller_of(connection)
    if need.until is None:
        growing = poller.loop.run_in_executor(None, lending.grow, connection, need.nbytes)
        return await asyncio.shield(growing)
    if need.until and not await poller.blocks(connection, need.nbytes, need.until):
        return -errno.ETIMEDOUT
    # What has come is taken in the loop's turn, which it gets whatever the core says of room.
    poller.schedule()
    await asyncio.sleep(0)
    ended = connection.closed or connection.retired or not poller.active
    return -errno.EPIPE if ended else 0
