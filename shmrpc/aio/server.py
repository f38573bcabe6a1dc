"""The asyncio server: methods, starting, draining, stopping."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

from shmrpc import handover, handshake, segments
from shmrpc.acceptor import Acceptor
from shmrpc.errors import Error, ForkedError
from shmrpc.hosting import Hosting
from shmrpc.lending import MEMORY_BYTES, total_stats
from shmrpc.link import terms_of
from shmrpc.registry import Registry

from .caller import Caller
from .handlers import Handlers
from .intercepted import intercept_handlers
from .loop import LoopPoller, check_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from shmrpc.codec import Codec
    from shmrpc.interceptors import AsyncInterceptor
    from shmrpc.poller import Connection, Wait
    from shmrpc.segments import Backing

__all__ = ["Server"]

F = TypeVar("F", bound="Callable[..., Any]")

_log = logging.getLogger("shmrpc.server")

_HANDSHAKES_SECONDS = 1.0  # that connections just being made get to end


class Server(Hosting):
    """Serves methods at one or several addresses, in the event loop that starts it.

    Handlers may be ``async def`` (a task each), asynchronous generators, and plain functions or
    generators, which run on threads, or in the loop itself where the method says ``inline=True``.
    ``max_concurrency`` calls may be under way; the next is refused with ``Overloaded``. The other
    parameters are those of ``shmrpc.Server``; interceptors are asynchronous ones.
    """

    _kind = "shmrpc.aio.Server"

    def __init__(
        self,
        *address: str,
        max_concurrency: int = 1024,
        max_message_bytes: int = 64 << 20,
        max_memory_bytes: int = MEMORY_BYTES,
        backing: Backing = "auto",
        allow_uids: Iterable[int] = (),
        trust_uids: Iterable[int] = (),
        allow_remote: bool = False,
        show_tracebacks: bool | None = None,
        wait: Wait = "auto",
        spin_budget: float | None = None,
        codec: Codec | None = None,
        interceptors: Iterable[AsyncInterceptor] = (),
    ) -> None:
        """Make a server that listens from ``start`` on; ``ConnectError`` for a bad address."""
        terms = terms_of(
            address,
            max_message_bytes=max_message_bytes,
            max_memory_bytes=max_memory_bytes,
            backing=backing,
            allow_uids=allow_uids,
            trust_uids=trust_uids,
            allow_remote=allow_remote,
        )
        super().__init__(
            terms,
            Registry(takes_async=True),
            max_concurrency=max_concurrency,
            show_tracebacks=show_tracebacks,
            wait=wait,
            spin_budget=spin_budget,
            codec=codec,
        )
        self._chain = intercept_handlers(interceptors)
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._poller: LoopPoller | None = None
        self._handlers: Handlers | None = None

    # ---- methods ----

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
        """Offer a function to callers, as ``shmrpc.Server.method``.

        A plain function runs on a thread, or in the event loop with ``inline``: for one that takes
        microseconds and never blocks. With ``requests`` the first parameter iterates over the
        caller's messages: asynchronously in an async handler.
        """

        def add(wrapped: Any) -> Any:
            self.registry.add(
                wrapped, name, requests=requests, idempotent=idempotent, inline=inline
            )
            return wrapped

        return add if function is None else add(function)

    # ---- running ----

    async def start(self) -> None:
        """Listen and serve in this event loop; ``ConnectError`` if an address is taken."""
        if os.getpid() != self._pid:
            msg = "this server was made before the fork and belongs to the parent; make a new one"
            raise ForkedError(msg)
        if self._poller is not None:
            msg = "the server is running already"
            raise Error(msg)
        self._loop = asyncio.get_running_loop()
        segments.sweep()
        acceptor = Acceptor(self, self._terms, self._inspection)
        try:
            poller = LoopPoller(self.codec, wait=self._wait, spin_budget=self._spin_budget)
            handlers = Handlers(
                self,
                self.registry,
                self._max_concurrency,
                self.codec,
                self._chain,
                loop=self._loop,
                context=contextvars.copy_context(),
            )
            handlers.serve(poller)
        except BaseException:
            acceptor.close()
            raise
        self._poller, self._acceptor, self._handlers = poller, acceptor, handlers
        running = handlers.under_way
        self._inspection.started(poller, acceptor.addresses, acceptor.workers, running)
        poller.ended = acceptor.connection_ended
        # Before it accepts: a successor that does not get so far leaves all to who does.
        handover.tell_ready()
        acceptor.start()
        _log.info("serving at %s", ", ".join(acceptor.addresses))

    async def stop(self, grace: float = 5.0) -> None:
        """Stop: refuse new calls, let those under way end within ``grace`` seconds, hang up.

        Handlers that still run then are cancelled. Safe to call twice. Cancelling this ends the
        grace: handlers are cancelled and connections hung up before the error goes on.
        """
        poller, acceptor, handlers = self._poller, self._acceptor, self._handlers
        if poller is None or acceptor is None or handlers is None:
            return
        check_loop(poller.loop, "this server")
        self._acceptor = None
        handover.notify("STOPPING=1")
        self._inspection.draining()
        _log.info("stopping: calls under way have %g s", grace)
        try:
            # The acceptor's thread may have a connection on its way into the loop.
            patience = min(grace, _HANDSHAKES_SECONDS)
            await poller.loop.run_in_executor(None, acceptor.retire, patience)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            grace = 0.0
            raise
        finally:
            self._poller = self._handlers = None  # connections that are made now are hung up
            try:
                await self._drain(poller, handlers, grace)
            finally:
                self._hang_up(poller)
                acceptor.close()  # until here it has answered who asked how far we are
                self._inspection.stopped()
                _log.info("stopped")

    async def _drain(self, poller: LoopPoller, handlers: Handlers, grace: float) -> None:
        poller.drain()
        until = time.monotonic() + grace
        await handlers.stop(grace)
        while poller.stats()["outbox_bytes"] and time.monotonic() < until:
            poller.schedule()
            await asyncio.sleep(0.002)

    def _hang_up(self, poller: LoopPoller) -> None:
        for connection in list(poller.connections.values()):
            for stream in list(connection.session.requests.values()):
                stream.cancel()
            connection.shutdown()
            for run in connection.session.lost(errno.EPIPE):
                run()
        poller.close()

    async def serve(self) -> None:
        """Start, and serve until cancelled, or until SIGTERM or SIGINT in the main thread."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        in_main = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGTERM, signal.SIGINT) if in_main else ()
        for number in handled:
            loop.add_signal_handler(number, stopped.set)
        try:
            if self._poller is None:
                await self.start()
            await stopped.wait()
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
            await self.stop()

    async def __aenter__(self) -> Server:
        if self._poller is None:
            await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def stats(self) -> dict[str, int | float]:
        """Counters of the server; as ``shmrpc.Server.stats``."""
        if self._poller is None or self._handlers is None:
            return {}
        return {
            **self._poller.stats(),
            **total_stats(list(self._poller.connections.values())),
            "running": self._handlers.running,
        }

    # ---- what the acceptor and handlers need ----

    def add_connection(self, agreement: handshake.Agreement) -> None:
        """Serve a new connection from now on; called by the acceptor's thread."""
        loop = self._loop
        try:
            if loop is None:
                raise RuntimeError
            loop.call_soon_threadsafe(self._add, agreement)
        except RuntimeError:  # the loop is closed
            agreement.close()

    def _add(self, agreement: handshake.Agreement) -> None:
        if self._poller is None:
            agreement.close()
        else:
            self._poller.add(agreement, agreement.terms.address)

    def caller_of(self, connection: Connection) -> Caller:
        """What calls the client at the other end."""
        if connection.caller is None:
            connection.caller = Caller(connection)
        caller: Caller = connection.caller
        return caller
