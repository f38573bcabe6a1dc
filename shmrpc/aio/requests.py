"""The caller's messages, as handlers of an event loop with ``requests=True`` get them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shmrpc.errors import Cancelled, Error, ProtocolError
from shmrpc.poller import FOREVER

from .calls import AsyncReceiver
from .loop import LoopWaiters

if TYPE_CHECKING:
    from shmrpc.session import Stream

    from .incoming import Incoming

__all__ = ["AsyncRequests", "ThreadRequests"]


class AsyncRequests:
    """The caller's messages, as an async handler with ``requests=True`` gets them.

    Raises ``Cancelled`` when the caller has given up or is gone, if the handler's task has not
    been cancelled by then.
    """

    def __init__(self, call: Incoming, stream: Stream) -> None:
        waiters = stream.waiters
        if not isinstance(waiters, LoopWaiters):
            raise TypeError
        self._receiver = AsyncReceiver(call.connection, stream, waiters, call.call_id, 0)

    def __aiter__(self) -> AsyncRequests:
        if self._receiver.exhausted:
            msg = "the caller's messages were iterated to their end already, and are gone"
            raise Error(msg)
        return self

    async def __anext__(self) -> Any:
        receiver = self._receiver
        try:
            return await receiver.next_until(FOREVER)
        except StopAsyncIteration:
            if receiver.stream.overrun:
                msg = "the caller sent more than it had credit for"
                raise ProtocolError(msg) from None
            if receiver.stream.cancelled:
                msg = f"{receiver.connection.peer} does not wait for this call any more"
                raise Cancelled(msg) from None
            raise


class ThreadRequests:
    """The same for a plain function, which runs on a thread."""

    def __init__(self, requests: AsyncRequests, loop: asyncio.AbstractEventLoop) -> None:
        self._requests = requests
        self._loop = loop

    def __iter__(self) -> ThreadRequests:
        self._requests.__aiter__()
        return self

    def __next__(self) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(self._requests.__anext__(), self._loop).result()
        except StopAsyncIteration:
            raise StopIteration from None
