"""Making byte streams: what ``asyncio`` offers under the same names, for shmrpc addresses."""

from __future__ import annotations

import asyncio
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc import address as addresses
from shmrpc import segments
from shmrpc.acceptor import Acceptor
from shmrpc.bytestream import byte_terms

from .hub import hub_of
from .transport import ShmTransport

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable

    from shmrpc.bytestream import Wire
    from shmrpc.handshake import Agreement

    from .hub import Hub

__all__ = ["ByteServer", "create_connection", "create_server", "open_connection", "start_server"]

P = TypeVar("P", bound=asyncio.BaseProtocol)

_LIMIT = 64 << 10  # of a StreamReader, as asyncio's


async def create_connection(
    protocol_factory: Callable[[], P], address: str, *, timeout: float = 5.0
) -> tuple[ShmTransport, P]:
    """Connect to a byte server; as ``loop.create_connection``.

    ``ConnectError`` if there is none within ``timeout`` seconds.
    """
    hub = hub_of(asyncio.get_running_loop())
    hub.enter()
    try:
        wire = await hub.connect(addresses.parse(address), timeout)
        try:
            protocol = protocol_factory()
            transport = ShmTransport(hub, wire, protocol)
        except BaseException:
            wire.hang_up()
            raise
        try:
            transport.begin()
        except BaseException:
            transport.abort()
            raise
    finally:
        hub.leave()
    return transport, protocol


async def open_connection(
    address: str, *, limit: int = _LIMIT, timeout: float = 5.0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a byte server; as ``asyncio.open_connection``."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(lambda: protocol, address, timeout=timeout)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class ByteServer(asyncio.AbstractServer):
    """Made by ``create_server``: what ``asyncio.Server`` is, for byte streams."""

    def __init__(
        self,
        hub: Hub,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        address: tuple[str, ...],
        allow_uids: Iterable[int],
        allow_remote: bool = False,
    ) -> None:
        uids = frozenset(allow_uids)
        self._hub = hub
        self._loop = hub.loop
        self._factory = protocol_factory
        self._transports: set[ShmTransport] = set()
        self._silent: set[int] = set()  # connections that have opened no stream yet
        self._ended = asyncio.Event()
        self._forever: asyncio.Future[None] | None = None
        self._serving = False
        self.named_by: socket.socket | None = None  # whose path is the address: closed with us
        segments.sweep()
        self._acceptor: Acceptor | None = Acceptor(
            self,
            [
                byte_terms(addresses.parse(text), uids, allow_remote=allow_remote)
                for text in address
            ],
        )
        hub.enter()

    # ---- as asyncio.Server ----

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports that the system chose. Empty when it does not."""
        return self._acceptor.addresses if self._acceptor is not None else []

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening sockets. Empty when it is closed."""
        listeners = self._acceptor._listeners if self._acceptor is not None else []
        return tuple(TransportSocket(listener.socket) for listener in listeners)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it serves in."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return self._serving

    async def start_serving(self) -> None:
        """Accept connections, unless it does already."""
        self._check_open()
        if not self._serving and self._acceptor is not None:
            self._serving = True
            self._acceptor.start()

    async def serve_forever(self) -> None:
        """Accept connections until this is cancelled, then close."""
        if self._forever is not None:
            msg = f"server {self!r} is already being awaited on serve_forever()"
            raise RuntimeError(msg)
        await self.start_serving()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        finally:
            self._forever = None
            self.close()
            await self.wait_closed()

    def close(self) -> None:
        """Accept no more; connections that there are go on."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is None:
            return
        self._serving = False
        acceptor.close()
        if self.named_by is not None:
            self.named_by.close()
        # What the acceptor's thread has just made is on its way into the loop: `_add` refuses it.
        for conn_id in self._silent:
            self._hub.expect_no_more(conn_id)
        self._silent.clear()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._end_if_empty()
        self._hub.leave()
        del self._hub  # who keeps a closed server keeps no descriptors

    async def wait_closed(self) -> None:
        """Wait until it is closed and its last connection has ended."""
        await self._ended.wait()

    def close_clients(self) -> None:
        """Close the connections that there are."""
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """End the connections that there are at once."""
        for transport in list(self._transports):
            transport.abort()

    def _check_open(self) -> None:
        if self._acceptor is None:
            msg = f"server {self!r} is closed"
            raise RuntimeError(msg)

    def __repr__(self) -> str:
        return f"<ByteServer {' '.join(self.addresses) or 'closed'}>"

    def _end_if_empty(self) -> None:
        if self._acceptor is None and not self._transports:
            self._ended.set()

    # ---- connections ----

    def add_connection(self, agreement: Agreement) -> None:
        """Take a new connection in; called by the acceptor's thread."""
        try:
            self._loop.call_soon_threadsafe(self._add, agreement)
        except RuntimeError:  # the loop is closed
            agreement.close()

    def _add(self, agreement: Agreement) -> None:
        if self._acceptor is None:
            agreement.close()
            return
        conn_id = -1

        def accepted(wire: Wire) -> None:
            self._silent.discard(conn_id)
            self._accept(wire)

        conn_id = self._hub.expect(agreement, accepted)
        self._silent.add(conn_id)

    def _accept(self, wire: Wire) -> None:
        if self._acceptor is None:
            wire.hang_up()
            return
        try:
            protocol = self._factory()
        except Exception as error:
            wire.hang_up()
            self._report("Error on transport creation for incoming connection", error)
            return
        transport = ShmTransport(self._hub, wire, protocol, self._lose)
        self._transports.add(transport)
        wire.accept()
        try:
            transport.begin()
        except Exception as error:
            transport.abort()
            self._report("Exception in connection_made() of an accepted connection", error)

    def _lose(self, transport: ShmTransport) -> None:
        self._transports.discard(transport)
        self._end_if_empty()

    def _report(self, message: str, error: Exception) -> None:
        self._loop.call_exception_handler({"message": message, "exception": error})


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    *address: str,
    allow_uids: Iterable[int] = (),
    allow_remote: bool = False,
    start_serving: bool = True,
) -> ByteServer:
    """Serve byte streams at these addresses; as ``loop.create_server``.

    Each connection gets a protocol of ``protocol_factory()``. ``ConnectError`` if an address is
    taken. ``allow_remote`` as for ``Server``.
    Closing it frees the address; a rendezvous is of one server, of byte streams or of calls.
    """
    if not address:
        msg = "create_server() needs at least one address, such as 'web'"
        raise ValueError(msg)
    hub = hub_of(asyncio.get_running_loop())
    hub.enter()
    try:
        server = ByteServer(hub, protocol_factory, address, allow_uids, allow_remote)
    finally:
        hub.leave()
    if start_serving:
        await server.start_serving()
    return server


async def start_server(
    client_connected_cb: Callable[
        [asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None
    ],
    *address: str,
    limit: int = _LIMIT,
    allow_uids: Iterable[int] = (),
    allow_remote: bool = False,
    start_serving: bool = True,
) -> ByteServer:
    """Serve byte streams with a reader and a writer each; as ``asyncio.start_server``."""
    loop = asyncio.get_running_loop()

    def factory() -> Any:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(
        factory,
        *address,
        allow_uids=allow_uids,
        allow_remote=allow_remote,
        start_serving=start_serving,
    )
