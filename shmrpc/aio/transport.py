"""Byte streams with the face of ``asyncio.Transport``."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import warnings
from asyncio import constants, transports
from asyncio.trsock import TransportSocket
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmrpc.bytestream import Wire

    from .hub import Hub

__all__ = ["ShmTransport"]

_log = logging.getLogger("shmrpc.aio")

# Writes that have to wait are joined up to so much, so that small ones don't use up the credit.
_JOIN_BYTES = 32 << 10


class ShmTransport(transports._FlowControlMixin):
    """One byte stream in an event loop, over shm, unix or tcp.

    What asyncio says of its transports holds: ``connection_lost`` comes exactly once and from the
    loop, bytes are delivered whole and in order. asyncio's own mixin does the flow control, because
    ``loop.sendfile`` takes no transport without it. Belongs to the loop's thread.
    """

    _sendfile_compatible = constants._SendfileMode.FALLBACK
    _maybe_pause_protocol: Callable[[], None]
    _maybe_resume_protocol: Callable[[], None]

    def __init__(
        self,
        hub: Hub,
        wire: Wire,
        protocol: asyncio.BaseProtocol,
        lost: Callable[[ShmTransport], None] | None = None,
    ) -> None:
        """``lost`` is called after the protocol has lost the connection."""
        super().__init__(None, hub.loop)
        self._loop = hub.loop
        self._hub = hub
        self._wire = wire
        self._stream = wire.stream
        self._peer = wire.connection.peer
        self._credentials = wire.connection.credentials
        self._lost = lost
        self._socket: TransportSocket | None = None
        self._buffer: deque[bytes | memoryview] = deque()
        self._buffered = 0
        self._rest = memoryview(b"")  # for a BufferedProtocol that paused
        self._paused = self._closing = self._leaving = self._finished = False
        self._eof_sent = self._eof_seen = self._wrote_after_eof = False
        self._sends = True  # neither half has ended: what is written now is sent
        self._ignored_writes = 0
        self._look_scheduled = False
        self.set_protocol(protocol)
        hub.enter()
        self._stream.waiters = self

    def begin(self) -> None:
        """Tell the protocol, and deliver from the loop's next iteration on."""
        self._protocol.connection_made(self)
        self._look_soon()

    def __repr__(self) -> str:
        state = "closed" if self._finished else "closing" if self._closing else "open"
        return f"<ShmTransport {self._peer} {state}>"

    def __del__(self) -> None:
        if not self._finished:
            message = f"unclosed transport {self!r}"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
            self._wire.hang_up()

    # ---- what it is ----

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``"socket"`` (the rendezvous socket), its names, and ``"peercred"``."""
        if name == "peercred":
            return self._credentials
        if name not in ("socket", "peername", "sockname"):
            return default
        if self._socket is None and not self._finished and not self._stream.lost_error:
            # Of the core's descriptor, which stays the core's: detached when that may close it.
            self._socket = TransportSocket(socket.socket(fileno=self._wire.connection.control_fd))
        if name == "socket" or self._socket is None:
            return default if self._socket is None else self._socket
        try:
            return self._socket.getpeername() if name == "peername" else self._socket.getsockname()
        except OSError:
            return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give data and events to this protocol from now on."""
        self._protocol: Any = protocol
        self._fills = isinstance(protocol, asyncio.BufferedProtocol)
        self._feed = self._feed_buffer if self._fills else self._feed_bytes

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def is_closing(self) -> bool:
        """Whether it is closed, or on the way."""
        return self._closing

    # ---- reading ----

    def is_reading(self) -> bool:
        """Whether the protocol gets what comes."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Deliver nothing until ``resume_reading``; the peer may send some 256 KiB meanwhile."""
        if not self._closing:
            self._paused = True
            self._stream.receiver = None

    def resume_reading(self) -> None:
        """Deliver again."""
        if self._paused and not self._closing:
            self._paused = False
            stream = self._stream
            if self._rest or stream.runs or stream.ended:
                self._look_soon()
            else:
                stream.receiver = self._receive

    def wake(self) -> None:
        """Something has come (the poller's lock is held)."""
        if self._stream.lost_error:
            self._detach_socket()  # the core closes the descriptor
        if not self._look_scheduled and not self._finished:
            self._look_scheduled = True
            self._hub.poller.after_dispatch(self._look)

    def _look_soon(self) -> None:
        if not self._look_scheduled:
            self._look_scheduled = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Do what has become possible."""
        self._look_scheduled = False
        if self._finished:
            return
        stream = self._stream
        if self._leaving:
            self._leave()
            return
        if self._buffer and not stream.lost_error:
            self._flush()
        if not self._paused and not self._closing:
            self._deliver()
        broken = stream.overrun or stream.lost_error == errno.EPROTO
        if broken or (stream.lost_error and self._buffer):
            self._fail(self._wire.lost())
        elif stream.lost_error and (self._closing or self._wrote_after_eof):
            self._finish(None)  # the last write may have come too late: there was an end before

    def _receive(self, data: bytes) -> None:
        """Bytes have come, behind nothing that waits."""
        try:
            if self._fills:
                self._feed_buffer(data)
            else:
                self._protocol.data_received(data)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail_in_protocol(error)

    def _fail_in_protocol(self, error: BaseException) -> None:
        name = "buffer_updated" if self._fills else "data_received"
        self._fail(error, f"Fatal error: protocol.{name}() call failed.")

    def _deliver(self) -> None:
        try:
            while not self._paused and not self._closing:
                if self._rest:
                    rest, self._rest = self._rest, memoryview(b"")
                    self._feed_buffer(rest)
                elif self._stream.runs:
                    self._feed(self._wire.take())
                else:
                    break
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail_in_protocol(error)
            return
        if self._paused or self._closing:
            return
        stream = self._stream
        stream.receiver = self._receive  # nothing waits any more
        if stream.ended and not stream.overrun and not self._eof_seen:
            self._end_of_input()

    def _feed_bytes(self, data: bytes | memoryview) -> None:
        self._protocol.data_received(bytes(data))

    def _feed_buffer(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            if self._paused or self._closing:
                self._rest = left
                return
            if not isinstance(
                self._protocol, asyncio.BufferedProtocol
            ):  # another protocol has taken over
                self._feed(left)
                return
            buffer = memoryview(self._protocol.get_buffer(len(left))).cast("B")
            if not buffer:
                msg = "get_buffer() returned an empty buffer"
                raise RuntimeError(msg)
            count = min(len(buffer), len(left))
            buffer[:count] = left[:count]
            left = left[count:]
            self._protocol.buffer_updated(count)

    def _end_of_input(self) -> None:
        if self._stream.lost_error == errno.EPROTO:
            return
        self._eof_seen = True
        self._sends = False
        try:
            keep_open = self._protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(error, "Fatal error: protocol.eof_received() call failed.")
            return
        if not keep_open:
            self.close()

    # ---- writing ----

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send it, or keep what there is no credit for."""
        if self._sends and not self._buffer and type(data) is bytes and self._wire.send_whole(data):
            poller = self._hub.poller
            if not poller.rests[0]:
                poller.schedule()  # an answer may follow at once
            return
        whole = data if isinstance(data, bytes) else memoryview(data).cast("B")
        if self._eof_sent:
            msg = "Cannot call write() after write_eof()"
            raise RuntimeError(msg)
        if not data:
            return
        if self._finished or self._leaving:
            self._ignored_writes += 1
            if self._ignored_writes == constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                _log.warning("%r: writes after the connection was lost", self)
            return
        self._wrote_after_eof = self._eof_seen
        sent = 0
        if not self._buffer:
            sent = self._try_send(whole)
            self._hub.poller.schedule()
            if sent == len(whole):
                return
        rest = memoryview(whole)[sent:]
        if not isinstance(data, bytes):
            rest = memoryview(bytes(rest))  # theirs to change
        self._buffer.append(rest)
        self._buffered += len(rest)
        self._maybe_pause_protocol()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        """Send all of them as one."""
        self.write(b"".join(list_of_data))

    def _try_send(self, data: bytes | memoryview) -> int:
        """Send as far as there is credit. All of it counts as sent if the connection has failed."""
        if self._stream.lost_error:
            self._fail(self._wire.lost())
            return len(data)
        try:
            return self._wire.send(data)
        except OSError as error:
            self._fail(error)
            return len(data)

    def _flush(self) -> None:
        buffer = self._buffer
        while buffer and self._stream.may_send():
            piece = buffer.popleft()
            if buffer and len(piece) < _JOIN_BYTES:
                pieces = [piece]
                size = len(piece)
                while buffer and size + len(buffer[0]) <= _JOIN_BYTES:
                    size += len(buffer[0])
                    pieces.append(buffer.popleft())
                piece = b"".join(pieces)
            try:
                sent = self._wire.send(piece)
            except OSError as error:
                self._fail(error)
                return
            self._buffered -= sent
            if sent != len(piece):
                buffer.appendleft(memoryview(piece)[sent:])
        self._maybe_resume_protocol()
        if not buffer and (self._eof_sent or self._closing):
            self._end_output()

    def can_write_eof(self) -> bool:
        """Yes."""
        return True

    def write_eof(self) -> None:
        """End our half when all is sent; the peer's may go on."""
        if self._eof_sent or self._closing:
            return
        self._eof_sent = True
        self._sends = False
        if not self._buffer:
            self._end_output()

    def _end_output(self) -> None:
        """All is sent."""
        if self._closing:
            if not self._eof_sent:
                self._wire.send_eof()
            self._leave()
        else:
            self._wire.send_eof()
            self._hub.poller.schedule()

    def get_write_buffer_size(self) -> int:
        """Bytes that wait for credit."""
        return self._buffered

    # ---- the end ----

    def close(self) -> None:
        """Send what is left, hang up, then ``connection_lost(None)``."""
        if self._closing:
            return
        self._closing = True
        self._stream.receiver = None
        if self._stream.lost_error:
            self._finish(None if not self._buffer else self._wire.lost())
        elif not self._buffer:
            self._end_output()

    def abort(self) -> None:
        """Hang up at once, then ``connection_lost(None)``."""
        self._finish(None)

    def _leave(self) -> None:
        """Hang up when all has left this process."""
        self._leaving = True
        self._sends = False
        if not self._stream.lost_error and self._hub.poller.tell_room(self._wire.connection, self):
            return
        self._finish(None)

    def _fail(self, error: BaseException, message: str = "") -> None:
        if message:
            self._loop.call_exception_handler(
                {
                    "message": message,
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
        self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        if self._finished:
            return
        self._finished = self._closing = True
        self._sends = False
        self._buffer.clear()
        self._buffered = 0
        self._rest = memoryview(b"")
        self._detach_socket()
        self._wire.hang_up()
        self._stream.runs.clear()
        self._stream.receiver = None
        self._hub.poller.schedule()  # so that the core lets go of it
        self._loop.call_soon(self._call_connection_lost, error)

    def _call_connection_lost(self, error: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            if self._lost is not None:
                self._lost(self)
                self._lost = None
            self._hub.leave()
            # Who keeps a closed transport keeps no descriptors.
            del self._hub, self._wire

    def _detach_socket(self) -> None:
        if self._socket is not None and self._socket.fileno() >= 0:
            self._socket._sock.detach()  # type: ignore[attr-defined]
