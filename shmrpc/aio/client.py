"""The asyncio client: a connection that is made again when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

from shmrpc._native import lib
from shmrpc.errors import Cancelled, ConnectError, ForkedError
from shmrpc.lending import connection_stats
from shmrpc.link import failure_of, shake_hands
from shmrpc.registry import Registry
from shmrpc.retries import repeating

from .channel import Channel
from .handlers import Handlers
from .intercepted import Intercepted
from .loop import check_loop
from .shared import SharedPoller, shared_poller

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from shmrpc.codec import Codec
    from shmrpc.handshake import Agreement, Terms
    from shmrpc.interceptors import AsyncInterceptor
    from shmrpc.poller import Connection, Wait

__all__ = ["Client"]

F = TypeVar("F", bound="Callable[..., Any]")

_log = logging.getLogger("shmrpc.client")

_BACKOFF_FIRST = 0.002
_BACKOFF_MAX = 0.2
_MAX_CONCURRENCY = 1024


class Client(Channel):
    """Made by ``connect``. Belongs to the event loop that it was made in, and to its thread."""

    def __init__(
        self,
        terms: list[Terms],
        codec: Codec,
        timeout: float,
        *,
        wait: Wait,
        spin_budget: float | None,
        interceptors: list[AsyncInterceptor],
        retries: int,
    ) -> None:
        super().__init__(codec, timeout)
        self._terms = terms
        self._wait: Wait = wait
        self._spin_budget = spin_budget
        self._pid = os.getpid()
        self._reconnects = -1
        self._connecting = asyncio.Lock()
        self.handlers: Handlers | None = None  # once it has methods
        self._context = contextvars.copy_context()
        around = [*interceptors, *repeating(retries)]
        if around:
            calls = Intercepted(self, around, self._peer_name, self._is_idempotent)
            self.__dict__.update(calls.methods())

    # ---- connecting ----

    async def connect_first(self) -> None:
        """Connect without patience for a server that is not there."""
        await self._connect(time.monotonic() + self._timeout, once=True)

    async def _connect(self, deadline: float, /, *, once: bool = False) -> Connection:
        deadline = min(deadline, time.monotonic() + self._timeout)
        delay = _BACKOFF_FIRST
        async with self._connecting:
            while True:
                self._check_usable()
                if self._link is not None:
                    return self._link
                try:
                    return await self._connect_once(max(deadline - time.monotonic(), 0.001))
                except ConnectError:
                    if once or time.monotonic() + delay >= deadline:
                        raise
                await asyncio.sleep(delay)
                delay = min(delay * 2, _BACKOFF_MAX)

    async def _connect_once(self, timeout: float) -> Connection:
        failures = []
        for terms in self._terms:
            try:
                agreement = await self._shake_hands(terms, timeout)
            except ConnectError as error:
                failures.append(error)
            else:
                return self._adopt(agreement, terms)
        raise failure_of(failures)

    async def _shake_hands(self, terms: Terms, timeout: float) -> Agreement:
        """In a thread: it takes system calls that may block."""
        shaking = self._loop.run_in_executor(None, shake_hands, terms, timeout)
        try:
            return await asyncio.shield(shaking)
        except asyncio.CancelledError:
            shaking.add_done_callback(_close_agreement)
            raise
        finally:
            del shaking  # as above: it has the error, whose traceback has us

    def _adopt(self, agreement: Agreement, terms: Terms) -> Connection:
        try:
            self._check_usable()
            poller = shared_poller(
                self._loop, self._codec, wait=self._wait, spin_budget=self._spin_budget
            )
            try:
                link = poller.add(agreement, terms.address)
            finally:
                poller.close_if_unused()
        except BaseException:
            agreement.close()
            raise
        link.owner = self
        if self.handlers is not None:
            self.handlers.serve_one(link)
            if len(self.handlers.registry):
                link.say_serves()
        self._link = link
        self._reconnects += 1
        _log.debug("connected to %s", link.peer)
        return link

    def _drop(self, connection: Connection, /) -> None:
        self._retire(connection)
        connection.shutdown()
        _log.debug("hung up on %s", connection.peer)
        self._leave(connection)

    def lose(self, connection: Connection) -> None:
        """The connection has ended: the next call makes a new one."""
        if self._link is connection:
            self._link = None

    def _leave(self, connection: Connection) -> None:
        """Let its poller see the end of a connection that was hung up, and go with the last one."""
        poller: SharedPoller = connection.poller  # type: ignore[assignment]
        if self.handlers is not None:
            self.handlers.leave(poller)
        poller.schedule()
        poller.close_if_unused()

    def _retire(self, connection: Connection, /) -> None:
        if self._link is connection:
            self._link = None
        connection.retire()

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            msg = f"this client of {self._terms[0].address} was made before the fork; connect anew"
            raise ForkedError(msg)
        if self._closed:
            msg = f"this client of {self._terms[0].address} is closed"
            raise Cancelled(msg)

    # ---- methods that the server may call ----

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
        """Offer a function to the server, as ``aio.Server.method``."""
        if self.handlers is None:
            registry = Registry(takes_async=True)
            self.handlers = Handlers(
                self,
                registry,
                _MAX_CONCURRENCY,
                self._codec,
                loop=self._loop,
                context=self._context,
            )
            if self._link is not None:
                self.handlers.serve_one(self._link)
        handlers = self.handlers

        def add(wrapped: Any) -> Any:
            handlers.registry.add(
                wrapped, name, requests=requests, idempotent=idempotent, inline=inline
            )
            if self._link is not None and len(handlers.registry) == 1:
                self._link.say_serves()
            return wrapped

        return add if function is None else add(function)

    def caller_of(self, _connection: Connection) -> Client:
        """What calls the server from our methods: this client."""
        return self

    def shows_tracebacks(self, connection: Connection) -> bool:
        """Whether the server sees tracebacks of our methods."""
        return connection.credentials.uid == os.geteuid()

    # ---- for interceptors ----

    def _peer_name(self) -> str:
        link = self._link
        return link.peer if link is not None else str(self._terms[0].address)

    async def _is_idempotent(self, method: str) -> bool:
        """Ask the server; what it does not know is not."""
        described = await self._call_with("shmrpc.describe", (method,), {}, self._timeout, None)
        return isinstance(described, dict) and described.get("idempotent") is True

    # ---- the rest ----

    async def stats(self) -> dict[str, int | float]:
        """Counters; as ``shmrpc.Client.stats``.

        Those of waiting and of frames are of all clients of the loop that wait alike.
        """
        check_loop(self._loop, repr(self))
        link = self._link or await self._connect(time.monotonic() + self._timeout)
        return {**connection_stats(link), "reconnects": self._reconnects}

    async def close(self) -> None:
        """Hang up. Calls under way in other tasks end with ``Cancelled``. Safe to repeat."""
        check_loop(self._loop, repr(self))
        if self._closed:
            return
        self._closed = True
        link, self._link = self._link, None
        if link is None:
            return
        calls = link.session.calls
        for call_id in list(calls):  # no items(): making these may collect an open call
            pending = calls.pop(call_id, None)
            if pending is not None:
                link.send_now(lib.SHMRPC_CANCEL, call_id)
                pending.lost(errno.EPIPE)
        link.shutdown()
        try:
            if self.handlers is not None:
                await self.handlers.stop(0)
        finally:
            self._leave(link)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._link else "not connected"
        return f"<shmrpc.aio.Client {self._terms[0].address} {state}>"


def _close_agreement(shaking: asyncio.Future[Agreement]) -> None:
    """The task that wanted it was cancelled meanwhile."""
    with contextlib.suppress(ConnectError, OSError, asyncio.CancelledError):
        shaking.result().close()
