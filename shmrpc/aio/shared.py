"""The poller that the clients of one event loop have in common: each turn reads for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmrpc.bytestream import refuse
from shmrpc.codec import Codec, MsgpackCodec

from .loop import LoopPoller

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from shmrpc.poller import Connection, Wait

__all__ = ["SharedPoller", "shared_poller"]

_ATTRIBUTE = "_shmrpc_pollers"  # on the loop: what is kept anywhere else would outlive it


class SharedPoller(LoopPoller):
    """Made by ``shared_poller``; goes with its last connection.

    Each connection has an ``owner``, a client, with ``handlers`` for what its peer calls, or None.
    """

    def __init__(self, codec: Codec, *, wait: Wait, spin_budget: float | None) -> None:
        super().__init__(codec, wait=wait, spin_budget=spin_budget)
        self.ended = self._one_less
        # By the core's number for each; every connection's handlers have their own for them.
        self._names: list[str] = []
        self._numbers: dict[bytes, int] = {}
        self.serve_requests(
            self._take_call,
            self._take_plain_call,
            self._cancel_call,
            self._close_connection,
            reads_always=True,
        )

    def add_method(self, name: bytes, _index: int, *, fast: bool) -> None:
        """Take requests for this name, on whatever connection."""
        if name not in self._numbers:
            number = len(self._names)
            super().add_method(name, number, fast=fast)
            self._numbers[name] = number
            self._names.append(name.decode())

    # ---- the end ----

    def _one_less(self) -> None:
        """A connection has ended (the lock is held)."""
        self.after_dispatch(self.close_if_unused)

    def close_if_unused(self) -> None:
        """Close it if it has no connections any more."""
        if not self.connections:
            self.close()

    def close(self) -> None:
        """As ``LoopPoller.close``; the next connection gets another one."""
        pollers = getattr(self.loop, _ATTRIBUTE, {})
        for key in [key for key, poller in pollers.items() if poller is self]:
            del pollers[key]
        super().close()

    # ---- what peers call ----

    def _take_call(
        self, connection: Connection, message: Any, body: Any
    ) -> Callable[[], None] | None:
        """A request is there (the poller's lock is held)."""
        handlers = connection.owner.handlers
        if handlers is None:
            call_id = message.call_id
            return lambda: refuse(connection, call_id)
        name = self._names[message.method] if message.method >= 0 else ""
        run: Callable[[], None] = handlers.take(connection, message, body, name)
        return run

    def _take_plain_call(
        self,
        connection: Connection,
        call_id: int,
        deadline_ns: int,
        index: int,
        flags: int,
        value: Any,
        body: bytes | None,
    ) -> None:
        handlers = connection.owner.handlers
        if handlers is None:
            refuse(connection, call_id)
        else:
            name = self._names[index]
            handlers.take_plain(connection, call_id, deadline_ns, name, flags, value, body)

    def _cancel_call(self, connection: Connection, call_id: int) -> None:
        if connection.owner.handlers is not None:
            connection.owner.handlers.cancel(connection, call_id)

    def _close_connection(self, connection: Connection) -> None:
        owner = connection.owner
        owner.lose(connection)
        if owner.handlers is not None:
            owner.handlers.close(connection)


def shared_poller(
    loop: asyncio.AbstractEventLoop, codec: Codec, *, wait: Wait, spin_budget: float | None
) -> SharedPoller:
    """The one for such clients of this loop, which runs: a connection has to follow."""
    pollers: dict[Any, SharedPoller] | None = getattr(loop, _ATTRIBUTE, None)
    if pollers is None:
        pollers = {}
        setattr(loop, _ATTRIBUTE, pollers)
    # Codecs of other kinds may differ in what they hold; the poller keeps its own alive.
    key = (None if type(codec) is MsgpackCodec else id(codec), wait, spin_budget)
    poller = pollers.get(key)
    if poller is None:
        poller = pollers[key] = SharedPoller(codec, wait=wait, spin_budget=spin_budget)
    return poller
