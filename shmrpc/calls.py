"""Streams as users see them: ``Call`` on the caller's side, ``Requests`` on the handler's."""

from __future__ import annotations

import errno
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from ._native import lib
from .errors import Cancelled, DeadlineExceeded, Error, MessageTooLarge, ProtocolError
from .metadata import unpack_metadata, unpack_reply_metadata
from .poller import FOREVER, Connection, Waiters, check_timeout
from .session import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

__all__ = ["Call", "Receiver", "Requests"]

_EPIPE, _EMSGSIZE = errno.EPIPE, errno.EMSGSIZE


class Channel(Protocol):
    """The client, as far as its calls need it."""

    @property
    def closed(self) -> bool: ...
    def _remote_error(
        self, connection: Connection, method: str, status: int, body: bytes
    ) -> Error: ...


class Receiver:
    """Items of a stream, one by one: waiting, decoding, giving credit back."""

    def __init__(
        self, connection: Connection, stream: Stream, waiters: Waiters, call_id: int, flags: int
    ) -> None:
        self.connection = connection
        self.stream = stream
        self.waiters = waiters
        self.exhausted = False
        self._call_id = call_id
        self._flags = flags
        self._items: Iterator[Any] = iter(())

    def next_until(self, deadline: float) -> Any:
        """The next item; StopIteration at the end, ``TimeoutError`` at the deadline."""
        for item in self._items:
            return item
        return self._next_run(deadline)

    def pending(self) -> bool:
        """Whether an item has come that was not taken."""
        return bool(self.stream.runs)

    def ready(self) -> bool:
        """Whether ``__next__`` would not wait."""
        return bool(self.stream.runs) or self.stream.ended or self.stream.overrun

    def _next_run(self, deadline: float) -> Any:
        stream = self.stream
        if not self.ready() and not self.connection.poller.wait_until(
            self.connection, self.waiters, self.ready, deadline
        ):
            raise TimeoutError
        if stream.cancelled and not stream.lost_error:
            stream.runs.clear()
        try:
            data, ends = stream.take()
        except IndexError:
            self.exhausted = True
            raise StopIteration from None
        if not stream.ended:
            credit = stream.due_credit()
            if credit:
                self.connection.send_now(
                    lib.SHMRPC_CREDIT, self._call_id, credit, flags=self._flags
                )
        self._items = self._decode(data, ends)
        return next(self._items)

    def _decode(self, data: bytes, ends: Any) -> Iterator[Any]:
        decode = self.connection.codec.decode
        if len(ends) == 1:
            return iter((decode(data),))
        starts = (0, *ends[:-1])
        return iter([decode(data[start:end]) for start, end in zip(starts, ends)])  # noqa: B905


class Requests:
    """The caller's messages, as a handler with ``requests=True`` gets them.

    Iterating waits for the next one and ends when the caller sends no more. Raises ``Cancelled``
    when the caller has given up or is gone, or the call's deadline has passed, which ends the
    handler unless it catches that.
    """

    def __init__(
        self,
        connection: Connection,
        stream: Stream,
        waiters: Waiters,
        call_id: int,
        deadline: float,
    ) -> None:
        self._receiver = Receiver(connection, stream, waiters, call_id, 0)
        self._deadline = deadline  # time.monotonic() seconds, or infinity

    def __iter__(self) -> Requests:
        if self._receiver.exhausted:
            msg = "the caller's messages were iterated to their end already, and are gone"
            raise Error(msg)
        return self

    def __next__(self) -> Any:
        receiver = self._receiver
        try:
            return receiver.next_until(self._deadline)
        except StopIteration:
            stream = receiver.stream
            if stream.overrun:
                msg = "the caller sent more than it had credit for"
                raise ProtocolError(msg) from None
            if stream.cancelled:
                msg = f"{receiver.connection.peer} does not wait for this call any more"
                raise Cancelled(msg) from None
            raise
        except TimeoutError:
            receiver.stream.cancelled = True  # and nobody waits for its reply
            late = time.monotonic() >= self._deadline
            msg = "the deadline of the call has passed" if late else "this side is stopping"
            raise Cancelled(msg) from None


