"""shmrpc as its users write it, over each transport: the same code at another address."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.flows import FLOWS, add_methods
from shmrpc import Client, Server, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Flow


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
        self.echo: Callable[[bytes], bytes] = partial(client.call, "echo")
        self.close = client.close

    def flow(self, direction: str, name: str) -> Flow:
        return partial(FLOWS[direction][name], self._client)


@dataclass(frozen=True)
class _Rpc:
    """`template` makes the address to listen on; `{directory}` is an absolute path."""

    template: str
    thread_safe: bool = True

    def start(self, directory: str) -> _Service:
        server = Server(self.template.format(directory=directory))

        @server.method
        def echo(x: bytes) -> bytes:
            return x

        add_methods(server)
        server.start()
        return _Service(str(server.addresses[0]), partial(server.stop, grace=0))

    def connect(self, address: str) -> _Connection:
        return _Connection(connect(address))


SHM = _Rpc("shm://{directory}/socket")
UNIX = _Rpc("unix://{directory}/socket")
TCP = _Rpc("tcp://127.0.0.1:0")
