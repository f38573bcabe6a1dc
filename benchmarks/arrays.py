"""Contenders of the topic `large`: numpy arrays of any size, as echo, as argument and one way.

Of an `echo` and of a stream's item all is written just before it is sent, and all is read by who
receives it: memory that nobody touches is free everywhere. Of `give` and `loan`, which are about
the way there alone, the first and the last number are read.
"""

from __future__ import annotations

import signal
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

import msgpack
import numpy as np

from shmrpc import Client, Server, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Array = np.ndarray[Any, Any]
    Work = Callable[[], None]
    """Does it once, and raises `WrongArrayError` if something else arrives than was sent."""
    Flow = Callable[[int], int]
    """Moves items until an instant; returns how many, when all of them have arrived."""

DOWN, UP = "down", "up"  # to the client, to the server
now_ns = time.perf_counter_ns


class WrongArrayError(Exception):
    """What arrived is not what had been sent."""


class Service(Protocol):
    """The answering side, in a process of its own."""

    @property
    def address(self) -> str:
        """Where clients connect."""

    def serve(self) -> None:
        """Answer one client after the other; uses no CPU time between them."""

    def close(self) -> None:
        """Give everything back."""


class Connection(Protocol):
    """The calling side."""

    def work(self, name: str, nbytes: int) -> Work:
        """Give what does `echo`, `give` or `loan` with an array of so many bytes."""

    def flow(self, direction: str) -> Flow:
        """Give what moves arrays of `ITEM_BYTES` that way."""

    def close(self) -> None:
        """Hang up."""


class Contender(Protocol):
    """One way for arrays between two processes."""

    def start(self, directory: str) -> Service:
        """Listen; files go into `directory`."""

    def connect(self, address: str) -> Connection:
        """Connect, in another process."""


ITEM_BYTES = 1 << 20  # of a stream
MAX_BYTES = 300 << 20
_INT = 8


