"""Calling as somebody who stands between: what is sent and received stays packed.

``RawChannel`` goes before ``Client`` or ``Caller`` in a class's bases.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any, cast

from shmrpc._native import ffi, lib
from shmrpc.calls import Call
from shmrpc.channel import _GOES_ON as GOES_ON
from shmrpc.channel import Channel
from shmrpc.errors import Cancelled
from shmrpc.futures import CallFuture, Ending
from shmrpc.lending import attach, wants_room
from shmrpc.metadata import PackedMetadata
from shmrpc.poller import FOREVER, nanoseconds_until
from shmrpc.receiving import Receiver, Requests

from .raw import Reply, Request, split

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shmrpc.buffers import Source
    from shmrpc.poller import Connection, Slot
    from shmrpc.session import Body, Stream

__all__ = ["RawCall", "RawChannel", "RawFuture", "RawRequests", "blocks_of"]

_forward = lib.shmrpc_forward
_ENOTCONN, _ECANCELED = -errno.ENOTCONN, -errno.ECANCELED
_UNAVAILABLE = 14


def blocks_of(message: Any) -> list[memoryview]:
    """The buffers beside a message, where they lie: as long as its slot keeps it."""
    if not message.flags & lib.SHMRPC_FLAG_BLOCKS:
        return []
    blocks = message.blocks[0 : message.block_count]
    return [memoryview(ffi.buffer(block.data, block.bytes)) for block in blocks]


class RawChannel(Channel):
    """A channel that passes on what it is given as it is."""

    def _pack(
        self,
        slot: Slot,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],  # noqa: ARG002 - there are none: they are in the body
        deadline: float,
        *,
        large: bool = False,  # noqa: ARG002 - as it came
    ) -> tuple[bytes, Any]:
        body, sources = split(args[0])
        if not sources:
            return body, None
        try:
            what = f"the request of {method!r}"
            return body, attach(slot.connection, slot.c, sources, deadline, what)
        except BaseException:
            slot.connection.slots.append(slot)
            raise

    def forward(
        self, worker: Any, method: bytes, timeout_ns: int, slot: Slot | None = None, status: int = 0
    ) -> Slot:
        """Pass on what this worker's slot holds; returns the slot with the reply, to be put back.

        It may have been sent on ``slot`` already, with this ``status``.
        Raises ``Cancelled`` when the request is not wanted any more, else as ``call``.
        """
        until = time.monotonic() + timeout_ns / 1e9 if timeout_ns >= 0 else FOREVER
        while True:
            try:
                if slot is None:
                    slot = self._slot()
                    status = _forward(slot.c, worker, timeout_ns)
                if wants_room(status):
                    alive = self._attach_blocks(slot, worker, method, until)
                    status = _forward(slot.c, worker, nanoseconds_until(until))
                    del alive
                while status in GOES_ON:
                    slot.connection.poller.attend(status)
                    status = lib.shmrpc_wait(slot.c)
            except BaseException:
                if slot is not None:
                    lib.shmrpc_abandon(slot.c)
                raise
            if status >= 0:
                return slot
            name = method.decode("utf-8", "replace")
            if status == lib.SHMRPC_MESSAGE:
                message = slot.message
                if message.status != _UNAVAILABLE or message.body_bytes:
                    return slot
                # A server that stops refuses: nobody but us needs a new connection for that.
                known = slot.connection.retired
                failure = self._remote_error(slot.connection, name, _UNAVAILABLE, b"")
                slot.connection.slots.append(slot)
                if not known:
                    raise failure
                slot = None  # another thread has been told before: there may be a successor
            elif status == _ENOTCONN:
                self._drop(slot.connection)
                slot = None
            elif status == _ECANCELED:
                slot.connection.slots.append(slot)
                msg = f"the caller of {name!r} does not wait any more"
                raise Cancelled(msg)
            else:
                raise self._failure(slot, name, status)

    @staticmethod
    def _attach_blocks(slot: Slot, worker: Any, method: bytes, until: float) -> Any:
        """Have the arena grow, or wait for room in it; what has to live until it was sent."""
        message = lib.shmrpc_slot_message(worker)
        deadline = min(until, message.deadline_ns / 1e9 or FOREVER)
        what = f"the request of {method.decode('utf-8', 'replace')!r}"
        return attach(slot.connection, slot.c, blocks_of(message), deadline, what)

    def begin(self, request: Request, timeout: float | None) -> RawFuture:
        """Start a call; the future has its reply, or what kept it from having one."""

        def make(connection: Connection, deadline: float) -> RawFuture:
            return RawFuture(self, connection, request.method, deadline)

        return self._send(
            lib.SHMRPC_REQUEST,
            lib.SHMRPC_FLAG_KEYWORDS if request.keywords else 0,
            request.method,
            (request.body,),
            {},
            timeout,
            PackedMetadata(request.metadata),  # type: ignore[arg-type]
            make,
        )

    def send_on(self, request: Request, timeout: float | None) -> None:
        """Pass a notification on; as ``notify``."""
        flags = lib.SHMRPC_FLAG_KEYWORDS if request.keywords else 0
        self._send(
            lib.SHMRPC_NOTIFY,
            flags,
            request.method,
            (request.body,),
            {},
            timeout,
            PackedMetadata(request.metadata),  # type: ignore[arg-type]
            _NoPending,
        )

    def open_raw(self, request: Request, timeout: float | None, *, ended: bool) -> RawCall:
        """Pass on the request of a stream; ``ended``: its caller sends no messages."""
        flags = lib.SHMRPC_FLAG_STREAM | (lib.SHMRPC_FLAG_ENDED if ended else 0)
        if request.keywords:
            flags |= lib.SHMRPC_FLAG_KEYWORDS

        def make(connection: Connection, deadline: float) -> RawCall:
            return RawCall(self, connection, request.method, deadline, streams=ended)

        return self._send(
            lib.SHMRPC_REQUEST,
            flags,
            request.method,
            (request.body,),
            {},
            timeout,
            PackedMetadata(request.metadata),  # type: ignore[arg-type]
            make,
        )


class RawFuture(CallFuture):
    """A call under way; its result is a ``Reply``."""

    def _interpret(self, status: int, body: Body) -> Ending:
        if status == _UNAVAILABLE and not body:
            return super()._interpret(status, body)
        return Reply(status, self._metadata, body), None


class _NoPending:
    """Nothing comes back for a notification."""

    call_id = 0
    position: Sequence[int] = (0,)

    def __init__(self, connection: Connection, deadline: float) -> None:
        """Needs neither."""

    def register(self) -> None:
        """Nothing to take."""

    def unregister(self) -> None:
        """Nothing to forget."""


class _RawReceiver(Receiver):
    """Messages of a stream as they came."""

    def _decode(self, data: Body, ends: Sequence[int]) -> Iterator[Any]:
        return iter(_split(data, ends))


def _split(data: Body, ends: Sequence[int]) -> list[Body]:
    if len(ends) == 1 or not isinstance(data, bytes):  # one, with buffers, has come alone
        return [data]
    starts = (0, *ends[:-1])
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


class RawRequests(Requests):
    """A caller's messages as they came."""

    def __init__(
        self, connection: Connection, stream: Stream, call_id: int, deadline: float
    ) -> None:
        super().__init__(connection, stream, call_id, deadline)
        self._receiver = _RawReceiver(connection, stream, self._receiver.waiters, call_id, 0)


