"""A unary call of an event loop that waits for its reply."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shmrpc.session import NOT_SENT, Body

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextvars import Context

    from shmrpc.poller import Connection
    from shmrpc.session import Body

__all__ = ["Pending", "Probe"]


class Pending:
    """What the call needs when the reply comes, and what its task awaits.

    To the task it looks like a future, with one difference: whoever takes a batch of replies from
    the poller, as a callback of the loop, runs the task on at once (``run_on``). A future would
    have the loop do it, which costs as much as all the rest of receiving a reply.
    """

    _asyncio_future_blocking = True  # how a task knows what it may wait for
    position: Sequence[int] = NOT_SENT  # see the core's shmrpc_outcome_of
    status = -1  # gRPC status number, once it is there
    error: int | Exception = 0  # errno that ended the connection; why it is no result
    result_value: Any = None
    body: Body | None = None  # of a reply that was not decoded when it came
    metadata = b""
    _callback: Callable[[Any], None] | None = None
    _context: Context | None = None
    _cancelled: asyncio.CancelledError | None = None

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.connection = connection
        self.call_id = connection.session.new_id()
        self._loop = loop

    def register(self) -> None:
        """Take the reply from now on."""
        self.connection.register(self.call_id, self)

    def unregister(self) -> None:
        """Take it no more."""
        self.connection.session.calls.pop(self.call_id, None)

    # ---- what becomes of it ----

    def replied(self, status: int, metadata: bytes, body: Body) -> None:
        """The reply is there."""
        self.status, self.metadata, self.body = status, metadata, body
        self.wake()

    def lost(self, error: int) -> None:
        """The connection has ended."""
        self.error = error
        self.status = self.connection.outcome(self.call_id, self.position[0])
        self.wake()

    def wake(self) -> None:
        """Let its task run on, if that waits."""
        callback, self._callback = self._callback, None
        if callback is not None:
            self._loop.call_soon(callback, self, context=self._context)

    def run_on(self) -> None:
        """The same at once: in a callback of the loop, where no task runs."""
        callback, self._callback = self._callback, None
        if callback is not None and self._context is not None:
            self._context.run(callback, self)

    # ---- what the task needs of it ----

    def __await__(self) -> Generator[Any, None, None]:
        if self.status < 0:
            yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of its task."""
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], None], *, context: Context) -> None:
        """Run the task on by this."""
        self._callback, self._context = callback, context
        if self.status >= 0:  # it came between the first step of a coroutine and its task
            self.wake()

    def cancel(self, msg: Any = None) -> bool:
        """Make the task go on with ``CancelledError``; False if it goes on by itself."""
        if self._callback is None:
            return False
        self._cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self.wake()
        return True

    def result(self) -> None:
        """Raise what the task is to be told."""
        if self._cancelled is not None:
            raise self._cancelled


class Probe(Pending):
    """A ping: its reply has no body."""