class Source:
    """An array that is written anew before each time that it is sent."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self._number = 0

    def write(self) -> Array:
        """Fill it with the next number."""
        self._number += 1
        self.array.fill(self._number)
        return self.array

    def compare(self, array: Array) -> None:
        """Read all of a copy of it."""
        if int(array.sum()) != self._number * self.array.size:
            raise WrongArrayError

    def compare_ends(self, total: int) -> None:
        """Compare the sum of its first and last item."""
        if total != 2 * self._number:
            raise WrongArrayError


def _new(nbytes: int) -> Array:
    return np.zeros(nbytes // _INT, np.int64)


def _ends(array: Array) -> int:
    return int(array[0]) + int(array[-1])


def _check(array: Array) -> None:
    """Read an item of a stream: all its numbers are the same, and not 0."""
    if int(array.sum()) != int(array[0]) * array.size:
        raise WrongArrayError


# ---- shmrpc ----


@dataclass(frozen=True)
class _Service:
    address: str
    close: Callable[[], None]

    def serve(self) -> None:
        while True:
            signal.pause()


class _Connection:
    def __init__(self, client: Client) -> None:
        self._client = client
        self.close = client.close

    def work(self, name: str, nbytes: int) -> Work:
        call = self._client.call
        array = self._client.empty(nbytes // _INT, np.int64) if name == "loan" else _new(nbytes)
        source = Source(array)
        if name == "echo":
            return lambda: source.compare(call("echo", source.write()))
        source.write()  # once: what is measured is the way there
        return lambda: source.compare_ends(call("ends", array))

    def flow(self, direction: str) -> Flow:
        return partial(_stream_down if direction == DOWN else _stream_up, self._client)


def _stream_down(client: Client, until_ns: int) -> int:
    count = 0
    with client.stream("give_arrays") as items:
        for item in items:
            _check(item)
            count += 1
            if now_ns() >= until_ns:
                break
    return count


def _stream_up(client: Client, until_ns: int) -> int:
    count = 0
    source = Source(_new(ITEM_BYTES))
    with client.open("take_arrays") as call:
        while now_ns() < until_ns or not count:
            call.send(source.write())
            count += 1
        if call.result() != count:
            raise WrongArrayError
    return count


@dataclass(frozen=True)
class _Rpc:
    """`template` makes the address to listen on; `{directory}` is an absolute path."""

    template: str

    def start(self, directory: str) -> _Service:
        server = Server(
            self.template.format(directory=directory),
            max_message_bytes=MAX_BYTES,
            max_memory_bytes=2 * MAX_BYTES,
        )

        @server.method
        def echo(array: Array) -> Array:
            array.sum()
            return array

        @server.method
        def ends(array: Array) -> int:
            return _ends(array)

        @server.method
        def give_arrays() -> Iterator[Array]:
            source = Source(_new(ITEM_BYTES))
            while True:
                yield source.write()

        @server.method(requests=True)
        def take_arrays(items: Iterator[Array]) -> int:
            count = 0
            for item in items:
                _check(item)
                count += 1
            return count

        server.start()
        return _Service(str(server.addresses[0]), partial(server.stop, grace=0))

    def connect(self, address: str) -> _Connection:
        return _Connection(
            connect(address, max_message_bytes=MAX_BYTES, max_memory_bytes=2 * MAX_BYTES)
        )


# ---- a Unix socket and msgpack ----

_LENGTHS = Struct("<IQ")


class _Channel:
    """Messages of msgpack values, of which the last may be an array.

    Either the array is packed with the rest, as bytes, into a reused buffer at the receiver; or it
    is sent from where it lies behind the rest, and received into memory of its own (`gather`).
    """

    def __init__(self, sock: socket.socket, *, gather: bool) -> None:
        self._sock = sock
        self._gather = gather
        self._pack = msgpack.Packer().pack
        self._room = bytearray(1 << 16)
        self.close = sock.close

    def send(self, *values: Any, array: Array | None = None) -> None:
        data: memoryview | bytes = b"" if array is None else array.data.cast("B")
        if not self._gather:
            values, data = (*values, data), b""
        body = self._pack(values)
        rest = [memoryview(_LENGTHS.pack(len(body), len(data))), memoryview(body), memoryview(data)]
        while rest:
            sent = self._sock.sendmsg(rest)
            while rest and sent >= rest[0].nbytes:
                sent -= rest.pop(0).nbytes
            if rest:
                rest[0] = rest[0][sent:]

    def receive(self) -> list[Any]:
        self._receive_into(view := memoryview(bytearray(_LENGTHS.size)))
        size, data_size = _LENGTHS.unpack(view)
        if size > len(self._room):
            self._room = bytearray(size)
        body = memoryview(self._room)[:size]
        self._receive_into(body)
        values: list[Any] = msgpack.unpackb(body)
        if self._gather:
            array = np.empty(data_size // _INT, np.int64)
            if data_size:
                self._receive_into(array.data.cast("B"))
        else:
            array = np.frombuffer(values.pop(), np.int64)
        return [*values, array]

    def _receive_into(self, view: memoryview) -> None:
        while view:
            got = self._sock.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]


@dataclass(frozen=True)
class _SocketService:
    address: str
    accept: Callable[[], _Channel]
    close: Callable[[], None]

    def serve(self) -> None:
        while True:
            channel = self.accept()
            try:
                self._answer(channel)
            except (EOFError, ConnectionError):
                channel.close()

    @staticmethod
    def _answer(channel: _Channel) -> None:
        count = 0
        source = Source(_new(ITEM_BYTES))
        while True:
            what, number, array = channel.receive()
            if what == "echo":
                array.sum()
                channel.send(array=array)
            elif what == "ends":
                channel.send(_ends(array))
            elif what == "give":
                for _ in range(number):
                    channel.send(array=source.write())
            elif what == "take":
                _check(array)
                count += 1
            elif what == "count":
                channel.send(count)
                count = 0


class _SocketConnection:
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self.close = channel.close

    def work(self, name: str, nbytes: int) -> Work:
        source = Source(_new(nbytes))
        channel = self._channel

        def echo() -> None:
            channel.send("echo", 0, array=source.write())
            source.compare(channel.receive()[-1])

        source.write()

        def ends() -> None:
            channel.send("ends", 0, array=source.array)
            source.compare_ends(channel.receive()[0])

        return echo if name == "echo" else ends

    def flow(self, direction: str) -> Flow:
        return self._down if direction == DOWN else self._up

    def _down(self, until_ns: int) -> int:
        channel = self._channel
        batch, count = 8, 0
        left = batch
        channel.send("give", left)
        while left:
            _check(channel.receive()[-1])
            count += 1
            left -= 1
            if left == batch // 2 and now_ns() < until_ns:  # the next come without a pause
                channel.send("give", batch)
                left += batch
        return count

    def _up(self, until_ns: int) -> int:
        source = Source(_new(ITEM_BYTES))
        count = 0
        while now_ns() < until_ns or not count:
            self._channel.send("take", 0, array=source.write())
            count += 1
        self._channel.send("count", 0)
        if self._channel.receive()[0] != count:
            raise WrongArrayError
        return count


@dataclass(frozen=True)
class _Socket:
    gather: bool

    def start(self, directory: str) -> _SocketService:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address := str(Path(directory, "socket")))
        listener.listen()
        return _SocketService(
            address,
            lambda: _Channel(listener.accept()[0], gather=self.gather),
            listener.close,
        )

    def connect(self, address: str) -> _SocketConnection:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        return _SocketConnection(_Channel(sock, gather=self.gather))


# ---- the machine ----


class _Copying:
    """No peer at all: memory of one array into memory of another, both warm."""

    address = "here"

    def start(self, _directory: str) -> _Copying:
        return self

    def connect(self, _address: str) -> _Copying:
        return self

    def serve(self) -> None:
        while True:
            signal.pause()

    def work(self, _name: str, nbytes: int) -> Work:
        source, target = Source(_new(nbytes)), _new(nbytes)
        source.write()
        return partial(np.copyto, target, source.array)

    def flow(self, direction: str) -> Flow:
        msg = f"memcpy copies here, and streams nothing {direction}"
        raise ValueError(msg)

    def close(self) -> None:
        """There is nothing to give back."""


SHM = _Rpc("shm://{directory}/socket")
UNIX = _Rpc("unix://{directory}/socket")
RAW_UDS = _Socket(gather=False)
RAW_UDS_GATHER = _Socket(gather=True)
MEMCPY = _Copying()
