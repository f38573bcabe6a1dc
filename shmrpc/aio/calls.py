"""Open calls for asyncio: as ``shmrpc.Call``, with ``await`` wherever that may wait."""

from __future__ import annotations

import errno
import sys
import time
from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Any, Protocol

from shmrpc._native import lib
from shmrpc.codec import PACKING_ERRORS, pack_split
from shmrpc.errors import Cancelled, Error, ProtocolError
from shmrpc.opened import Opened
from shmrpc.parcels import Parcel
from shmrpc.poller import FOREVER, check_timeout
from shmrpc.session import Body, Stream

from .lending import attach
from .loop import LoopWaiters, check_loop, poller_of

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from types import TracebackType

    from shmrpc.poller import Connection

__all__ = ["AsyncReceiver", "Call", "send_item"]


class Channel(Protocol):
    """The client, as far as its calls need it."""

    _loop: AbstractEventLoop

    def _remote_error(
        self, connection: Connection, method: str, status: int, body: Body
    ) -> Error: ...


class AsyncReceiver:
    """Items of a stream, one by one."""

    def __init__(
        self, connection: Connection, stream: Stream, waiters: LoopWaiters, call_id: int, flags: int
    ) -> None:
        self.connection = connection
        self.stream = stream
        self.exhausted = False
        self._waiters = waiters
        self._call_id = call_id
        self._flags = flags
        self._items: Iterator[Any] = iter(())

    def ready(self) -> bool:
        """Whether ``next_until`` would not wait."""
        return bool(self.stream.runs) or self.stream.ended or self.stream.overrun

    def clear(self) -> None:
        """Drop what was not taken."""
        self._items = iter(())
        self.stream.runs.clear()

    async def next_until(self, deadline: float) -> Any:
        """The next item; StopAsyncIteration at the end, TimeoutError at the deadline."""
        for item in self._items:
            return item
        stream = self.stream
        if not self.ready() and not await self._waiters.wait(self.ready, deadline):
            raise TimeoutError
        if stream.cancelled and not stream.lost_error:
            stream.runs.clear()
        try:
            data, ends = stream.take()
        except IndexError:
            self.exhausted = True
            raise StopAsyncIteration from None
        if not stream.ended:
            credit = stream.due_credit()
            if credit:
                self.connection.send_now(
                    lib.SHMRPC_CREDIT, self._call_id, credit, flags=self._flags
                )
        if isinstance(data, Parcel):
            self._items = iter((self.connection.decode(data),))
        else:
            decode = self.connection.codec.decode
            starts = (0, *ends[:-1])
            items = [decode(data[start:end]) for start, end in zip(starts, ends)]  # type: ignore[index] # noqa: B905
            self._items = iter(items)
        return next(self._items)


async def send_item(
    connection: Connection,
    stream: Stream,
    call_id: int,
    flags: int,
    item: Any,
    may_send: Callable[[], bool],
    deadline: float,
) -> int:
    """Send one item when there is credit: 0, or -errno (-ETIMEDOUT without credit).

    It waits for room for what goes beside it, and raises as ``shmrpc.lending.attach``, or one of
    ``PACKING_ERRORS``.
    """
    waiters = stream.waiters
    if not isinstance(waiters, LoopWaiters):
        raise TypeError
    if not stream.may_send() and not await waiters.wait(may_send, deadline):
        return -errno.ETIMEDOUT
    if not stream.may_send():
        return 0  # over: the caller of this looks why
    slot = connection.slot()
    alive: Any = None  # until it was sent
    try:
        body, sources = pack_split(connection.codec, slot.pack_beside, item, slot.pack_lifted)
        if sources:
            alive = await attach(connection, slot.c, sources, deadline, "an item of a stream")
        size = len(body) + lib.shmrpc_attached_weight(slot.c)
        status = lib.shmrpc_send_item(slot.c, flags, call_id, body, len(body))
    except BaseException:
        slot.let_go()  # its packers may hold half a message
        raise
    connection.slots.append(slot)
    del alive
    if status >= 0:
        stream.sent(size)
        poller_of(connection).schedule()
        return 0
    return status


class _Nobody:
    """Who waits for a call that has not begun."""

    def wake(self) -> None:
        """There is nobody."""


