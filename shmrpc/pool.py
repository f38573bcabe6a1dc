"""One client over several connections, so that it uses several workers of a server at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .errors import Cancelled, ForkedError
from .proxy import Proxy, make_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from .calls import Call
    from .futures import CallFuture
    from .metadata import Metadata

__all__ = ["Lane", "Pool", "check_connections", "take_least_loaded"]

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")


def check_connections(connections: Any) -> int:
    """Refuse what is no number of connections."""
    if not isinstance(connections, int) or isinstance(connections, bool) or connections < 1:
        msg = f"connections must be a number from 1 on, not {connections!r}"
        raise ValueError(msg)
    return connections


class Lane:
    """One connection, and the calls of the pool that are under way on it.

    They are counted without a lock: what ends a call may be the garbage collector, in any thread
    at any moment. Appending and popping are atomic.
    """

    __slots__ = ("calls", "client")

    def __init__(self, client: Any) -> None:
        self.client = client
        self.calls: list[None] = []


def take_least_loaded(lanes: Sequence[Lane]) -> Lane:
    """The first of those with the fewest calls, with one call more."""
    lane = lanes[0]
    load = len(lane.calls)
    for other in lanes:
        if not load:
            break
        if len(other.calls) < load:
            lane, load = other, len(other.calls)
    lane.calls.append(None)
    return lane


class Pool:
    """Several clients as one: each call goes to the one with the fewest calls under way.

    Made by ``shmrpc.connect(..., connections=N)``. It has a ``Client``'s methods, with the same
    arguments and errors. Calls that are made one after the other stay on one connection, which is
    fastest; those that are under way at the same time spread over all, and over as many workers
    as the server has. A connection that is lost is made again by its next call, as a client's.

    All methods may be used by any number of threads at once. ``ForkedError`` in a forked child.
    """

    def __init__(self, clients: Sequence[Any], name: str) -> None:
        """Own these clients, of one server."""
        self._lanes = [Lane(client) for client in clients]
        self._name = name
        self._pid = os.getpid()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    # ---- choosing ----

    def _take(self) -> Lane:
        """The least loaded, with one call more."""
        self._check_usable()
        return take_least_loaded(self._lanes)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            msg = f"this pool of {self._name} was made before the fork; connect anew"
            raise ForkedError(msg)
        if self._closed:
            msg = f"this pool of {self._name} is closed"
            raise Cancelled(msg)

    # ---- calls ----

    def call(
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
            return lane.client.call(method, *args, timeout=timeout, metadata=metadata, **kwargs)
        finally:
            lane.calls.pop()

    def notify(
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
            lane.client.notify(method, *args, timeout=timeout, metadata=metadata, **kwargs)
        finally:
            lane.calls.pop()

    def submit(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> CallFuture:
        """As ``Client.submit``."""
        begun: CallFuture = self._begin("submit", method, args, timeout, metadata, kwargs)
        return begun

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
        begun: Call = self._begin("stream", method, args, timeout, metadata, kwargs)
        return begun

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
        begun: Call = self._begin("open", method, args, timeout, metadata, kwargs)
        return begun

    def _begin(
        self,
        kind: str,
        method: str,
        args: tuple[Any, ...],
        timeout: float | None,
        metadata: Metadata | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Begin what ends later, and count it until then."""
        lane = self._take()
        try:
            begin = getattr(lane.client, kind)
            begun = begin(method, *args, timeout=timeout, metadata=metadata, **kwargs)
        except BaseException:
            lane.calls.pop()
            raise
        if hasattr(begun, "observe"):  # unlike a callback it needs no background reader
            begun.observe(lambda _error: lane.calls.pop())
        elif hasattr(begun, "add_done_callback"):
            begun.add_done_callback(lambda _future: lane.calls.pop())
        else:
            lane.calls.pop()  # an interceptor's own: there is no telling when it ends
        return begun

    def ping(self, timeout: float | None = None) -> float:
        """As ``Client.ping``, on the least loaded connection."""
        lane = self._take()
        try:
            seconds: float = lane.client.ping(timeout)
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
        self, /, *, name: str | None = None, requests: bool = False, idempotent: bool = False
    ) -> Callable[[F], F]: ...
    def method(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        requests: bool = False,
        idempotent: bool = False,
    ) -> Any:
        """Offer a function to the server, on every connection; as ``Client.method``."""

        def add(wrapped: Any) -> Any:
            self._check_usable()
            for lane in self._lanes:
                lane.client.method(name=name, requests=requests, idempotent=idempotent)(wrapped)
            return wrapped

        return add if function is None else add(function)

    def stats(self) -> dict[str, int]:
        """The sums of ``Client.stats`` of all connections."""
        self._check_usable()
        total: dict[str, int] = {}
        for lane in self._lanes:
            for name, value in lane.client.stats().items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Hang up on all connections. Safe to repeat."""
        self._closed = True
        for lane in self._lanes:
            lane.client.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._lanes)} connections"
        return f"<shmrpc.Pool {self._name} {state}>"
