"""What people use today without an RPC library, each as the honest, simple, fast version.

One blocking server loop without threads, one client, msgpack on both sides; no timeouts, no errors,
no concurrency, which a real program would have to add and pay for.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.codec import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

_LENGTH = Struct("<I")
_BUFFER_BYTES = 65536


class _Channel(Protocol):
    """Whole messages over a stream; `receive` raises EOFError when the other side has left."""

    def send(self, message: bytes) -> None: ...
    def receive(self) -> bytes | memoryview: ...
    def close(self) -> None: ...


class _SocketChannel:
    """A 4-byte length, then the message: one `sendall` out and as a rule one `recv_into` in.

    Only for strict request and response of messages below 64 KiB: then what arrives together is
    never more than one message, and needs no queue.
    """

    def __init__(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sendall = sock.sendall
        self._recv_into = sock.recv_into
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self.close = sock.close

    def send(self, message: bytes) -> None:
        self._sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> memoryview:
        view = self._view
        have = 0
        end = _LENGTH.size
        while have < end:
            got = self._recv_into(view[have:] if have else view)
            if not got:
                raise EOFError
            have += got
            if have >= _LENGTH.size:
                end = _LENGTH.size + _LENGTH.unpack_from(view)[0]
        return view[_LENGTH.size : end]


class _PipeChannel:
    """A `multiprocessing` Connection: the class behind `multiprocessing.Pipe`, on a Unix socket."""

    def __init__(self, connection: Any) -> None:
        self.send: Callable[[bytes], None] = connection.send_bytes
        self.receive: Callable[[], bytes] = connection.recv_bytes
        self.close: Callable[[], None] = connection.close


@dataclass(frozen=True)
class _Service:
    """Answers one connection at a time, which is all that a benchmark client needs."""

    address: str
    accept: Callable[[], _Channel]
    close: Callable[[], None]

    def serve(self) -> None:
        while True:
            channel = self.accept()
            try:
                while True:
                    channel.send(pack(unpack(channel.receive())))
            except (EOFError, ConnectionError):
                channel.close()


class _Connection:
    def __init__(self, channel: _Channel) -> None:
        self._send = channel.send
        self._receive = channel.receive
        self.close = channel.close

    def echo(self, payload: bytes) -> bytes:
        self._send(pack(payload))
        reply: bytes = unpack(self._receive())
        return reply


@dataclass(frozen=True)
class _Socket:
    """A blocking stream socket of either family."""

    family: socket.AddressFamily
    thread_safe: bool = False

    def start(self, directory: str) -> _Service:
        listener = socket.socket(self.family, socket.SOCK_STREAM)
        if self.family == socket.AF_INET:
            listener.bind(("127.0.0.1", 0))
            address = str(listener.getsockname()[1])
        else:
            address = str(Path(directory, "socket"))
            listener.bind(address)
        listener.listen()
        return _Service(address, lambda: _SocketChannel(listener.accept()[0]), listener.close)

    def connect(self, address: str) -> _Connection:
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.connect(("127.0.0.1", int(address)) if self.family == socket.AF_INET else address)
        return _Connection(_SocketChannel(sock))


@dataclass(frozen=True)
class _Pipe:
    """`multiprocessing.Pipe`, through Listener and Client because neither side forks the other."""

    thread_safe: bool = False

    def start(self, directory: str) -> _Service:
        listener = Listener(str(Path(directory, "socket")), "AF_UNIX")
        return _Service(
            str(listener.address), lambda: _PipeChannel(listener.accept()), listener.close
        )

    def connect(self, address: str) -> _Connection:
        return _Connection(_PipeChannel(Client(address, "AF_UNIX")))


RAW_UDS = _Socket(socket.AF_UNIX)
RAW_TCP = _Socket(socket.AF_INET)
MP_PIPE = _Pipe()
