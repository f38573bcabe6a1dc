"""pynng over ipc: a Req0 that calls a Rep0 socket, with a context for each call under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynng

from .codec import pack, unpack
from .work import answer


@dataclass(frozen=True)
class _Service:
    address: str
    socket: Any

    def serve(self) -> None:
        receive, send = self.socket.recv, self.socket.send
        while True:
            send(pack(answer(unpack(receive()))))

    def close(self) -> None:
        self.socket.close()


class _Connection:
    def __init__(self, address: str) -> None:
        self._socket = pynng.Req0(dial=address, recv_max_size=0)
        self._idle: list[Any] = []

    def begin(self, payload: bytes) -> Any:
        context = self._idle.pop() if self._idle else self._socket.new_context()
        context.send(pack(payload))
        return context

    def finish(self, token: Any) -> bytes:
        reply: bytes = unpack(token.recv())
        self._idle.append(token)
        return reply

    def echo(self, payload: bytes) -> bytes:
        self._socket.send(pack(payload))
        reply: bytes = unpack(self._socket.recv())
        return reply

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
        self._socket.close()


@dataclass(frozen=True)
class _Nng:
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _Service:
        _ = clients
        address = f"ipc://{directory}/socket"
        return _Service(address, pynng.Rep0(listen=address, recv_max_size=0))

    def connect(self, address: str) -> _Connection:
        return _Connection(address)


NNG = _Nng()
