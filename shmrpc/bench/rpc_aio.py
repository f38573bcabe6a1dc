"""`shmrpc.aio` as its users write it: both sides asynchronous, on the standard loop or uvloop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shmrpc import aio

from .loops import LoopService, new_asyncio_loop, new_uvloop_loop
from .work import answer

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class _Connection:
    def __init__(self, client: aio.Client) -> None:
        self._client = client
        self.echo = partial(client.call, "echo")
        self.close = client.close


@dataclass(frozen=True)
class _Rpc:
    template: str
    new_loop: Callable[[], asyncio.AbstractEventLoop] = new_asyncio_loop

    def start(self, directory: str, clients: int) -> LoopService:
        _ = clients
        loop = self.new_loop()
        server = aio.Server(self.template.format(directory=directory))

        @server.method
        async def echo(payload: bytes) -> bytes:
            return answer(payload)

        def stop() -> None:
            loop.run_until_complete(server.stop(grace=0))

        loop.run_until_complete(server.start())
        return LoopService(server.addresses[0], loop, stop)

    async def connect_async(self, address: str) -> _Connection:
        return _Connection(await aio.connect(address))


SHM = _Rpc("shm://{directory}/socket")
UNIX = _Rpc("unix://{directory}/socket")
SHM_UVLOOP = _Rpc("shm://{directory}/socket", new_uvloop_loop)
