"""shmrpc as its users write it, over each transport: the same code at another address."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import shmrpc

from .flows import FLOWS, add_methods
from .work import answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from .measure import Flow


@dataclass(frozen=True)
class _Service:
    address: str
    close: Callable[[], None]

    def serve(self) -> None:
        while True:
            signal.pause()


class _Connection:
    def __init__(self, client: shmrpc.Client) -> None:
        self._client = client
        self.echo: Callable[[bytes], bytes] = partial(client.call, "echo")
        self.begin: Callable[[bytes], Any] = partial(client.submit, "echo")
        self.close = client.close

    def finish(self, token: Any) -> bytes:
        reply: bytes = token.result()
        return reply

    def flow(self, direction: str, name: str) -> Flow:
        return partial(FLOWS[direction][name], self._client)


@dataclass(frozen=True)
class _Rpc:
    """`template` makes the address to listen on; `{directory}` is an absolute path."""

    template: str
    thread_safe: bool = True

    def start(self, directory: str, clients: int) -> _Service:
        _ = clients
        server = shmrpc.Server(self.template.format(directory=directory))
        server.method(name="echo")(answer)
        add_methods(server)
        server.start()
        return _Service(str(server.addresses[0]), partial(server.stop, grace=0))

    def connect(self, address: str) -> _Connection:
        return _Connection(shmrpc.connect(address))


SHM = _Rpc("shm://{directory}/socket")
UNIX = _Rpc("unix://{directory}/socket")
TCP = _Rpc("tcp://127.0.0.1:0")
