"""thriftpy2 over a Unix socket, with its compiled protocol and transport."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import thriftpy2
from thriftpy2.protocol import TCyBinaryProtocolFactory
from thriftpy2.rpc import make_client
from thriftpy2.server import TThreadedServer
from thriftpy2.thrift import TProcessor
from thriftpy2.transport import TCyBufferedTransportFactory, TServerSocket

from .work import answer

_IDL = "service Echo { binary echo(1: binary payload) }"
_definition: Any = thriftpy2.load_fp(io.StringIO(_IDL), "echo_thrift")


class _Handler:
    def echo(self, payload: bytes) -> bytes:
        return answer(payload)


@dataclass(frozen=True)
class _Service:
    address: str
    server: Any

    def serve(self) -> None:
        self.server.serve()

    def close(self) -> None:
        self.server.trans.close()


class _Connection:
    def __init__(self, address: str) -> None:
        self._client = make_client(
            _definition.Echo,
            unix_socket=address,
            proto_factory=TCyBinaryProtocolFactory(),
            trans_factory=TCyBufferedTransportFactory(),
            timeout=None,
        )
        self.echo = self._client.echo
        self.close = self._client.close


@dataclass(frozen=True)
class _Thrift:
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _Service:
        _ = clients
        address = str(Path(directory, "socket"))
        trans = TServerSocket(unix_socket=address, client_timeout=None)
        trans.listen()
        trans.listen = lambda: None  # `serve` would do it, after the clients have been told
        server = TThreadedServer(
            TProcessor(_definition.Echo, _Handler()),
            trans,
            iprot_factory=TCyBinaryProtocolFactory(),
            itrans_factory=TCyBufferedTransportFactory(),
            daemon=True,
        )
        return _Service(address, server)

    def connect(self, address: str) -> _Connection:
        return _Connection(address)


THRIFT = _Thrift()