class Call:
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
        self._call_id = connection.session.new_id(lib.SHMRPC_PYTHON_INDEX)
        self._receiver = Receiver(
            connection, self._stream, self._waiters, self._call_id, lib.SHMRPC_FLAG_CALLER
        )
        self._streams = streams  # by client.stream(): it has nothing to send
        self._sends = not streams
        self._send_lock = threading.Lock()
        self._error: Exception | None = None
        self._closed = False
        self._observers: list[Callable[[BaseException | None], None]] = []

    # ---- the beginning, for the channel ----

    @property
    def call_id(self) -> int:
        """Its number on this connection."""
        return self._call_id

    @property
    def position(self) -> Sequence[int]:
        """Where its request lies, for what became of it."""
        return self._stream.position

    @position.setter
    def position(self, position: Sequence[int]) -> None:
        self._stream.position = position

    def register(self) -> None:
        """Take frames from now on."""
        self._connection.register(self._call_id, self._stream)

    def unregister(self) -> None:
        """It came to nothing: nobody has seen it."""
        self._connection.session.calls.pop(self._call_id, None)
        self._closed = True

    def observe(self, fn: Callable[[BaseException | None], None]) -> None:
        """Call this once when the call is over, with its error or None."""
        self._observers.append(fn)

    def reply_metadata(self) -> tuple[dict[str, str | bytes], dict[str, str | bytes]]:
        """Trailing and initial metadata, as far as they have come."""
        stream = self._stream
        packed = stream.reply[1] if stream.reply is not None else b""
        trailing, initial = unpack_reply_metadata(packed)
        return trailing, unpack_metadata(stream.initial) if stream.initial is not None else initial

    def _ended(self, error: BaseException | None) -> None:
        observers, self._observers = self._observers, []
        for observer in observers:
            observer(error)

    # ---- sending ----

    def send(self, item: Any) -> None:
        """Send one message. Waits while the handler is behind by a window of messages.

        The item is copied. Raises the error that ended the call if it has ended, ``Error`` after
        ``close_send``, TypeError or ValueError for what can't be sent, ``DeadlineExceeded``.
        """
        with self._send_lock:
            stream = self._stream
            if not self._sends or stream.ended or self._closed:
                self._refuse_send()
            if not stream.may_send():
                self._wait(self._may_go_on_sending)
                if stream.ended or self._closed:
                    self._refuse_send()
            slot = self._connection.slot()
            try:
                body = slot.pack(item)
            except Exception as error:
                slot.pack = self._connection.codec.encoder()
                self._connection.slots.append(slot)
                kind = type(item).__qualname__
                msg = f"a message for {self.method!r} can't be sent: {error} (of type {kind})"
                raise (TypeError if isinstance(error, TypeError) else ValueError)(msg) from error
            size = len(body)
            status = lib.shmrpc_send_item(slot.c, lib.SHMRPC_FLAG_CALLER, self._call_id, body, size)
            self._connection.slots.append(slot)
            if status >= 0:
                stream.sent(size)
                return
        if status == -_EMSGSIZE:
            msg = (
                f"a message for {self.method!r} is longer than {self._connection.peer} accepts "
                f"(max_message_bytes={self._connection.max_request_bytes})"
            )
            raise MessageTooLarge(msg)
        self._wait(lambda: self._stream.over)  # the connection has ended: learn how
        self._refuse_send()

    def _may_go_on_sending(self) -> bool:
        return self._stream.may_send() or self._stream.ended or self._closed

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

    def close_send(self) -> None:
        """Tell the handler that no more messages come. Replies can still be received."""
        with self._send_lock:
            if not self._sends:
                return
            self._sends = False
            if not self._stream.ended and not self._closed:
                self._connection.send_now(lib.SHMRPC_END, self._call_id)

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
        if self._closed and self._error is None:
            raise StopIteration
        try:
            if self._error is not None:
                raise self._error
            return self._receiver.next_until(self.deadline)
        except StopIteration:
            error = self._outcome()
            if error is not None:
                raise error from None
            reply = self._stream.reply
            if reply is not None and reply[2]:
                msg = (
                    f"{self.method!r} on {self._connection.peer} returns one result and "
                    "streams nothing: use call(), or open() and result()"
                )
                raise Error(msg) from None
            raise
        except TimeoutError:
            raise self._late() from None
        except (ValueError, TypeError) as error:
            self.cancel()
            msg = f"{self._connection.peer} sent an item of {self.method!r} that is none: {error}"
            raise ProtocolError(msg) from error
        except BaseException:  # Ctrl-C while waiting
            self.cancel()
            raise

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the handler's result and return it. Sends no more messages from now on.

        ``timeout`` in seconds bounds this wait alone: it raises TimeoutError and the call goes
        on. Raises what ``call`` would. For a method that streams its results, iterate instead.
        """
        until = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        self.close_send()
        if self._error is not None:
            raise self._error
        self._wait(lambda: self._stream.over or self._receiver.pending(), until)
        error = self._outcome() if self._stream.over else None
        if error is not None:
            raise error
        if self._receiver.pending():
            msg = f"{self.method!r} streams its results: iterate over the call"
            raise Error(msg)
        body = self._stream.reply[2] if self._stream.reply is not None else b""
        if not body:
            return None
        try:
            return self._connection.codec.decode(body)
        except (ValueError, TypeError) as reason:
            peer = self._connection.peer
            msg = f"{peer} sent a result of {self.method!r} that is none: {reason}"
            raise ProtocolError(msg) from reason

    def done(self) -> bool:
        """Whether the call is over. Takes what has arrived into account."""
        if not self._stream.over and not self._closed:
            self._connection.poller.wait_until(
                self._connection, self._waiters, lambda: self._stream.over, 0
            )
        return self._stream.over or self._closed

    @property
    def initial_metadata(self) -> dict[str, str | bytes]:
        """What the handler sent before its first reply. Waits until that is known."""
        stream = self._stream
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
        if not self._closed and not self._stream.over:
            self._give_up(None)
        self._closed = True

    def _give_up(self, error: Exception | None) -> None:
        self._error = error
        self._closed = True
        self._receiver._items = iter(())
        self._stream.runs.clear()
        self._connection.session.calls.pop(self._call_id, None)
        self._stream.ended = True
        self._connection.send_now(lib.SHMRPC_CANCEL, self._call_id)
        self._waiters.wake()
        self._ended(error or Cancelled(f"the call of {self.method!r} was closed"))

    def _wait(self, ready: Callable[[], bool], until: float = FOREVER) -> None:
        """Wait; raises what ended the call if that keeps ``ready`` from coming true."""
        try:
            if not ready() and not self._connection.poller.wait_until(
                self._connection,
                self._waiters,
                lambda: ready() or self._closed,
                min(self.deadline, until),
            ):
                if until < self.deadline and time.monotonic() >= until:
                    msg = f"{self.method!r} has no result yet"
                    raise TimeoutError(msg)
                raise self._late()
        except (TimeoutError, Error):
            raise
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        if self._error is not None:
            raise self._error

    def _late(self) -> Exception:
        """The call goes on no longer: its deadline has passed, or the poller has stopped."""
        peer = self._connection.peer
        error: Exception
        if time.monotonic() >= self.deadline:
            error = DeadlineExceeded(f"{self.method!r} on {peer} took longer than its timeout")
        else:
            error = self._connection.lost(_EPIPE, lib.SHMRPC_UNKNOWN, self.method)
        if not self._closed:
            self._give_up(error)
        return error

    def _outcome(self) -> Exception | None:
        """How the call ended, once it has."""
        stream = self._stream
        if self._error is None and stream.overrun:
            peer = self._connection.peer
            self._give_up(ProtocolError(f"{peer} sent more of {self.method!r} than it may"))
        elif self._error is None and stream.reply is not None:
            status, _, body = stream.reply
            if status != 0:
                self._error = self._channel._remote_error(
                    self._connection, self.method, status, body
                )
        elif self._error is None and stream.lost_error:
            if self._channel.closed:
                msg = f"{self.method!r} on {self._connection.peer}: the client was closed meanwhile"
                self._error = Cancelled(msg)
            else:
                self._error = self._connection.lost(stream.lost_error, stream.outcome, self.method)
        self._closed = True
        self._ended(self._error)
        return self._error

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
        if not sys.is_finalizing() and not self.__dict__.get("_closed", True):
            self.close()

    def __repr__(self) -> str:
        state = "over" if self._closed or self._stream.over else "open"
        return f"<shmrpc.Call of {self.method!r} on {self._connection.address} {state}>"