class Call(Opened):
    """A call that is open: ``await send(...)``, ``async for`` over replies, ``await result()``.

    Leaving the ``async with`` block, ``aclose`` or dropping the last reference cancels the call
    unless it is over; so does cancelling a task that waits for it. Belongs to its client's loop.
    """

    def __init__(
        self,
        channel: Channel,
        method: str,
        begin: Callable[[Call], Awaitable[Any]],
        *,
        streams: bool,
    ) -> None:
        """``begin`` sends the request, when the call is awaited first, and attaches us."""
        self.method = method
        self.deadline = FOREVER  # time.monotonic() seconds, or infinity
        self._channel = channel
        self._begin: Callable[[Call], Awaitable[Any]] | None = begin
        self._instead: Any = None  # what an interceptor returned in our place
        self._streams = streams
        self._sends = not streams
        self._error: Exception | None = None
        self._closed = False
        self._attached = False  # to a connection
        self._observers: list[Callable[[BaseException | None], None]] = []
        self._connection: Connection
        self._receiver: AsyncReceiver
        self._stream = Stream(_Nobody())

    # ---- the beginning, for the channel ----

    def attach(self, connection: Connection, deadline: float) -> Call:
        """Belong to this connection from now on."""
        self._attached = True
        self.deadline = deadline
        self._connection = connection
        self._waiters = LoopWaiters(poller_of(connection).loop)
        self._stream = Stream(self._waiters)
        self.call_id = connection.session.next_id()
        self._receiver = AsyncReceiver(
            connection, self._stream, self._waiters, self.call_id, lib.SHMRPC_FLAG_CALLER
        )
        return self

    async def start(self) -> None:
        """Send the request, unless that was done."""
        begin, self._begin = self._begin, None
        if begin is None:
            return
        if self._closed:
            msg = f"the call of {self.method!r} was closed before it began"
            raise Cancelled(msg)
        try:
            result = await begin(self)
            if result is not self:
                self._instead = self._replies_of(result)
        except BaseException:
            self._close()  # it may have been sent
            raise

    def _replies_of(self, result: Any) -> AsyncIterator[Any]:
        if not hasattr(result, "__aiter__"):
            kind = type(result).__name__
            msg = f"an interceptor returned {kind} for {self.method!r}, not an async iterator"
            raise TypeError(msg)
        replies: AsyncIterator[Any] = result.__aiter__()
        return replies

    def _check_own(self) -> None:
        if self._instead is not None:
            msg = f"an interceptor answered {self.method!r}: there are its replies to iterate over"
            raise Error(msg)

    def register(self) -> None:
        """Take frames from now on."""
        self._connection.register(self.call_id, self._stream)

    def unregister(self) -> None:
        """It came to nothing: nobody has seen it."""
        self._connection.session.calls.pop(self.call_id, None)

    def _check_loop(self) -> None:
        if _get_running_loop() is not self._channel._loop:
            check_loop(self._channel._loop, repr(self))

    # ---- sending ----

    async def send(self, item: Any) -> None:
        """Send one message; as ``shmrpc.Call.send``. One task at a time."""
        self._check_loop()
        if self._begin is not None:
            await self.start()
        self._check_own()
        stream = self._stream
        if not self._sends or stream.ended or self._closed:
            self._refuse_send()

        def may_send() -> bool:
            return stream.may_send() or stream.ended or self._closed

        try:
            status = await self._cancelling(
                send_item(
                    self._connection,
                    stream,
                    self.call_id,
                    lib.SHMRPC_FLAG_CALLER,
                    item,
                    may_send,
                    self.deadline,
                )
            )
        except PACKING_ERRORS as error:
            raise self._unpackable(item, error) from error
        if status == -errno.ETIMEDOUT:
            raise self._late()
        if status == -errno.EMSGSIZE:
            raise self._too_long()
        if status < 0:
            await self._wait(lambda: stream.over)  # the connection has ended: learn how
        if stream.ended or self._closed:
            self._refuse_send()

    def _refuse_send(self) -> None:
        error = self._outcome() if self._stream.over else self._error
        if error is not None:
            raise error
        if not self._sends:
            msg = f"{self.method!r} was told by close_send() that nothing more comes"
            if self._streams:
                msg = f"stream() sends no messages to {self.method!r}; use open()"
            raise Error(msg)
        msg = f"the call of {self.method!r} is over, its handler takes no more messages"
        raise Error(msg)

    async def close_send(self) -> None:
        """Tell the handler that no more messages come. Replies can still be received."""
        self._check_loop()
        if self._begin is not None:
            await self.start()
        if not self._sends:
            return
        self._sends = False
        if self._attached and not self._stream.ended and not self._closed:
            self._connection.send_now(lib.SHMRPC_END, self.call_id)

    # ---- receiving ----

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._instead is not None:
            instead: AsyncIterator[Any] = self._instead.__aiter__()
            return instead
        if self._attached and self._receiver.exhausted:
            msg = f"the replies of {self.method!r} were iterated to their end already"
            raise Error(msg)
        return self

    async def __anext__(self) -> Any:
        if self._begin is not None:
            await self.start()
        if self._instead is not None:
            return await self._instead.__anext__()
        for item in self._receiver._items:
            return item
        self._check_loop()
        if self._closed and self._error is None:
            raise StopAsyncIteration
        if self._error is not None:
            raise self._error
        try:
            return await self._cancelling(self._receiver.next_until(self.deadline))
        except StopAsyncIteration:
            error = self._outcome()
            if error is not None:
                raise error from None
            reply = self._stream.reply
            if reply is not None and reply[2]:
                raise Error(self._streams_nothing()) from None
            raise
        except TimeoutError:
            raise self._late() from None
        except (ValueError, TypeError) as error:
            self.cancel()
            msg = f"{self._connection.peer} sent an item of {self.method!r} that is none: {error}"
            raise ProtocolError(msg) from error

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the handler's result; as ``shmrpc.Call.result``."""
        until = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        await self.close_send()
        self._check_own()
        if self._error is not None:
            raise self._error
        await self._wait(lambda: self._stream.over or bool(self._stream.runs), until)
        error = self._outcome() if self._stream.over else None
        if error is not None:
            raise error
        if self._stream.runs:
            msg = f"{self.method!r} streams its results: iterate over the call"
            raise Error(msg)
        body = self._stream.reply[2] if self._stream.reply is not None else b""
        if not body:
            return None
        try:
            return self._connection.decode(body)
        except (ValueError, TypeError) as reason:
            peer = self._connection.peer
            msg = f"{peer} sent a result of {self.method!r} that is none: {reason}"
            raise ProtocolError(msg) from reason

    def done(self) -> bool:
        """Whether the call is over, as far as the loop has seen."""
        return self._stream.over or self._closed

    @property
    async def initial_metadata(self) -> dict[str, str | bytes]:
        """``await call.initial_metadata``: what the handler sent before its first reply."""
        if self._begin is not None:
            await self.start()
        self._check_loop()
        self._check_own()
        stream = self._stream
        if self._error is None:
            await self._wait(
                lambda: stream.initial is not None or stream.received_messages != 0 or stream.over
            )
        return self.reply_metadata()[1]

    @property
    def trailing_metadata(self) -> dict[str, str | bytes]:
        """What the handler set for the end of the call. ``Error`` while the call is under way."""
        if self._stream.reply is None and not self.done():
            msg = f"the trailing metadata of {self.method!r} comes at the end of the call"
            raise Error(msg)
        return self.reply_metadata()[0]

    # ---- the end ----

    def cancel(self) -> bool:
        """Cancel the call; False if it is over. The handler is told, waits here raise."""
        if self._closed or self._stream.over:
            return False
        if not self._attached:
            self._closed = True
            return True
        self._give_up(Cancelled(f"the call of {self.method!r} was cancelled"))
        return True

    async def aclose(self) -> None:
        """Cancel the call unless it is over; iterating ends then."""
        self._check_loop()
        self._close()
        close = getattr(self._instead, "aclose", None)
        if close is not None:
            await close()

    def _close(self) -> None:
        if not self._closed and not self._stream.over and self._attached:
            self._give_up(None)
        self._closed = True

    def _give_up(self, error: Exception | None) -> None:
        self._error = error
        self._closed = True
        self._receiver.clear()
        self._connection.session.calls.pop(self.call_id, None)
        self._stream.ended = True
        self._connection.send_now(lib.SHMRPC_CANCEL, self.call_id)
        self._waiters.wake()
        self._ended(error or Cancelled(f"the call of {self.method!r} was closed"))

    async def _cancelling(self, waiting: Any) -> Any:
        """Await; if that is cancelled, the call is, too."""
        try:
            return await waiting
        except (Exception, StopAsyncIteration):
            raise
        except BaseException:
            self.cancel()
            raise

    async def _wait(self, ready: Callable[[], bool], until: float = FOREVER) -> None:
        limit = min(self.deadline, until)
        waiting = self._waiters.wait(lambda: ready() or self._closed, limit)
        if not await self._cancelling(waiting):
            if until < self.deadline and time.monotonic() >= until:
                raise self._no_result_yet()
            raise self._late()
        if self._error is not None:
            raise self._error

    def _late(self) -> Exception:
        error = self._past_deadline()
        if not self._closed:
            self._give_up(error)
        return error

    def _outcome(self) -> Exception | None:
        """How the call ended, once it has."""
        stream = self._stream
        if self._error is None and stream.overrun:
            self._give_up(self._overrun())
        elif self._error is None and stream.reply is not None:
            status, _, body = stream.reply
            if status != 0:
                self._error = self._channel._remote_error(
                    self._connection, self.method, status, body
                )
        elif self._error is None and stream.lost_error:
            self._error = self._connection.lost(stream.lost_error, stream.outcome, self.method)
        self._closed = True
        self._ended(self._error)
        return self._error

    async def __aenter__(self) -> Call:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not sys.is_finalizing() and not self.__dict__.get("_closed", True):
            self._close()

    def __repr__(self) -> str:
        state = "over" if self.done() else "open"
        return f"<shmrpc.aio.Call of {self.method!r} {state}>"
