"""grpcio over a Unix socket, blocking and on asyncio: generic methods, messages of msgpack."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import msgpack

from .loops import LoopService, new_asyncio_loop
from .work import answer

if TYPE_CHECKING:
    from collections.abc import Callable

_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_METHOD = "/bench.Echo/echo"
_WORKERS = 16  # as many as shmrpc's server has by default

# A packer of one's own for each call: several threads serialize at a time.
_pack: Callable[[Any], bytes] = msgpack.packb
_unpack: Callable[[bytes], Any] = msgpack.unpackb


def _echo(request: bytes, context: Any) -> bytes:
    _ = context
    return answer(request)


async def _echo_async(request: bytes, context: Any) -> bytes:
    _ = context
    return answer(request)


def _handler(method: Any) -> Any:
    unary = grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=_unpack, response_serializer=_pack
    )
    return grpc.method_handlers_generic_handler("bench.Echo", {"echo": unary})


def _stub(channel: Any) -> Any:
    return channel.unary_unary(_METHOD, request_serializer=_pack, response_deserializer=_unpack)


@dataclass(frozen=True)
class _Service:
    address: str
    server: Any

    def serve(self) -> None:
        self.server.wait_for_termination()

    def close(self) -> None:
        self.server.stop(None).wait()


class _Connection:
    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self.echo = _stub(self._channel)
        self.begin = self.echo.future
        self.close = self._channel.close

    def finish(self, token: Any) -> bytes:
        reply: bytes = token.result()
        return reply


@dataclass(frozen=True)
class _Sync:
    thread_safe: bool = True

    def start(self, directory: str, clients: int) -> _Service:
        _ = clients
        address = f"unix:{directory}/socket"
        server = grpc.server(ThreadPoolExecutor(_WORKERS), [_handler(_echo)], options=_OPTIONS)
        server.add_insecure_port(address)
        server.start()
        return _Service(address, server)

    def connect(self, address: str) -> _Connection:
        return _Connection(address)


class _AioConnection:
    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = _stub(self._channel)

    async def echo(self, payload: bytes) -> bytes:
        reply: bytes = await self._stub(payload)
        return reply

    async def close(self) -> None:
        await self._channel.close()


@dataclass(frozen=True)
class _Aio:
    def new_loop(self) -> asyncio.AbstractEventLoop:
        loop = new_asyncio_loop()
        asyncio.set_event_loop(loop)  # grpc.aio looks for it there
        return loop

    def start(self, directory: str, clients: int) -> LoopService:
        _ = clients
        address = f"unix:{directory}/socket"
        loop = self.new_loop()

        async def listen() -> Any:
            server = grpc.aio.server(handlers=[_handler(_echo_async)], options=_OPTIONS)
            server.add_insecure_port(address)
            await server.start()
            return server

        server = loop.run_until_complete(listen())
        return LoopService(address, loop, lambda: loop.run_until_complete(server.stop(None)))

    async def connect_async(self, address: str) -> _AioConnection:
        return _AioConnection(address)


SYNC = _Sync()
AIO = _Aio()
