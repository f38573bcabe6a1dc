"""The caller's messages, as handlers of an event loop with ``requests=True`` get them."""

from __future__ import annotations

import concurrent.futures.thread  # whose hook has to be there before ours
import functools
import threading
from typing import TYPE_CHECKING, Any

from shmrpc.errors import Cancelled, Error, ProtocolError
from shmrpc.poller import FOREVER

from .calls import AsyncReceiver
from .loop import LoopWaiters

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine

    from shmrpc.session import Stream

    from .incoming import Incoming

__all__ = ["AsyncRequests", "ThreadRequests", "wait_for_loop"]

# What threads of handlers wait for. A loop that was closed meanwhile never answers.
_waiting: set[concurrent.futures.Future[Any]] = set()


def wait_for_loop(
    loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, Any]]
) -> Any:
    """Run ``make()`` in the loop and return its result; for a thread of a handler.

    ``Cancelled`` if the loop ends before.
    """
    waiting: concurrent.futures.Future[Any] = concurrent.futures.Future()
    _waiting.add(waiting)
    try:
        try:
            loop.call_soon_threadsafe(_begin, loop, make, waiting)
        except RuntimeError:  # it is closed
            raise _cancelled() from None
        return waiting.result()
    finally:
        _waiting.discard(waiting)
        del waiting  # it has the error, whose traceback has this frame, and what the handler holds


def _begin(
    loop: asyncio.AbstractEventLoop,
    make: Callable[[], Coroutine[Any, Any, Any]],
    waiting: concurrent.futures.Future[Any],
) -> None:
    loop.create_task(make()).add_done_callback(functools.partial(_settle, waiting))


def _settle(waiting: concurrent.futures.Future[Any], task: asyncio.Task[Any]) -> None:
    error = _cancelled() if task.cancelled() else task.exception()
    if waiting.done():
        return
    if error is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(task.result())


def _cancelled() -> Cancelled:
    return Cancelled("the event loop that this call belongs to has ended")


def _release_threads() -> None:
    """At the end of the interpreter, which waits for the threads of handlers."""
    for waiting in list(_waiting):
        if not waiting.done():
            waiting.set_exception(_cancelled())


threading._register_atexit(_release_threads)  # type: ignore[attr-defined]


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
            return wait_for_loop(self._loop, self._requests.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
