"""A bare asyncio.Protocol over a Unix socket with msgpack, on the standard loop and on uvloop."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, cast

from .codec import pack, unpack
from .work import answer

if TYPE_CHECKING:
    from collections.abc import Callable

_LENGTH = Struct("<I")

__all__ = ["ASYNCIO", "UVLOOP", "LoopService", "new_asyncio_loop", "new_uvloop_loop"]


def new_asyncio_loop() -> asyncio.AbstractEventLoop:
    """Make the standard library's loop."""
    return asyncio.SelectorEventLoop()


def new_uvloop_loop() -> asyncio.AbstractEventLoop:
    """Make uvloop's; raises ImportError where that is not installed."""
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


@dataclass(frozen=True)
class LoopService:
    """A server that has been started on a loop which does not run yet."""

    address: str
    loop: asyncio.AbstractEventLoop
    close: Callable[[], None]

    def serve(self) -> None:
        """Run the loop until SIGTERM."""
        self.loop.run_forever()


class _Frames(asyncio.Protocol, ABC):
    """Cuts what arrives into messages."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        head = _LENGTH.size
        whole = not self._buffer and len(data) >= head  # one whole message, as a rule
        if whole and len(data) == head + _LENGTH.unpack_from(data)[0]:
            self.message_received(memoryview(data)[head:])
            return
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= head:
            end = start + head + _LENGTH.unpack_from(self._buffer, start)[0]
            if len(self._buffer) < end:
                break
            self.message_received(memoryview(self._buffer[start + head : end]))
            start = end
        del self._buffer[:start]

    @abstractmethod
    def message_received(self, message: memoryview) -> None:
        """Take a whole one, which is valid until this returns."""

    def send(self, message: bytes) -> None:
        self.transport.write(_LENGTH.pack(len(message)) + message)


class _Server(_Frames):
    def message_received(self, message: memoryview) -> None:
        self.send(pack(answer(unpack(message))))


class _Connection(_Frames):
    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._loop = asyncio.get_running_loop()
        self._lost = self._loop.create_future()

    def message_received(self, message: memoryview) -> None:
        self._waiting.popleft().set_result(unpack(message))

    def connection_lost(self, exc: Exception | None) -> None:
        for future in self._waiting:
            future.set_exception(exc or ConnectionResetError("the server has left"))
        self._lost.set_result(None)

    async def echo(self, payload: bytes) -> bytes:
        future = self._loop.create_future()
        self._waiting.append(future)
        self.send(pack(payload))
        reply: bytes = await future
        return reply

    async def close(self) -> None:
        self.transport.close()
        await self._lost


@dataclass(frozen=True)
class _Loop:
    new_loop: Callable[[], asyncio.AbstractEventLoop]

    def start(self, directory: str, clients: int) -> LoopService:
        address = str(Path(directory, "socket"))
        loop = self.new_loop()
        # asyncio waits for ever for a Unix socket that had no room for one more.
        listening = loop.create_unix_server(_Server, address, backlog=max(100, clients))
        server = loop.run_until_complete(listening)
        return LoopService(address, loop, server.close)

    async def connect_async(self, address: str) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(_Connection, address)
        return connection


ASYNCIO = _Loop(new_asyncio_loop)
UVLOOP = _Loop(new_uvloop_loop)
