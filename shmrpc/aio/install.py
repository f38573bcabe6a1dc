"""An event loop whose Unix sockets may be shmrpc addresses: libraries need not know of it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc import address as addresses
from shmrpc.errors import ConnectError
from shmrpc.rendezvous import prepare_directory

from .streams import create_connection, create_server

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["install", "new_event_loop", "socket_path"]

L = TypeVar("L", bound=asyncio.AbstractEventLoop)

_SCHEME = "shm://"
_MARK = "_shmrpc_installed"


class _SocketPath(str):
    """The path of a rendezvous socket that is known as one."""

    __slots__ = ("address",)
    address: str


def socket_path(address: str) -> str:
    """Where the socket of an ``shm`` address lies, for libraries that want a path.

    In the rendezvous directory, which is made if it has to be, any such path is an shmrpc address
    in an installed loop. For a path elsewhere the very string returned has to reach the loop.
    """
    parsed = addresses.parse(address)
    if parsed.transport != "shm":
        msg = f"{address!r} is no shm address: libraries have their own options for {parsed}"
        raise ValueError(msg)
    if parsed.name:
        prepare_directory(os.path.dirname(parsed.path))
    path = _SocketPath(parsed.path)
    path.address = str(parsed)
    return path


def _address_of(path: Any) -> str | None:
    """The shmrpc address that a path stands for, or None."""
    if isinstance(path, _SocketPath):
        return path.address
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str):
        return None
    if path.startswith(_SCHEME):
        return path
    if os.path.dirname(path) == addresses.rendezvous_directory():
        return f"{_SCHEME}{path}"
    return None


def _address_of_socket(sock: socket.socket | None) -> str | None:
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    return _address_of(sock.getsockname())


def _refuse_tls(ssl: object) -> None:
    if ssl:
        msg = "shmrpc addresses carry no TLS: no other machine can listen; leave ssl out"
        raise ValueError(msg)


def install(loop: L) -> L:
    """Let this loop serve and reach shmrpc addresses wherever a Unix socket's path is expected.

    That is, ``create_unix_server``, ``create_unix_connection``, and ``create_server(sock=)`` with
    a socket that is bound in the rendezvous directory. What is no such address goes to the loop
    itself. Errors are ``OSError`` there, as of sockets. Returns the loop; safe to repeat.
    """
    if getattr(loop, _MARK, False):
        return loop
    unix_server: Any = loop.create_unix_server
    unix_connection: Any = loop.create_unix_connection
    tcp_server: Any = loop.create_server

    async def serve(
        factory: Callable[[], asyncio.BaseProtocol], address: str, options: dict[str, Any]
    ) -> Any:
        _refuse_tls(options.get("ssl"))
        try:
            server = await create_server(
                factory, address, start_serving=options.get("start_serving", True)
            )
        except ConnectError as error:
            raise OSError(errno.EADDRINUSE, str(error)) from error
        server.named_by = options.get("sock")
        return server

    async def create_unix_server(
        factory: Callable[[], asyncio.BaseProtocol], path: Any = None, **options: Any
    ) -> Any:
        address = _address_of(path) or _address_of_socket(options.get("sock"))
        if address is None:
            return await unix_server(factory, path, **options)
        return await serve(factory, address, options)

    async def create_bound_server(
        factory: Callable[[], asyncio.BaseProtocol], *where: Any, **options: Any
    ) -> Any:
        # The socket itself is not used: the rendezvous listens at the same path.
        address = _address_of_socket(options.get("sock"))
        if address is None:
            return await tcp_server(factory, *where, **options)
        return await serve(factory, address, options)

    async def create_unix_connection(
        factory: Callable[[], asyncio.BaseProtocol], path: Any = None, **options: Any
    ) -> Any:
        address = _address_of(path)
        if address is None:
            return await unix_connection(factory, path, **options)
        _refuse_tls(options.get("ssl"))
        try:
            return await create_connection(factory, address)
        except ConnectError as error:
            raise ConnectionRefusedError(errno.ECONNREFUSED, str(error)) from error

    replaced: dict[str, Any] = {
        "create_unix_server": create_unix_server,
        "create_unix_connection": create_unix_connection,
        "create_server": create_bound_server,
        _MARK: True,
    }
    for name, value in replaced.items():
        setattr(loop, name, value)
    return loop


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new loop with ``install`` done: a loop factory for ``asyncio.Runner`` and servers."""
    return install(asyncio.new_event_loop())