class RawCall(Call):
    """An open call of an upstream, whose messages are bytes."""

    _failed: BaseException | None = None

    def _split(self, _slot: Slot, item: Any) -> tuple[bytes, Sequence[Source]]:
        return split(item)

    def woken(self, _caller: Stream) -> None:
        """Something has happened to the caller's stream: ``take`` is to look at it."""
        self._waiters.wake()

    @property
    def initial(self) -> bytes | None:
        """Packed metadata that has come before the first message."""
        return self._stream.initial

    def fail(self, error: BaseException) -> None:
        """What the caller sends can't be had: cancel the call, which ends with this error."""
        if not self._closed and not self._stream.over:
            self._failed = error
            self.cancel()

    def take(self, caller: Stream | None = None) -> list[Body] | None:
        """Wait for messages and return those that have come together; None at the end.

        None of them when initial metadata has come, or ``caller`` is cancelled. Raises as
        iterating, but for what the handler ended with: see ``reply``.
        """
        stream, initial = self._stream, self._stream.initial

        def ready() -> bool:
            return (
                bool(stream.runs)
                or stream.ended
                or stream.overrun
                or stream.initial is not initial
                or (caller is not None and caller.cancelled)
            )

        if not ready():
            self._wait(ready)
        elif not stream.ended and time.monotonic() >= self.deadline:
            raise self._late()
        if self._failed is not None or self._error is not None:
            raise self._failed or self._error or Cancelled()
        if caller is not None and caller.cancelled:
            return []
        try:
            data, ends = stream.take()
        except IndexError:
            return None if stream.ended or stream.overrun else []
        credit = b"" if stream.ended else stream.due_credit()
        if credit:
            self._connection.send_now(
                lib.SHMRPC_CREDIT, self._call_id, credit, flags=lib.SHMRPC_FLAG_CALLER
            )
        return _split(data, ends)

    def reply(self) -> Reply:
        """How it has ended, after the last message; raises what is not the handler's doing."""
        stream = self._stream
        if self._failed is not None:
            raise self._failed
        if stream.reply is None or stream.overrun:
            raise self._outcome() or Cancelled(f"the call of {self.method!r} was closed")
        status, metadata, body = stream.reply
        self._ended(None)
        if status == _UNAVAILABLE and not body:
            channel = cast("RawChannel", self._channel)
            raise channel._remote_error(self._connection, self.method, status, body)
        return Reply(status, metadata, body)
