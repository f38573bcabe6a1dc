"""Bare blocking sockets: what people use without an RPC library, simple, honest and fast.

A 4-byte length, then msgpack. No timeouts, no errors, no methods, which a real program would have
to add and pay for. With one client the server blocks in `recv`; with several it waits by epoll.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from .codec import pack, unpack
from .work import answer

_LENGTH = Struct("<I")
_BUFFER_BYTES = 1 << 16
_BACKLOG = 1024


class _Channel:
    """Whole messages over a stream: one `sendall` out and as a rule one `recv_into` in."""

    def __init__(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._sendall = sock.sendall
        self._recv_into = sock.recv_into
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self.close = sock.close

    def send(self, message: bytes) -> None:
        if len(message) < _BUFFER_BYTES:
            self._sendall(_LENGTH.pack(len(message)) + message)
        else:  # a second system call costs less than a copy
            self._sendall(_LENGTH.pack(len(message)))
            self._sendall(message)

    @property
    def has_more(self) -> bool:
        """Whether the next message has begun to arrive."""
        return self._start != self._end

    def receive(self) -> memoryview:
        """Give the next message, valid until the one after it; EOFError when the peer has left."""
        while True:
            start, have = self._start, self._end - self._start
            wanted = _LENGTH.size
            if have >= wanted:
                wanted += _LENGTH.unpack_from(self._view, start)[0]
                if have >= wanted:
                    self._start += wanted
                    if have == wanted:
                        self._start = self._end = 0
                    return self._view[start + _LENGTH.size : start + wanted]
            self._make_room(wanted)
            got = self._recv_into(self._view[self._end :] if self._end else self._view)
            if not got:
                raise EOFError
            self._end += got

    def _make_room(self, wanted: int) -> None:
        if self._start + wanted <= len(self._view):
            return
        rest = bytes(self._view[self._start : self._end])
        if wanted > len(self._view):
            self._view = memoryview(bytearray(wanted))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)


@dataclass(frozen=True)
class _Service:
    address: str
    listener: socket.socket
    clients: int

    def serve(self) -> None:
        if self.clients > 1:
            self._serve_many()
        while True:
            channel = _Channel(self.listener.accept()[0])
            try:
                while True:
                    channel.send(pack(answer(unpack(channel.receive()))))
            except (EOFError, ConnectionError):
                channel.close()

    def _serve_many(self) -> None:
        channels: dict[int, _Channel] = {}
        epoll = select.epoll()
        epoll.register(self.listener, select.EPOLLIN)
        while True:
            for fd, _ in epoll.poll():
                if fd == self.listener.fileno():
                    sock, _ = self.listener.accept()
                    epoll.register(sock, select.EPOLLIN)
                    channels[sock.fileno()] = _Channel(sock)
                elif not self._answer_all(channels[fd]):
                    channels.pop(fd).close()

    @staticmethod
    def _answer_all(channel: _Channel) -> bool:
        """Answer what has arrived; returns whether the client is still there."""
        try:
            channel.send(pack(answer(unpack(channel.receive()))))
            while channel.has_more:
                channel.send(pack(answer(unpack(channel.receive()))))
        except (EOFError, ConnectionError):
            return False
        return True

    def close(self) -> None:
        self.listener.close()


class _Connection:
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._send = channel.send
        self._receive = channel.receive
        self._replies: deque[bytes] = deque()
        self.close = channel.close

    def echo(self, payload: bytes) -> bytes:
        self._send(pack(payload))
        reply: bytes = unpack(self._receive())
        return reply

    def begin(self, payload: bytes) -> None:
        """Send; where the peer does not read because we don't, take its replies meanwhile."""
        sock = self._channel.socket
        message = pack(payload)
        rest = memoryview(_LENGTH.pack(len(message)) + message)
        while rest:
            try:
                rest = rest[sock.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                readable, _, _ = select.select([sock], [sock], [])
                if readable:
                    self._replies.append(unpack(self._receive()))

    def finish(self, token: None) -> bytes:
        _ = token
        if self._replies:
            return self._replies.popleft()
        reply: bytes = unpack(self._receive())
        return reply


@dataclass(frozen=True)
class _Socket:
    """A blocking stream socket of either family."""

    family: socket.AddressFamily
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _Service:
        listener = socket.socket(self.family, socket.SOCK_STREAM)
        if self.family == socket.AF_INET:
            listener.bind(("127.0.0.1", 0))
            address = str(listener.getsockname()[1])
        else:
            address = str(Path(directory, "socket"))
            listener.bind(address)
        listener.listen(_BACKLOG)
        return _Service(address, listener, clients)

    def connect(self, address: str) -> _Connection:
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.connect(("127.0.0.1", int(address)) if self.family == socket.AF_INET else address)
        return _Connection(_Channel(sock))


RAW_UDS = _Socket(socket.AF_UNIX)
RAW_TCP = _Socket(socket.AF_INET)
