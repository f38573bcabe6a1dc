"""rpyc over a Unix socket: bytes by value, without the compression that it tries by default."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rpyc
from rpyc.core.channel import Channel
from rpyc.utils.factory import unix_connect
from rpyc.utils.server import ThreadedServer

from .work import answer

Channel.COMPRESSION_THRESHOLD = sys.maxsize  # the payload can't be compressed; trying is lost time


class _Echo(rpyc.Service):  # type: ignore[misc] # untyped
    def exposed_echo(self, payload: bytes) -> bytes:
        return answer(payload)


@dataclass(frozen=True)
class _Service:
    address: str
    server: Any

    def serve(self) -> None:
        self.server.start()

    def close(self) -> None:
        self.server.close()


class _Connection:
    def __init__(self, address: str) -> None:
        self._connection = unix_connect(address)
        self.echo = self._connection.root.echo
        self.begin = rpyc.async_(self.echo)
        self.close = self._connection.close

    def finish(self, token: Any) -> bytes:
        reply: bytes = token.value
        return reply


@dataclass(frozen=True)
class _Rpyc:
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _Service:
        _ = clients
        address = str(Path(directory, "socket"))
        server = ThreadedServer(_Echo, socket_path=address, listener_timeout=None)
        server._listen()  # `start` would do it, after the clients have been told
        return _Service(address, server)

    def connect(self, address: str) -> _Connection:
        return _Connection(address)


RPYC = _Rpyc()
