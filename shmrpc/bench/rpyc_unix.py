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

from .contenders import UnsupportedError
from .work import answer

_UNDER_WAY_BYTES_MAX = 64 << 10  # what a Unix socket holds at least

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
        self.close = self._connection.close
        self._begin = rpyc.async_(self.echo)
        self._under_way_bytes = 0

    def begin(self, payload: bytes) -> Any:
        self._under_way_bytes += len(payload)
        if self._under_way_bytes > _UNDER_WAY_BYTES_MAX:
            raise UnsupportedError("it does not read while it writes: so much would block it")
        return self._begin(payload)

    def finish(self, token: Any) -> bytes:
        reply: bytes = token.value
        self._under_way_bytes -= len(reply)
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
