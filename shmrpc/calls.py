"""Open calls as callers see them: messages out, replies in."""

from __future__ import annotations

import errno
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from ._native import lib
from .codec import PACKING_ERRORS, MsgpackCodec, pack_lifted
from .errors import (
    Cancelled,
    Error,
    ForkedError,
    ProtocolError,
)
from .lending import attach
from .opened import Opened
from .poller import FOREVER, Connection, Waiters, check_timeout
from .receiving import Late, Receiver
from .session import Body, Stream
from .values import LARGE, NOT_PLAIN, NotPlain, may_hold_large

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import NoReturn

    from .buffers import Source
    from .poller import Slot

__all__ = ["Call"]

_EPIPE, _EMSGSIZE, _ETIMEDOUT = errno.EPIPE, errno.EMSGSIZE, errno.ETIMEDOUT
_FROM_CALLER = lib.SHMRPC_FLAG_CALLER
_send_item = lib.shmrpc_send_item


class Channel(Protocol):
    """The client, as far as its calls need it."""

    _closed: bool

    def _remote_error(
        self, connection: Connection, method: str, status: int, body: Body
    ) -> Error: ...


class Call(Opened):
    """A call that is open: messages go out by ``send``, replies come by iterating or ``result``.

    Leaving the ``with`` block, ``close``, or dropping the last reference cancels the call unless
    it is over. One thread may send while another one receives. Items that wait to be received are
    bounded: a server that sends faster waits, and holds up no other call.
    """

    def __init__(
        self,
        channel: Channel,
        connection: Connection,
        method: str,
        deadline: float,
        *,
        streams: bool,
    ) -> None:
        self.method = method
        self.deadline = deadline  # time.monotonic() seconds, or infinity
        self._channel = channel
        self._connection = connection
        self._waiters = Waiters()
        self._stream = Stream(self._waiters)
        self._call_id = connection.session.next_id()
        self._receiver = Receiver(
            connection, self._stream, self._waiters, self._call_id, lib.SHMRPC_FLAG_CALLER
        )
        self._plain = type(connection.codec) is MsgpackCodec
        self._streams = streams  # by client.stream(): it has nothing to send
        self._sends = not streams
        self._send_lock = threading.Lock()
        self._beside = False  # the last message had buffers, and so may the next
        self._closed = False  # given up by this side
        self._error: Exception | None = None  # why; None: it was closed
        self._failure: Exception | None = None  # how it ended by itself
        self._observers: list[Callable[[BaseException | None], None]] = []

    # ---- the beginning, for the channel ----

    @property
    def call_id(self) -> int:
        """Its number on this connection."""
        return self._call_id

    def register(self) -> None:
        """Take frames from now on."""
        self._connection.register(self._call_id, self._stream)

    def unregister(self) -> None:
        """It came to nothing: nobody has seen it."""
        self._connection.session.calls.pop(self._call_id, None)
        self._closed = True

    # ---- sending ----

    def send(self, item: Any) -> None:
        """Send one message. Waits while the handler is behind by a window of messages.

        The item is copied, and has left this process on return. Raises the error that ended the
        call if it has ended, ``Error`` after ``close_send`` and where the handler takes no more,
        TypeError or ValueError for what can't be sent, ``MessageTooLarge``, ``DeadlineExceeded``.
        """
        connection, stream = self._connection, self._stream
        if connection.poller.forked:
            self._check_fork()
        with self._send_lock:
            if stream.ended or self._closed or not self._sends:
                self._refuse_send()
            slot = connection.slot()
            beside: Any = self._beside
            try:
                body = slot.pack_lifted(item) if beside else slot.pack(item)
                if len(body) >= LARGE and self._plain and not beside and may_hold_large(body):
                    raise NotPlain
            except NOT_PLAIN:
                body, *beside = self._pack_beside(slot, item)  # has to live until it was sent
            except PACKING_ERRORS as error:
                slot.let_go()  # its packers may hold half a message
                raise self._unpackable(item, error) from error
            size = len(body)
            if not stream.may_send():
                self._wait_for_credit(slot)
            if beside:
                size, status = self._send_beside(slot, body)
            else:
                # Stream.sent written out, as _check_fork above: together 0.2 us of 1.3.
                stream.sent_messages += 1
                stream.sent_bytes += size
                status = _send_item(slot.c, _FROM_CALLER, self._call_id, body, size)
            if status > 0:
                # Nobody but this thread may be there to see to the rest.
                status = self._guard(lambda: connection.flush(slot, self.deadline))  # noqa: F821
            connection.slots.append(slot)
            if status == 0:
                return
            if status == -errno.ENOMEM:
                stream.not_sent(size)
                msg = f"no memory to send a message for {self.method!r}"
                raise MemoryError(msg)
            if status == -_EMSGSIZE:
                stream.not_sent(size)
                raise self._too_long()
        del slot  # the frames of an exception that somebody keeps would keep the connection
        if status == -_ETIMEDOUT:
            raise self._late()
        self._wait(lambda: stream.over)  # the connection has ended: learn how
        self._refuse_send()

    def _wait_for_credit(self, slot: Slot) -> None:
        stream = self._stream
        try:
            self._wait(lambda: stream.may_send() or stream.ended)
            if stream.ended or self._closed:
                self._refuse_send()
        except BaseException:
            lib.shmrpc_detach(slot.c)  # somebody may keep our frame
            raise

    def _send_beside(self, slot: Slot, body: bytes) -> tuple[int, int]:
        """Send a message that may have buffers: what it counts for, and the status."""
        weight = lib.shmrpc_attached_weight(slot.c)
        self._beside = weight != 0
        size = len(body) + weight
        self._stream.sent(size)
        return size, _send_item(slot.c, _FROM_CALLER, self._call_id, body, len(body))

    def _pack_beside(self, slot: Slot, item: Any) -> tuple[bytes, Any]:
        """Pack an item with buffers, and attach these; waits for room for them."""
        connection = self._connection
        what = f"a message for {self.method!r}"
        try:
            body, sources = self._split(slot, item)
        except PACKING_ERRORS as error:
            slot.let_go()  # its packers may hold half a message
            raise self._unpackable(item, error) from error
        if not sources:
            return body, None
        try:
            return body, self._guard(
                lambda: attach(connection, slot.c, sources, self.deadline, what)
            )
        except BaseException:
            connection.slots.append(slot)
            raise

    def _split(self, slot: Slot, item: Any) -> tuple[bytes, Sequence[Source]]:
        return pack_lifted(slot.pack_lifted, item)

    def _check_sending(self) -> None:
        if self._stream.ended or self._closed:
            self._refuse_send()

    def _refuse_send(self) -> NoReturn:
        error = self._outcome() if self._stream.over else self._error
        if error is not None:
            raise error
        if self._streams:
            msg = f"stream() sends no messages to {self.method!r}; use open()"
        elif not self._sends:
            msg = f"{self.method!r} was told by close_send() that nothing more comes"
        elif self._closed:
            msg = f"the call of {self.method!r} was closed"
        else:
            msg = f"the call of {self.method!r} is over, its handler takes no more messages"
        raise Error(msg)

    def close_send(self) -> None:
        """Tell the handler that no more messages come. Replies can still be received."""
        self._close_send(FOREVER)

    def _close_send(self, until: float) -> None:
        self._check_fork()
        # Another thread may be sending, and wait for credit.
        left = -1 if until == FOREVER else max(0.0, until - time.monotonic())
        if not self._send_lock.acquire(timeout=left):
            raise self._no_result_yet()
        try:
            if self._sends and not self._stream.ended and not self._closed:
                self._connection.send_now(lib.SHMRPC_END, self._call_id)
            self._sends = False
        finally:
            self._send_lock.release()

    # ---- receiving ----

    def __iter__(self) -> Call:
        if self._receiver.exhausted:
            msg = f"the replies of {self.method!r} were iterated to their end already"
            raise Error(msg)
        return self

    def __next__(self) -> Any:
        for item in self._receiver._items:
            return item
        return self._next()

    def _next(self) -> Any:
        self._check_fork()
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StopIteration
        try:
            return self._guard(lambda: self._receiver.next_until(self.deadline))
        except StopIteration:
            error = self._outcome()
            if error is not None:
                raise error from None
            reply = self._stream.reply
            if reply is not None and reply[2]:
                raise Error(self._streams_nothing()) from None
            raise
        except Late:
            raise self._late() from None
        except ProtocolError as error:
            self._give_up(error)
            raise

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the handler's result and return it. Sends no more messages from now on.

        ``timeout`` in seconds bounds this wait alone: it raises TimeoutError and the call goes
        on. Raises what ``call`` would. For a method that streams its results, iterate instead.
        """
        until = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        self._close_send(until)
        if self._error is not None:
            raise self._error
        stream = self._stream
        self._wait(lambda: stream.over or self._receiver.pending(), until)
        error = self._outcome() if stream.over else None
        if error is not None:
            raise error
        if self._receiver.pending():
            msg = f"{self.method!r} streams its results: iterate over the call"
            raise Error(msg)
        if stream.reply is None:
            msg = f"the call of {self.method!r} was closed before its result came"
            raise Cancelled(msg)
        body = stream.reply[2]
        if not body:
            return None
        try:
            return self._connection.decode(body)
        except (ValueError, TypeError) as reason:
            peer = self._connection.peer
            msg = f"{peer} sent a result of {self.method!r} that is none: {reason}"
            raise ProtocolError(msg) from reason

    def done(self) -> bool:
        """Whether the call is over. Takes what has arrived into account."""
        self._check_fork()
        if not self._stream.over and not self._closed:
            self._connection.poller.wait_until(
                self._connection, self._waiters, lambda: self._stream.over, 0
            )
        return self._stream.over or self._closed

    @property
    def initial_metadata(self) -> dict[str, str | bytes]:
        """What the handler sent before its first reply. Waits until that is known."""
        stream = self._stream
        self._check_fork()
        if self._error is None:
            self._wait(
                lambda: stream.initial is not None or stream.received_messages != 0 or stream.over
            )
        return self.reply_metadata()[1]

    @property
    def trailing_metadata(self) -> dict[str, str | bytes]:
        """What the handler set for the end of the call. ``Error`` while the call is under way."""
        if self._stream.reply is None:
            if self.done():
                return {}
            msg = f"the trailing metadata of {self.method!r} comes at the end of the call"
            raise Error(msg)
        return self.reply_metadata()[0]

    # ---- the end ----

    def cancel(self) -> bool:
        """Cancel the call; False if it is over. The handler is told, waits here raise."""
        if self._closed or self._stream.over:
            return False
        self._give_up(Cancelled(f"the call of {self.method!r} was cancelled"))
        return True

    def close(self) -> None:
        """Cancel the call unless it is over; iterating ends then."""
        if self._stream.over:
            self._outcome()
        elif not self._closed:
            self._give_up(None)
        self._closed = True
        self._receiver.clear()

    def _give_up(self, error: Exception | None) -> None:
        self._error = error
        self._closed = True
        self._connection.session.calls.pop(self._call_id, None)
        self._receiver.clear()
        self._stream.ended = True
        self._connection.send_now(lib.SHMRPC_CANCEL, self._call_id)
        self._waiters.wake()
        self._ended(error or Cancelled(f"the call of {self.method!r} was closed"))

    def _guard(self, wait: Callable[[], Any]) -> Any:
        """Wait, and cancel the call if that is interrupted (Ctrl-C)."""
        try:
            return wait()
        except (StopIteration, Late, Error):
            raise
        except BaseException:
            self.cancel()
            raise

    def _wait(self, ready: Callable[[], bool], until: float = FOREVER) -> None:
        """Wait until ``ready()`` or the end; raises what this side has given the call up with."""

        def ended() -> bool:
            return ready() or self._closed

        poller = self._connection.poller
        limit = min(self.deadline, until)
        if not ended() and not self._guard(
            lambda: poller.wait_until(self._connection, self._waiters, ended, limit)
        ):
            if until < self.deadline and time.monotonic() >= until:
                raise self._no_result_yet()
            raise self._late()
        if self._error is not None:
            raise self._error

    def _late(self) -> Exception:
        """The call goes on no longer: its deadline has passed, or the poller has stopped."""
        error: Exception
        if time.monotonic() >= self.deadline:
            error = self._past_deadline()
        else:
            error = self._lost(_EPIPE, lib.SHMRPC_UNKNOWN)
        if not self._closed:
            self._give_up(error)
        return error

    def _lost(self, error: int, outcome: int) -> Exception:
        if self._channel._closed:
            peer = self._connection.peer
            return Cancelled(f"{self.method!r} on {peer}: the client was closed meanwhile")
        return self._connection.lost(error, outcome, self.method)

    def _outcome(self) -> Exception | None:
        """How the call ended, once it has. Items that came before may be left to receive."""
        stream = self._stream
        if stream.overrun and not self._closed:
            self._give_up(self._overrun())
        if self._error is not None:
            return self._error
        if self._failure is None and stream.reply is not None:
            status, _, body = stream.reply
            if status != 0:
                self._failure = self._channel._remote_error(
                    self._connection, self.method, status, body
                )
        elif self._failure is None and stream.lost_error:
            self._failure = self._lost(stream.lost_error, stream.outcome)
        self._ended(self._failure)
        return self._failure

    def _check_fork(self) -> None:
        if self._connection.poller.forked:
            msg = f"this call of {self.method!r} was made before the fork, by the parent"
            raise ForkedError(msg)

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Whatever locks this thread holds: only what takes none.
        closed = self.__dict__.get("_closed", True)
        if not sys.is_finalizing() and not closed and not self._stream.over:
            self._give_up(None)

    def __repr__(self) -> str:
        state = "over" if self._closed or self._stream.over else "open"
        return f"<shmrpc.Call of {self.method!r} on {self._connection.address} {state}>"
