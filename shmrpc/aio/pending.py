"""A unary call of an event loop that waits for its reply."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shmrpc.session import NOT_SENT

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextvars import Context

    from typing_extensions import Self

    from shmrpc.poller import Connection
    from shmrpc.session import Body

__all__ = ["NO_VALUE", "Pending", "Probe"]

NO_VALUE: Any = object()


class Pending:
    """What the call needs when the reply comes, and what its task awaits.

    To the task it looks like a future, with one difference: whoever takes a batch of replies from
    the poller, as a callback of the loop, runs the task on at once. A future would have the loop do
    it, which costs as much as all the rest of receiving a reply.
    """

    connection: Connection
    call_id: int
    _loop: asyncio.AbstractEventLoop
    _asyncio_future_blocking = True  # how a task knows what it may wait for
    position: Sequence[int] | None = None  # see the core's shmrpc_outcome_of
    sent_at = NOT_SENT[0]  # the same, as far as it is known without that
    status = -1  # gRPC status number, once it is there
    error: int | Exception = 0  # errno that ended the connection; why it is no result
    value: Any = NO_VALUE  # the result
    body: Body | None = None  # of a reply that was not decoded when it came
    metadata = b""
    callback: Callable[[Any], None] | None = None  # runs the task on ...
    context: Context | None = None  # ... in this context

    # No __init__: to call that would take longer than all that it did.

    @classmethod
    def of(cls, connection: Connection, loop: asyncio.AbstractEventLoop) -> Self:
        """One for the next call on this connection."""
        pending = cls()
        pending.connection, pending._loop = connection, loop
        pending.call_id = connection.session.next_id()
        return pending

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
        position = self.sent_at if self.position is None else self.position[0]
        self.status = self.connection.outcome(self.call_id, position)
        self.wake()

    def wake(self) -> None:
        """Let its task run on, if that waits. Who takes a batch calls ``callback`` instead."""
        callback, self.callback = self.callback, None
        if callback is not None:
            self._loop.call_soon(callback, self, context=self.context)

    # ---- what the task needs of it ----

    def __await__(self) -> Generator[Any, Any, Any]:
        # Not a generator: this one has no Python frame of its own.
        return iter((self,))  # type: ignore[return-value]

    def add_done_callback(self, callback: Callable[[Any], None], *, context: Context) -> None:
        """Run the task on by this."""
        self.callback, self.context = callback, context
        if self.status >= 0:  # it came between the first step of a coroutine and its task
            self.wake()

    def cancel(self, msg: Any = None) -> bool:
        """Make the task go on with ``CancelledError``; False if it goes on by itself."""
        if self.callback is None:
            return False
        self._cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self.result = self._raise_cancelled
        self.wake()
        return True

    def _raise_cancelled(self) -> None:
        error = self._cancelled
        del self.result, self._cancelled
        try:
            raise error
        finally:
            del error  # whose traceback has this frame

    # Called when the task runs on: nothing to raise, and no Python call, unless it was cancelled.
    result: Callable[[], Any] = bool


class Probe(Pending):
    """A ping: its reply has no body."""


# CPython keeps attributes in the object, without a dict, if the first instances of its class had
# them all. The first ones may be many calls that nobody has answered yet: then all that is set when
# a reply comes would cost every call of the process a dict.
_first = Pending()
for _name in ("_asyncio_future_blocking", "sent_at", "status", *Pending.__annotations__):
    setattr(_first, _name, None)
del _first, _name
