"""Byte streams: one call to a connection, whose items are bytes and whose boundaries mean nothing.

The one that connects calls the reserved method with a stream; the other answers by INITIAL, or by a
reply that says that it serves none. Each side ends its own half: the caller by END, the other by a
reply without a body. Flow control is the stream's credit.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, cast

from ._native import ffi, lib
from .address import parse
from .codec import MsgpackCodec
from .errors import STATUS_NUMBERS, ConnectError
from .handshake import Terms
from .link import connect_link
from .poller import FOREVER, Waiters, check_timeout
from .registry import make_name
from .session import Run, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from .address import Address
    from .poller import Connection
    from .session import Body, Waiting

__all__ = ["METHOD", "ByteStream", "Flow", "Wire", "byte_terms", "connect_bytes"]

METHOD = b"shmrpc.bytes"
# What a sender may have under way, and a ring that takes it with the frames' headers: fewer and
# larger steps than a stream of messages takes, because each of them may wake the other process.
_WINDOW_BYTES = 448 << 10  # part of the protocol
_RING_BYTES = 512 << 10
_MESSAGE_BYTES = 1 << 20  # longest item that we accept: others may cut larger ones than we do
# Largest item that we send: it is one frame. On sockets, whose frames are a little shorter than
# 64 KiB, half of that: writes of 64 KiB, which are common, would leave a small rest each.
_PIECE_SHM = 64 << 10
_PIECE_SOCKET = 32 << 10
_UNIMPLEMENTED = STATUS_NUMBERS["UNIMPLEMENTED"]

_ITEM_FLAGS = lib.SHMRPC_FLAG_CALLER
_send_item = lib.shmrpc_send_item


def byte_terms(
    address: Address, allow_uids: frozenset[int] = frozenset(), *, allow_remote: bool = False
) -> Terms:
    """What a side of a byte stream brings to the handshake."""
    return Terms(
        address, _MESSAGE_BYTES, _RING_BYTES, allow_uids=allow_uids, allow_remote=allow_remote
    )


def _nothing() -> None:
    """The reply of the peer ends its half alone."""


class Flow(Stream):
    """The stream of such a call: it stays registered after the reply, for the other half."""

    __slots__ = ("receiver",)

    window_bytes = _WINDOW_BYTES
    due_bytes = _WINDOW_BYTES // 2

    def __init__(self, waiters: Waiting, *, ended: bool = False) -> None:
        super().__init__(waiters, ended=ended)
        # A consumer in the thread that reads: what it is given directly while nothing else waits.
        self.receiver: Callable[[bytes], None] | None = None

    def came(self, data: bytes, count: int, last: int) -> bool:
        """As ``items``, of ``count`` that came together, the last of them ``last`` bytes long."""
        size = len(data)
        before = self.runs.last
        messages = before.received_messages + count
        received = before.received_bytes + size
        receiver = self.receiver
        if (
            receiver is None
            or self.ended
            # Then credit is due, or they are beyond it.
            or messages - self.returned_messages >= self.due_messages
            or received - self.returned_bytes >= self.due_bytes
        ):
            return self.items(Run(data, (size - last,) * (count - 1) + (size,)))
        before.received_messages = self.taken_messages = messages
        before.received_bytes = self.taken_bytes = received
        receiver(data)
        return True

    def items(self, run: Run) -> bool:
        """Bytes have come. Buffers beside them are nothing that a byte stream has."""
        if not isinstance(run.data, bytes):
            self.overrun = True
        self.receiver = None
        return super().items(run)

    def replied(self, status: int, metadata: bytes, body: Body) -> Callable[[], None] | None:
        """As ``Pending.replied``."""
        super().replied(status, metadata, body)
        return _nothing


class Wire:
    """One side of a byte stream: frames from and to the peer, without waiting for anything.

    One thread may send while another one takes.
    """

    def __init__(self, connection: Connection, stream: Flow, call_id: int, *, called: bool) -> None:
        """``called``: by the peer."""
        self.connection = connection
        self.stream = stream
        self._call_id = call_id
        self._called = called
        self._flags = 0 if called else _ITEM_FLAGS
        piece = _PIECE_SHM if connection.address.transport == "shm" else _PIECE_SOCKET
        self._piece = min(piece, connection.max_request_bytes)
        # glibc gives freed memory at the top of its heap back to the system, 64 KiB of a read at a
        # time, and faults it in again; not once a larger block was freed. Measured: 1.6x the bytes.
        bytearray(1 << 20)

    @classmethod
    def open(cls, connection: Connection, waiters: Waiting) -> Wire:
        """Call the peer; ``accepted`` says when it has answered."""
        stream = Flow(waiters)
        call_id = connection.session.next_id()
        connection.session.calls[call_id] = stream
        wire = cls(connection, stream, call_id, called=False)
        name = make_name(METHOD.decode())
        wire._send(lib.SHMRPC_REQUEST, lib.SHMRPC_FLAG_STREAM, name)
        return wire

    def _send(self, kind: int, flags: int = 0, name: object = ffi.NULL, status: int = 0) -> None:
        """Send a frame without a body. That it fails is seen by how the connection ends."""
        send_bare(self.connection, kind, self._call_id, flags, name, status)

    # ---- the beginning ----

    def accept(self) -> None:
        """Tell the peer that its call is a byte stream now."""
        self._send(lib.SHMRPC_INITIAL)
        self.return_credit()

    def accepted(self) -> bool:
        """Whether the peer has answered our call, or never will."""
        return self.stream.initial is not None or self.stream.over

    def check_accepted(self) -> None:
        """Raise ``ConnectError`` if the peer did not take the call; else let it send."""
        stream, peer = self.stream, self.connection.peer
        if stream.initial is not None:
            self.return_credit()
            return
        if stream.reply is None:
            msg = f"can't connect to {peer}: it hung up before it answered"
        elif stream.reply[0] == _UNIMPLEMENTED:
            msg = f"{peer} serves calls and no byte streams: use shmrpc.connect"
        else:
            msg = f"{peer} refused the byte stream with status {stream.reply[0]}"
        raise ConnectError(msg)

    # ---- bytes ----

    def send(self, data: bytes | memoryview) -> int:
        """Send what there is credit for, and return how much that was; ``OSError`` if it fails."""
        stream = self.stream
        size = len(data)
        slot = self.connection.slot()
        start = None
        done = 0
        while done < size and stream.may_send():
            count = min(size - done, self._piece)
            if start is None and not (done == 0 and count == size and isinstance(data, bytes)):
                start = ffi.from_buffer(data)
            body = data if start is None else start + done
            status = _send_item(slot.c, self._flags, self._call_id, body, count)
            if status < 0:
                raise self.lost() if status == -errno.EPIPE else OSError(-status, "can't send")
            stream.sent(count)
            done += count
        self.connection.slots.append(slot)
        return done

    def send_whole(self, data: bytes) -> bool:
        """Send all of it, if that is one item, with as little as possible; else nothing.

        Only where one thread uses the connection.
        """
        stream, slots, size = self.stream, self.connection.slots, len(data)
        if (
            not slots  # nobody has sent anything yet, or it is over
            or not 0 < size <= self._piece
            or stream.sent_messages >= stream.granted_messages
            or stream.sent_bytes >= stream.granted_bytes
            or _send_item(slots[-1].c, self._flags, self._call_id, data, size) < 0
        ):
            return False
        stream.sent_messages += 1
        stream.sent_bytes += size
        return True

    def take(self) -> bytes:
        """What came next; IndexError if there is nothing now."""
        stream = self.stream
        data, _ = stream.take()
        if not stream.ended:
            self.return_credit()
        return cast("bytes", data)  # see Flow.items

    def return_credit(self) -> None:
        """Let the peer send more, if that is due."""
        credit = self.stream.due_credit()
        if credit:
            self.connection.send_now(lib.SHMRPC_CREDIT, self._call_id, credit, flags=self._flags)

    # ---- the end ----

    def send_eof(self) -> None:
        """End our half."""
        if not self.connection.closed:
            self._send(lib.SHMRPC_REPLY if self._called else lib.SHMRPC_END)

    def lost(self) -> OSError:
        """The error of one who sends to a peer that has gone."""
        peer = self.connection.peer
        if self.stream.overrun or self.stream.lost_error == errno.EPROTO:
            return OSError(errno.EPROTO, f"{peer} broke the protocol; the connection is closed")
        return BrokenPipeError(errno.EPIPE, f"{peer} has hung up")

    def hang_up(self) -> None:
        """End the connection."""
        session = self.connection.session
        session.calls.pop(self._call_id, None)
        session.requests.pop(self._call_id, None)
        self.connection.shutdown()


def send_bare(
    connection: Connection,
    kind: int,
    call_id: int,
    flags: int = 0,
    name: object = ffi.NULL,
    status: int = 0,
) -> None:
    """Send a frame without metadata and body."""
    slot = connection.slot()
    position = ffi.new("uint64_t *")
    lib.shmrpc_send(slot.c, kind, flags, call_id, name, status, b"", 0, b"", 0, 0, position)
    connection.slots.append(slot)


def refuse(connection: Connection, call_id: int) -> None:
    """Tell the peer that what it called is not served here."""
    send_bare(connection, lib.SHMRPC_REPLY, call_id, status=_UNIMPLEMENTED)


class ByteStream:
    """A byte stream for threads, as a connected socket: made by ``connect_bytes``.

    One thread may send while another one receives. Timeouts are in seconds, None waits for ever.
    """

    def __init__(self, wire: Wire, waiters: Waiters) -> None:
        self._wire = wire
        self._waiters = waiters
        self._rest = memoryview(b"")
        self._closed = False

    @property
    def peer(self) -> str:
        """The peer as errors name it."""
        return self._wire.connection.peer

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> None:
        connection = self._wire.connection
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        if not connection.poller.wait_until(connection, self._waiters, ready, deadline):
            msg = f"{self.peer} did nothing for {timeout} s"
            raise TimeoutError(msg)

    def _check_open(self) -> None:
        if self._closed:
            msg = f"this byte stream to {self.peer} is closed"
            raise OSError(errno.EBADF, msg)

    def send_all(self, data: bytes, timeout: float | None = None) -> None:
        """Send all of it; each wait for the peer may take ``timeout``. ``OSError`` if it is gone.

        ``TimeoutError`` leaves open how much of it was sent.
        """
        self._check_open()
        wire, stream = self._wire, self._wire.stream

        def ready() -> bool:
            return stream.may_send() or stream.lost_error != 0 or self._closed

        left = memoryview(data).cast("B")
        while left:
            if not stream.may_send():
                self._wait(ready, timeout)
            self._check_open()
            if stream.lost_error:
                raise wire.lost()
            left = left[wire.send(left) :]

    def receive(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """At least one byte and at most ``max_bytes``; nothing at the end of the peer's half."""
        self._check_open()
        stream = self._wire.stream

        def ready() -> bool:
            return bool(stream.runs) or stream.ended or stream.overrun or self._closed

        if not self._rest:
            if not ready():
                self._wait(ready, timeout)
            self._check_open()
            if stream.runs:
                self._rest = memoryview(self._wire.take())
            elif stream.overrun or stream.lost_error == errno.EPROTO:
                raise self._wire.lost()
        data, self._rest = bytes(self._rest[:max_bytes]), self._rest[max_bytes:]
        return data

    def readable(self) -> bool:
        """Whether ``receive`` would return at once, with bytes or with the end."""
        connection = self._wire.connection
        if not connection.closed:
            slot = connection.slot()
            connection.poller.wait(slot, 0.0)
            connection.slots.append(slot)
        stream = self._wire.stream
        return bool(self._rest) or bool(stream.runs) or stream.ended or stream.overrun

    def send_eof(self) -> None:
        """End our half; the peer's may go on."""
        self._check_open()
        self._wire.send_eof()

    def close(self) -> None:
        """End our half and hang up; what the connection has no room for is lost. Repeatable."""
        if self._closed:
            return
        self._closed = True
        self._wire.send_eof()
        self._wire.hang_up()
        self._waiters.wake()


def connect_bytes(address: str, timeout: float = 5.0) -> ByteStream:
    """Connect to a server of byte streams; ``ConnectError`` after ``timeout`` seconds at most."""
    until = time.monotonic() + check_timeout(timeout)
    connection = connect_link(byte_terms(parse(address)), MsgpackCodec(), timeout)
    waiters = Waiters()
    wire = Wire.open(connection, waiters)
    try:
        if not connection.poller.wait_until(connection, waiters, wire.accepted, until):
            msg = f"can't connect to {connection.peer}: it did not answer within {timeout:g} s"
            raise ConnectError(msg)
        wire.check_accepted()
    except BaseException:
        wire.hang_up()
        raise
    return ByteStream(wire, waiters)
