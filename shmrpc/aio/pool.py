"""One client over several connections, for asyncio."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

from shmrpc.errors import Cancelled
from shmrpc.pool import Lane, take_least_loaded
from shmrpc.proxy import Proxy, make_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from shmrpc.metadata import Metadata

    from .calls import Call
    from .client import Client

__all__ = ["Pool"]

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")


class Pool:
    """Several clients as one: each call goes to the one with the fewest calls under way.

    Made by ``aio.connect(..., connections=N)``. As ``shmrpc.Pool``, with the methods of
    ``aio.Client``. Belongs to the event loop that it was made in.
    """

    def __init__(self, clients: Sequence[Client], name: str) -> None:
        """Own these clients, of one server."""
        self._lanes = [Lane(client) for client in clients]
        self._name = name
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def _take(self) -> Lane:
        if self._closed:
            msg = f"this pool of {self._name} is closed"
            raise Cancelled(msg)
        return take_least_loaded(self._lanes)

    # ---- calls ----

    async def call(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``Client.call``."""
        lane = self._take()
        try:
            return await lane.client.call(
                method, *args, timeout=timeout, metadata=metadata, **kwargs
            )
        finally:
            lane.calls.pop()

    async def notify(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``Client.notify``."""
        lane = self._take()
        try:
            await lane.client.notify(method, *args, timeout=timeout, metadata=metadata, **kwargs)
        finally:
            lane.calls.pop()

    def stream(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """As ``Client.stream``."""
        lane = self._take()
        begin = lane.client.stream
        return _counted(lane, begin, method, args, timeout, metadata, kwargs)

    def open(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """As ``Client.open``."""
        lane = self._take()
        begin = lane.client.open
        return _counted(lane, begin, method, args, timeout, metadata, kwargs)

    async def ping(self, timeout: float | None = None) -> float:
        """As ``Client.ping``, on the least loaded connection."""
        lane = self._take()
        try:
            seconds: float = await lane.client.ping(timeout)
            return seconds
        finally:
            lane.calls.pop()

    # ---- the rest ----

    @overload
    def proxy(self, interface: Callable[..., T], *, prefix: str = "") -> T: ...
    @overload
    def proxy(self, interface: None = None, *, prefix: str = "") -> Proxy: ...
    def proxy(self, interface: Any = None, *, prefix: str = "") -> Any:
        """As ``Client.proxy``."""
        return make_proxy(self.call, interface, prefix)

    @overload
    def method(self, function: F, /) -> F: ...
    @overload
    def method(
        self,
        /,
        *,
        name: str | None = None,
        requests: bool = False,
        idempotent: bool = False,
        inline: bool = False,
    ) -> Callable[[F], F]: ...
    def method(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        requests: bool = False,
        idempotent: bool = False,
        inline: bool = False,
    ) -> Any:
        """Offer a function to the server, on every connection; as ``Client.method``."""

        def add(wrapped: Any) -> Any:
            for lane in self._lanes:
                lane.client.method(
                    name=name, requests=requests, idempotent=idempotent, inline=inline
                )(wrapped)
            return wrapped

        return add if function is None else add(function)

    async def stats(self) -> dict[str, int]:
        """The sums of ``Client.stats`` of all connections."""
        total: dict[str, int] = {}
        for lane in self._lanes:
            for name, value in (await lane.client.stats()).items():
                total[name] = total.get(name, 0) + value
        return total

    async def close(self) -> None:
        """Hang up on all connections. Safe to repeat."""
        self._closed = True
        for lane in self._lanes:
            await lane.client.close()

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._lanes)} connections"
        return f"<shmrpc.aio.Pool {self._name} {state}>"


def _counted(
    lane: Lane,
    begin: Callable[..., Call],
    method: str,
    args: tuple[Any, ...],
    timeout: float | None,
    metadata: Metadata | None,
    kwargs: dict[str, Any],
) -> Call:
    """Open a call that counts until it is over, or gone without ever having begun."""
    try:
        call = begin(method, *args, timeout=timeout, metadata=metadata, **kwargs)
    except BaseException:
        lane.calls.pop()
        raise
    ended = weakref.finalize(call, lane.calls.pop)
    ended.atexit = False
    call.observe(lambda _error: ended())
    return call
