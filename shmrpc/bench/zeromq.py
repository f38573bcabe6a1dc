"""pyzmq over ipc: a DEALER that calls a REP socket, blocking and on asyncio.

A DEALER, because a REQ socket allows one call at a time; the empty frame is what REQ would send.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from .codec import pack, unpack
from .loops import LoopService, new_asyncio_loop
from .work import answer


@dataclass(frozen=True)
class _Service:
    address: str
    socket: Any

    def serve(self) -> None:
        receive, send = self.socket.recv, self.socket.send
        while True:
            send(pack(answer(unpack(receive()))))

    def close(self) -> None:
        self.socket.close(linger=0)


class _Connection:
    def __init__(self, socket: Any) -> None:
        self._send = socket.send_multipart
        self._receive = socket.recv_multipart
        self._socket = socket

    def begin(self, payload: bytes) -> None:
        self._send([b"", pack(payload)])

    def finish(self, token: None) -> bytes:
        _ = token
        reply: bytes = unpack(self._receive()[1])
        return reply

    def echo(self, payload: bytes) -> bytes:
        self._send([b"", pack(payload)])
        reply: bytes = unpack(self._receive()[1])
        return reply

    def close(self) -> None:
        self._socket.close(linger=0)


def _unlimited(socket: Any) -> Any:
    """Let any number of messages wait: a client's window is limited by itself."""
    socket.set_hwm(0)
    return socket


@dataclass(frozen=True)
class _Sync:
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _Service:
        _ = clients
        socket = _unlimited(zmq.Context.instance().socket(zmq.REP))
        address = f"ipc://{directory}/socket"
        socket.bind(address)
        return _Service(address, socket)

    def connect(self, address: str) -> _Connection:
        socket = _unlimited(zmq.Context.instance().socket(zmq.DEALER))
        socket.connect(address)
        return _Connection(socket)


class _AioConnection:
    """Replies come in the order of the calls: the one REP socket answers one after the other."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._loop = asyncio.get_running_loop()
        self._reader = self._loop.create_task(self._read())

    async def _read(self) -> None:
        while True:
            _, body = await self._socket.recv_multipart()
            self._waiting.popleft().set_result(unpack(body))

    async def echo(self, payload: bytes) -> bytes:
        future = self._loop.create_future()
        self._waiting.append(future)
        await self._socket.send_multipart([b"", pack(payload)])
        reply: bytes = await future
        return reply

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.wait([self._reader])
        self._socket.close(linger=0)


@dataclass(frozen=True)
class _Aio:
    def new_loop(self) -> asyncio.AbstractEventLoop:
        return new_asyncio_loop()

    def start(self, directory: str, clients: int) -> LoopService:
        _ = clients
        loop = self.new_loop()
        address = f"ipc://{directory}/socket"

        async def listen() -> Any:
            socket = _unlimited(zmq.asyncio.Context.instance().socket(zmq.REP))
            socket.bind(address)
            return socket

        async def serve(socket: Any) -> None:
            while True:
                await socket.send(pack(answer(unpack(await socket.recv()))))

        socket = loop.run_until_complete(listen())
        task = loop.create_task(serve(socket))

        def stop() -> None:
            task.cancel()
            socket.close(linger=0)

        return LoopService(address, loop, stop)

    async def connect_async(self, address: str) -> _AioConnection:
        socket = _unlimited(zmq.asyncio.Context.instance().socket(zmq.DEALER))
        socket.connect(address)
        return _AioConnection(socket)


SYNC = _Sync()
AIO = _Aio()
