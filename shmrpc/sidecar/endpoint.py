"""One upstream server that speaks shmrpc: calls are passed on to it without being looked into."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from shmrpc._native import lib
from shmrpc.calls import Call, Receiver, Requests
from shmrpc.channel import _GOES_ON as GOES_ON
from shmrpc.client import Client
from shmrpc.errors import Cancelled, ConnectionLost
from shmrpc.futures import CallFuture, Ending
from shmrpc.lending import attach
from shmrpc.metadata import PackedMetadata

from .raw import RawCodec, Reply, Request, split

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shmrpc.buffers import Source
    from shmrpc.poller import Connection, Slot
    from shmrpc.session import Body, Stream

__all__ = ["NativeEndpoint", "RawCall", "RawRequests"]

_forward = lib.shmrpc_forward
_ENOTCONN, _ECANCELED = -errno.ENOTCONN, -errno.ECANCELED
_UNAVAILABLE = 14


class RelayClient(Client):
    """A client that passes requests on as they are, and reconnects by one attempt a call.

    Who can wait, or go elsewhere, is the caller.
    """

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, codec=RawCodec(), **options)

    def _connection(self, deadline: float) -> Connection:
        return self._connect(min(deadline, time.monotonic() + self._timeout), once=True)

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
        while True:
            try:
                if slot is None:
                    slot = self._slot()
                    status = _forward(slot.c, worker, timeout_ns)
                while status in GOES_ON:
                    slot.connection.poller.attend(status)
                    status = lib.shmrpc_wait(slot.c)
            except BaseException:
                if slot is not None:
                    lib.shmrpc_abandon(slot.c)
                raise
            if status >= 0:
                return slot
            if status == lib.SHMRPC_MESSAGE:
                self._check_stopping(slot, method.decode("utf-8", "replace"))
                return slot
            if status == _ENOTCONN:
                self._drop(slot.connection)
                slot = None
                continue
            name = method.decode("utf-8", "replace")
            if status == _ECANCELED:
                slot.connection.slots.append(slot)
                msg = f"the caller of {name!r} does not wait any more"
                raise Cancelled(msg)
            raise self._failure(slot, name, status)

    def _check_stopping(self, slot: Slot, method: str) -> None:
        """A server that stops refuses: nobody but us needs a new connection for that."""
        message = slot.message
        if message.status == _UNAVAILABLE and not message.body_bytes:
            failure = self._remote_error(slot.connection, method, _UNAVAILABLE, b"")
            slot.connection.slots.append(slot)
            raise failure

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

    def _split(self, slot: Slot, item: Any, _error: Exception) -> tuple[bytes, Sequence[Source]]:
        slot.pack = self._connection.codec.encoder()
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
            client = cast("RelayClient", self._channel)
            raise client._remote_error(self._connection, self.method, status, body)
        return Reply(status, metadata, body)


class NativeEndpoint:
    """One address of an upstream. It connects when the first call comes, and anew after a loss."""

    native = True

    def __init__(self, address: str, connect_timeout: float, max_message_bytes: int) -> None:
        self.address = address
        self._timeout = connect_timeout
        self._options = {"max_message_bytes": max_message_bytes}
        self._lock = threading.Lock()
        self.connected: RelayClient | None = None  # the client, once there was a connection
        self._closed = False

    def client(self, timeout: float | None = None) -> RelayClient:
        """The client, connected once; ``ConnectError``."""
        client = self.connected
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                msg = f"lost {self.address}: it is no upstream any more"
                raise ConnectionLost(msg, "not_sent")
            if self.connected is None:
                limit = self._timeout if timeout is None else min(timeout, self._timeout)
                self.connected = RelayClient(self.address, timeout=limit, **self._options)
                self.connected._timeout = self._timeout
            return self.connected

    def forward(
        self, worker: Any, method: bytes, timeout_ns: int, slot: Slot | None = None, status: int = 0
    ) -> Slot:
        """See ``RelayClient.forward``."""
        return self.client().forward(worker, method, timeout_ns, slot, status)

    def begin(self, request: Request, timeout: float | None) -> RawFuture:
        """See ``RelayClient.begin``."""
        return self.client(timeout).begin(request, timeout)

    def notify(self, request: Request, timeout: float | None) -> None:
        """See ``RelayClient.send_on``."""
        self.client(timeout).send_on(request, timeout)

    def open(self, request: Request, timeout: float | None, *, ended: bool) -> RawCall:
        """See ``RelayClient.open_raw``."""
        return self.client(timeout).open_raw(request, timeout, ended=ended)

    def close(self) -> None:
        """Hang up. Calls under way end with an error."""
        with self._lock:
            self._closed = True
            client, self.connected = self.connected, None
        if client is not None:
            client.close()

    def __repr__(self) -> str:
        return f"<NativeEndpoint {self.address}>"
