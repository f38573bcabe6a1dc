"""A tunnel for bytes: between shared memory and sockets, for programs that speak one of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from shmrpc import address as addresses
from shmrpc import aio
from shmrpc.aio.hub import hub_of
from shmrpc.errors import ConnectError
from shmrpc.rendezvous import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmrpc.address import Address
    from shmrpc.aio.hub import Hub

__all__ = ["Tunnel"]

_log = logging.getLogger("shmrpc.tunnel")

_BACKLOG = 1024


class _End(asyncio.Protocol):
    """One end of a connection through the tunnel: what it gets, goes out at the other."""

    def __init__(self, tunnel: Tunnel, other: _End | None = None) -> None:
        self._tunnel = tunnel
        self._transport: Any = None
        self._ended = False  # the peer sends no more
        self._other = other
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or if we were connected to, connect to the other side first."""
        self._transport = transport
        self._tunnel.ends.add(self)
        if self._other is None:
            self._transport.pause_reading()
            self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        other = _End(self._tunnel, self)
        try:
            await self._tunnel.connect(lambda: other)
        except (ConnectError, OSError) as error:
            _log.warning("a connection was refused: %s", error)
            self.abort()
            return
        if self._transport is None or self._transport.is_closing():
            other.abort()
            return
        self._other = other
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Pass it on; asyncio tells us to pause when the other side does not keep up."""
        if self._other is not None:
            self._other.write(data)

    def write(self, data: bytes) -> None:
        """What the other end got."""
        if self._transport is not None:
            self._transport.write(data)

    def pause_writing(self) -> None:
        """Our peer does not keep up."""
        if self._other is not None and self._other._transport is not None:
            with contextlib.suppress(RuntimeError):
                self._other._transport.pause_reading()

    def resume_writing(self) -> None:
        """It does again."""
        if self._other is not None and self._other._transport is not None:
            with contextlib.suppress(RuntimeError):
                self._other._transport.resume_reading()

    def eof_received(self) -> bool:
        """Half of the connection ends; the other half may go on."""
        self._ended = True
        other = self._other
        if other is None or other._transport is None:
            return False
        with contextlib.suppress(OSError, RuntimeError):
            other._transport.write_eof()
        return not other._ended

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended: so does the other side, which gets what it has not got yet."""
        self._tunnel.lose(self)
        # The two and their transports know each other: none is to wait for the collector.
        self._transport = None
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        other, self._other = self._other, None
        if other is None or other._transport is None:
            return
        if error is not None:
            other.abort()
        else:
            other._transport.close()

    def abort(self) -> None:
        """End it at once."""
        if self._transport is not None:
            self._transport.abort()


class Tunnel:
    """Accepts byte streams at one address and connects each to another, in the running loop.

    ``shm`` addresses are byte streams of shmrpc (``aio.open_connection``), ``tcp`` and ``unix``
    ones plain sockets.
    """

    def __init__(
        self,
        listen: str,
        to: str,
        *,
        allow_uids: Iterable[int] = (),
        allow_remote: bool = False,
        timeout: float = 5.0,
    ) -> None:
        """``ConnectError`` for a bad address. ``timeout`` in seconds is for connecting."""
        self._listen = addresses.parse(listen)
        self._to = addresses.parse(to)
        if "shm" not in {self._listen.transport, self._to.transport}:
            msg = f"neither {listen} nor {to} is shared memory: there is nothing to tunnel"
            raise ConnectError(msg)
        self._allow_uids = tuple(allow_uids)
        self._allow_remote = allow_remote
        self._timeout = timeout
        self.ends: set[_End] = set()
        self._empty = asyncio.Event()
        self._server: Any = None
        self._listener: Listener | None = None
        self._hub: Hub | None = None

    @property
    def address(self) -> str:
        """Where it listens, with the port that the system chose."""
        if self._listener is not None:
            return str(self._listener.address)
        return self._server.addresses[0] if self._server is not None else ""

    async def start(self) -> None:
        """Listen; ``ConnectError`` if the address is taken."""

        def factory() -> _End:
            return _End(self)

        # Or each connection that is the only one would make a poller and epoll anew.
        self._hub = hub_of(asyncio.get_running_loop())
        self._hub.enter()
        if self._listen.transport == "shm":
            self._server = await aio.create_server(
                factory, str(self._listen), allow_uids=self._allow_uids
            )
            return
        loop = asyncio.get_running_loop()
        self._listener = Listener(
            self._listen, for_others=bool(self._allow_uids), allow_remote=self._allow_remote
        )
        create: Any = loop.create_server
        if self._listen.transport == "unix":
            create = loop.create_unix_server
        self._server = await create(factory, sock=self._listener.socket, backlog=_BACKLOG)

    async def connect(self, factory: Callable[[], _End]) -> None:
        """Connect to the other side; ``ConnectError``, ``OSError``."""
        if self._to.transport == "shm":
            await aio.create_connection(factory, str(self._to), timeout=self._timeout)
            return
        connecting = _connect_socket(self._to, factory)
        try:
            await asyncio.wait_for(connecting, self._timeout)
        except (TimeoutError, asyncio.TimeoutError):
            msg = f"can't connect to {self._to}: no answer in {self._timeout:g} s"
            raise ConnectError(msg) from None
        except OSError as error:
            msg = f"can't connect to {self._to}: {error.strerror or error}"
            raise ConnectError(msg) from error

    def lose(self, end: _End) -> None:
        """One end has ended."""
        self.ends.discard(end)
        if not self.ends:
            self._empty.set()

    async def stop(self, grace: float = 5.0) -> None:
        """Accept no more, let connections end within ``grace`` seconds, end those that go on."""
        if self._server is not None:
            self._server.close()
        if self._listener is not None:
            self._listener.close()
        if self.ends:
            self._empty.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        for end in list(self.ends):
            end.abort()
        while self.ends:
            self._empty.clear()
            await self._empty.wait()
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.leave()


async def _connect_socket(address: Address, factory: Callable[[], _End]) -> None:
    loop = asyncio.get_running_loop()
    if address.transport == "unix":
        await loop.create_unix_connection(factory, os.fspath(address.path))
    else:
        await loop.create_connection(factory, address.host, address.port)
