"""Calling the other way under asyncio: what a handler calls its caller with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmrpc.errors import ConnectionLost

from .channel import Channel

if TYPE_CHECKING:
    from shmrpc.poller import Connection

__all__ = ["Caller"]


class Caller(Channel):
    """Calls the client at the other end of a server's connection; as ``shmrpc``'s, awaitable."""

    def __init__(self, connection: Connection, timeout: float = 5.0) -> None:
        """``timeout`` in seconds is what ``ping`` waits by default."""
        super().__init__(connection.codec, timeout)
        self._peer = connection
        self._link = None if connection.closed else connection

    async def _connect(self, _deadline: float, /) -> Connection:
        msg = f"{self._peer.peer} has hung up; it can't be called any more"
        raise ConnectionLost(msg, "not_sent")

    def _drop(self, _connection: Connection, /) -> None:
        self._link = None

    def _retire(self, _connection: Connection, /) -> None:
        """Nothing: there is no other connection to turn to."""

    def __repr__(self) -> str:
        return f"<shmrpc.aio.Caller {self._peer.peer}>"
