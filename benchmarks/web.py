"""FastAPI behind uvicorn, called by aiohttp: over shared memory and over a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import fastapi
import uvicorn

from shmrpc import aio
from shmrpc.bench.loops import LoopService, new_asyncio_loop
from shmrpc.bench.work import answer

if TYPE_CHECKING:
    from collections.abc import Callable

_TEXT = "application/octet-stream"


def _app() -> fastapi.FastAPI:
    app = fastapi.FastAPI()

    @app.post("/hello")
    async def hello(payload: fastapi.Request) -> fastapi.Response:
        return fastapi.Response(answer(await payload.body()), media_type=_TEXT)

    return app


class _Connection:
    def __init__(self, path: str) -> None:
        connector = aiohttp.UnixConnector(path)
        self._session = aiohttp.ClientSession(connector=connector)

    async def echo(self, payload: bytes) -> bytes:
        async with self._session.post("http://web/hello", data=payload) as response:
            return await response.read()

    async def close(self) -> None:
        await self._session.close()


@dataclass(frozen=True)
class _Web:
    new_loop: Callable[[], asyncio.AbstractEventLoop]
    path_of: Callable[[str], str]  # what libraries are given for the path of a socket

    def start(self, directory: str, clients: int) -> LoopService:
        _ = clients
        path = str(Path(directory, "socket"))
        loop = self.new_loop()
        uds = self.path_of(path)
        config = uvicorn.Config(_app(), uds=uds, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]

        async def listen() -> asyncio.Task[None]:
            serving = asyncio.ensure_future(server.serve())
            while not server.started:  # noqa: ASYNC110 - it has nothing to wait for
                await asyncio.sleep(0.001)
            return serving

        serving = loop.run_until_complete(listen())

        def stop() -> None:
            server.should_exit = True
            loop.run_until_complete(serving)

        return LoopService(path, loop, stop)

    async def connect_async(self, address: str) -> _Connection:
        return _Connection(self.path_of(address))


def _marked(path: str) -> str:
    """The same, known to loops of ours as a place of shared memory."""
    return aio.socket_path(f"shm://{path}")


SHM = _Web(aio.new_event_loop, _marked)
UDS = _Web(new_asyncio_loop, str)
