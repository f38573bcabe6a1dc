# ruff: noqa: ARG002 - the parameters are those of httpcore's interfaces
"""Transports for httpx: HTTP over byte streams. Needs ``pip install shmrpc[httpx]``.

    client = httpx.AsyncClient(transport=AsyncTransport(), base_url="http://calc")

talks to the server at ``shm://calc``. Connections are kept alive and pooled by httpcore.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

try:
    import httpcore
    import httpx
except ImportError as error:
    msg = f"shmrpc.httpx needs httpx ({error}): pip install 'shmrpc[httpx]'"
    raise ImportError(msg) from error

from shmrpc import aio
from shmrpc.address import parse
from shmrpc.bytestream import ByteStream, connect_bytes
from shmrpc.errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ssl import SSLContext

__all__ = ["AsyncTransport", "Transport"]

_CONNECT_SECONDS = 5.0  # where httpx was told to wait for ever


@contextlib.contextmanager
def _mapped(late: type[Exception], failed: type[Exception], what: str) -> Iterator[None]:
    """Errors as httpcore names them."""
    try:
        yield
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise late(f"{what}: no answer in time") from error
    except (OSError, ConnectError) as error:
        raise failed(f"{what}: {error}") from error


def _refuse_tls() -> httpcore.ConnectError:
    return httpcore.ConnectError("shmrpc addresses carry no TLS: use an http:// URL")


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError, "reading"):
            return await asyncio.wait_for(self._reader.read(max_bytes), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError, "writing"):
            self._writer.write(buffer)
            await asyncio.wait_for(self._writer.drain(), timeout)

    async def aclose(self) -> None:
        self._writer.close()
        await asyncio.sleep(0)
        self._writer.transport.abort()  # what the server has not taken by now, it may never take
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def start_tls(
        self,
        ssl_context: SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        await self.aclose()
        raise _refuse_tls()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of an idle connection: the server has hung up
            return self._reader.at_eof() or bool(self._reader._buffer)  # type: ignore[attr-defined]
        return self._writer.get_extra_info(info)


class _AsyncBackend(httpcore.AsyncNetworkBackend):
    def __init__(self, address: str | None) -> None:
        self._address = address

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        address = self._address or f"shm://{host}"
        with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError, f"connecting to {address}"):
            return _AsyncStream(
                *await aio.open_connection(
                    address, timeout=_CONNECT_SECONDS if timeout is None else timeout
                )
            )

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError, "reading"):
            return self._stream.receive(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError, "writing"):
            self._stream.send_all(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        self.close()
        raise _refuse_tls()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.readable() if info == "is_readable" else None


class _Backend(httpcore.NetworkBackend):
    def __init__(self, address: str | None) -> None:
        self._address = address

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        address = self._address or f"shm://{host}"
        with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError, f"connecting to {address}"):
            return _Stream(connect_bytes(address, _CONNECT_SECONDS if timeout is None else timeout))


def _options(limits: httpx.Limits) -> dict[str, Any]:
    return {
        "max_connections": limits.max_connections,
        "max_keepalive_connections": limits.max_keepalive_connections,
        "keepalive_expiry": limits.keepalive_expiry,
    }


_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)


class AsyncTransport(httpx.AsyncHTTPTransport):
    """For ``httpx.AsyncClient(transport=)``, under asyncio.

    Requests go to ``address``, or if that is None to the service that the URL's host names. httpx
    translates httpcore's errors, so that they are httpx's own.
    """

    def __init__(self, address: str | None = None, *, limits: httpx.Limits = _LIMITS) -> None:
        if address is not None:
            parse(address)
        self._pool = httpcore.AsyncConnectionPool(
            network_backend=_AsyncBackend(address), **_options(limits)
        )


class Transport(httpx.HTTPTransport):
    """For ``httpx.Client(transport=)``: the same for threads."""

    def __init__(self, address: str | None = None, *, limits: httpx.Limits = _LIMITS) -> None:
        if address is not None:
            parse(address)
        self._pool = httpcore.ConnectionPool(network_backend=_Backend(address), **_options(limits))
