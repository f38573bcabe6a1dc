"""Messages of a stream as they come, and as handlers get them: ``Requests``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from ._native import lib
from .errors import Cancelled, ConnectionLost, Error, ProtocolError
from .parcels import Parcel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .poller import Connection, Waiters
    from .session import Stream

__all__ = ["Late", "Receiver", "Requests"]


class Late(Exception):
    """The deadline has passed, or nobody can read any more.

    No TimeoutError: that is what a signal's handler may raise while we wait.
    """


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
        """The next item; StopIteration at the end, ``Late``, ``ProtocolError``."""
        for item in self._items:
            return item
        return self._next_run(deadline)

    def clear(self) -> None:
        """Drop what was not taken."""
        self._items = iter(())
        self.stream.runs.clear()

    def pending(self) -> bool:
        """Whether an item has come that was not taken."""
        return bool(self.stream.runs)

    def ready(self) -> bool:
        """Whether ``next_until`` would not wait."""
        return bool(self.stream.runs) or self.stream.ended or self.stream.overrun

    def _next_run(self, deadline: float) -> Any:
        stream = self.stream
        if not self.ready():
            poller = self.connection.poller
            if not poller.wait_until(self.connection, self.waiters, self.ready, deadline):
                raise Late
        elif not stream.ended and time.monotonic() >= deadline:
            raise Late  # or a peer that is fast enough would never be late
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

    def _decode(self, data: Any, ends: Sequence[int]) -> Iterator[Any]:
        decode = self.connection.codec.decode
        starts = (0, *ends[:-1])
        try:
            if isinstance(data, Parcel):
                return iter((self.connection.decode(data),))
            return iter([decode(data[start:end]) for start, end in zip(starts, ends)])  # noqa: B905
        except (ValueError, TypeError) as error:
            msg = f"{self.connection.peer} sent a message in a stream that is none: {error}"
            raise ProtocolError(msg) from error


class Requests:
    """The caller's messages, as a handler with ``requests=True`` gets them.

    Iterating waits for the next one and ends when the caller sends no more. Raises ``Cancelled``
    when the caller has given up, is gone, or its deadline has passed, which ends the handler unless
    it catches that; ``ProtocolError`` for what is no message.
    """

    def __init__(
        self, connection: Connection, stream: Stream, call_id: int, deadline: float
    ) -> None:
        waiters = cast("Waiters", stream.waiters)
        self._receiver = Receiver(connection, stream, waiters, call_id, 0)
        self._deadline = deadline

    def __iter__(self) -> Requests:
        if self._receiver.exhausted:
            msg = "the caller's messages were iterated to their end already, and are gone"
            raise Error(msg)
        return self

    def __next__(self) -> Any:
        receiver = self._receiver
        if not receiver.stream.cancelled:
            for item in receiver._items:
                return item
        return self._next()

    def _next(self) -> Any:
        receiver = self._receiver
        stream = receiver.stream
        if stream.cancelled and not stream.lost_error:
            receiver.clear()
        try:
            return receiver.next_until(self._deadline)
        except StopIteration:
            if stream.overrun:
                msg = f"{receiver.connection.peer} sent more than it had credit for"
                raise ProtocolError(msg) from None
            if stream.cancelled:
                raise self._unwanted() from None
            raise
        except ConnectionLost:
            raise self._unwanted() from None
        except Late:
            if time.monotonic() < self._deadline:
                msg = "the server is stopping"
                raise Cancelled(msg) from None
            stream.cancelled = True
            raise self._unwanted() from None

    def _unwanted(self) -> Cancelled:
        return Cancelled(f"{self._receiver.connection.peer} does not wait for this call any more")
