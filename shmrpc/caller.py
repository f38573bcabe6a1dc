"""Calling the other way: what a server's handler calls its caller with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .channel import Channel
from .errors import ConnectionLost

if TYPE_CHECKING:
    from .poller import Connection

__all__ = ["Caller"]


class Caller(Channel):
    """Calls the client at the other end of a server's connection, as a ``Client`` would.

    Its methods are those that the client registered (``Client.method``). May be kept and used by
    any number of threads until the connection ends; then calls raise ``ConnectionLost``. It never
    connects by itself.
    """

    def __init__(self, connection: Connection, timeout: float = 5.0) -> None:
        """``timeout`` in seconds is what ``ping`` waits by default."""
        super().__init__(connection.codec, timeout)
        self._peer = connection
        self._gone = connection.closed
        self._slots = connection.slots

    def _connection(self, _deadline: float) -> Connection:
        if self._gone or self._peer.closed:
            msg = f"{self._peer.peer} has hung up; it can't be called any more"
            raise ConnectionLost(msg, "not_sent")
        return self._peer

    def _drop(self, _connection: Connection) -> None:
        self._gone = True
        self._slots = []

    def _retire(self, _connection: Connection) -> None:
        """Nothing: there is no other connection to turn to."""

    def __repr__(self) -> str:
        return f"<shmrpc.Caller {self._peer.peer}>"
