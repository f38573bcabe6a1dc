"""Items of 64 bytes in one direction: as a stream, and as calls of which many are under way.

A flow moves items until an instant, waits until all that it sent have arrived, and says how many.
Each item is packed by its sender; its receiver unpacks it and compares it with what it has to be.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from .pace import now_ns
from .work import PAYLOAD, WrongPayloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmrpc import Client, Server

DOWN = "server to client"
UP = "client to server"


def add_methods(server: Server) -> None:
    """Offer what the flows call."""

    @server.method
    def give() -> bytes:
        return PAYLOAD

    @server.method
    def take(item: bytes) -> None:
        if item != PAYLOAD:
            raise WrongPayloadError

    @server.method
    def give_all() -> Iterator[bytes]:
        while True:
            yield PAYLOAD

    @server.method(requests=True)
    def take_all(items: Iterator[bytes]) -> int:
        count = 0
        for item in items:
            if item != PAYLOAD:
                raise WrongPayloadError
            count += 1
        return count


def _stream_down(client: Client, until_ns: int) -> int:
    count = 0
    with client.stream("give_all") as items:
        for item in items:
            if item != PAYLOAD:
                raise WrongPayloadError
            count += 1
            if now_ns() >= until_ns:
                break
    return count


def _stream_up(client: Client, until_ns: int) -> int:
    count = 0
    with client.open("take_all") as call:
        while True:
            call.send(PAYLOAD)
            count += 1
            if now_ns() >= until_ns:
                break
        if call.result() != count:
            raise WrongPayloadError
    return count


def _calls(client: Client, until_ns: int, *, up: bool, window: int) -> int:
    request, reply = (("take", PAYLOAD), None) if up else (("give",), PAYLOAD)
    count = 0
    under_way = deque(client.submit(*request) for _ in range(window))
    while under_way:
        if under_way.popleft().result() != reply:
            raise WrongPayloadError
        count += 1
        if now_ns() < until_ns:
            under_way.append(client.submit(*request))
    return count


FLOWS: dict[str, dict[str, Callable[[Client, int], int]]] = {
    DOWN: {
        "stream": _stream_down,
        "64 calls": partial(_calls, up=False, window=64),
        "512 calls": partial(_calls, up=False, window=512),
    },
    UP: {
        "stream": _stream_up,
        "64 calls": partial(_calls, up=True, window=64),
        "512 calls": partial(_calls, up=True, window=512),
    },
}
"""By direction and name; to be given a client and the instant at which they end."""
