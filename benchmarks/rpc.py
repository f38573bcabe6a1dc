"""shmrpc as its users write it, over each transport: the same code at another address."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shmrpc import Server, connect

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class _Service:
    address: str
    close: Callable[[], None]

    def serve(self) -> None:
        while True:
            signal.pause()


@dataclass(frozen=True)
class _Connection:
    echo: Callable[[bytes], bytes]
    close: Callable[[], None]


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

        server.start()
        return _Service(str(server.addresses[0]), partial(server.stop, grace=0))

    def connect(self, address: str) -> _Connection:
        client = connect(address)
        return _Connection(partial(client.call, "echo"), client.close)


SHM = _Rpc("shm://{directory}/socket")
UNIX = _Rpc("unix://{directory}/socket")
TCP = _Rpc("tcp://127.0.0.1:0")
