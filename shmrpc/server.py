"""The synchronous server: methods, starting, draining, stopping.

Its worker threads (worker.py) run handlers; which of them reads while another runs a long one is
the core's business (csrc/workers.c), and this module starts threads when the core asks for them.
One more thread (acceptor.py) makes new connections; a client that is slow at it holds up nobody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

from . import handover, handshake, segments
from .acceptor import Acceptor
from .caller import Caller
from .errors import Error, ForkedError
from .hosting import Hosting
from .intercepted import intercept_handlers
from .lending import MEMORY_BYTES, total_stats
from .link import terms_of
from .poller import Connection, Poller, Wait, check_timeout
from .registry import Registry
from .worker import Worker

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import FrameType, TracebackType

    from .codec import Codec
    from .interceptors import Interceptor
    from .segments import Backing

__all__ = ["Server"]

F = TypeVar("F", bound="Callable[..., Any]")

_log = logging.getLogger("shmrpc.server")

_HANDSHAKES_SECONDS = 1.0  # that connections just being made get to end


class Server(Hosting):
    """Serves methods at one or several addresses.

    ``workers`` handlers run at a time, on as many threads. ``max_concurrency`` calls may run or
    wait for a worker; the next is refused with ``Overloaded``. ``allow_remote`` lets a ``tcp``
    address be one that other hosts can reach: it has neither encryption nor authentication, and
    is for loopback, and for links that you trust as much. ``allow_uids`` are the other users who
    may call; ``trust_uids`` those of them whose large values handlers get as they lie in their
    memory, as views that they could change meanwhile, instead of copies. ``show_tracebacks`` is
    whether callers see a handler's traceback: by default those of our own uid do.
    ``interceptors`` see every call before its handler, the first outermost (see
    ``shmrpc.interceptors``).

    Methods may be added from any thread at any time. A server made before a fork raises
    ``ForkedError`` in the child.
    """

    _kind = "shmrpc.Server"

    def __init__(
        self,
        *address: str,
        workers: int = 16,
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
        interceptors: Iterable[Interceptor] = (),
    ) -> None:
        """Make a server that listens from ``start`` on; ``ConnectError`` for a bad address."""
        if workers < 1:
            msg = "workers must be at least 1"
            raise ValueError(msg)
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
            Registry(intercept_handlers(interceptors)),
            max_concurrency=max_concurrency,
            show_tracebacks=show_tracebacks,
            wait=wait,
            spin_budget=spin_budget,
            codec=codec,
        )
        self._workers = workers
        self._lock = threading.Lock()
        # Held while starting, stopping and handing over; a stop ends a handing over that waits.
        self._changing = threading.RLock()
        self._starting = self._stopping = False
        self._forked = False
        self._poller: Poller | None = None
        _servers.add(self)

    # ---- methods ----

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
        """Offer a function to callers, under its own name or ``name``. Use it as a decorator.

        A generator function streams what it yields. With ``requests`` the first parameter iterates
        over the caller's messages. ``idempotent`` says that running it twice is as good as once:
        clients with ``retries`` then repeat a call that may have run. Registering a name again
        replaces the method.
        """

        def add(wrapped: Any) -> Any:
            self.registry.add(wrapped, name, requests=requests, idempotent=idempotent)
            return wrapped

        return add if function is None else add(function)

    # ---- running ----

    def start(self) -> None:
        """Listen and serve in threads of its own; ``ConnectError`` if an address is taken.

        An address at which systemd or a predecessor listens for this process is taken over from
        them. ``READY=1`` goes to ``$NOTIFY_SOCKET``, if that is set.
        """
        self._check_usable()
        self._starting = True
        try:
            with self._changing:
                self._start()
        finally:
            self._starting = False

    def _start(self) -> None:
        poller, acceptor = self._listen()
        poller.serve(self._run_worker, workers=self._workers, max_concurrency=self._max_concurrency)
        self._inspection.started(poller, acceptor.addresses, acceptor.workers)
        poller.ended = acceptor.connection_ended
        # Before it accepts: a successor that does not get so far leaves all to who does.
        handover.tell_ready()
        acceptor.start()
        _log.info("serving at %s", ", ".join(acceptor.addresses))

    def _listen(self) -> tuple[Poller, Acceptor]:
        with self._lock:
            if self._poller is not None:
                msg = "the server is running already"
                raise Error(msg)
            segments.sweep()
            acceptor = Acceptor(self, self._terms, self._inspection)
            try:
                poller = Poller(
                    self.codec, server=True, wait=self._wait, spin_budget=self._spin_budget
                )
                self.registry.bind(poller)
            except BaseException:
                acceptor.close()
                raise
            self._poller = poller
            self._acceptor = acceptor
            self._stopping = False
            return poller, acceptor

    def _run_worker(self, poller: Poller) -> None:
        worker = Worker(self, poller)
        del poller  # the traceback of an error that somebody keeps knows this frame
        worker.run()

    def stop(self, grace: float = 5.0) -> None:
        """Stop: refuse new calls, let those under way end within ``grace`` seconds, hang up.

        Who is refused gets ``ConnectionLost`` with outcome ``not_started``. Handlers that run on
        after the grace are cancelled. A second stop waits for the first. Safe to call from any
        thread but a handler's. ``STOPPING=1`` goes to ``$NOTIFY_SOCKET``, unless there is a
        successor.
        """
        self._check_usable()
        self._stopping = True
        with self._changing:
            self._stop(grace)

    def _stop(self, grace: float) -> None:
        with self._lock:
            poller, acceptor = self._poller, self._acceptor
            if poller is None or acceptor is None:
                return
            self._acceptor = None
        if not acceptor.succeeded:
            handover.notify("STOPPING=1")
        self._inspection.draining()
        _log.info("stopping: calls under way have %g s", grace)
        acceptor.retire(min(grace, _HANDSHAKES_SECONDS))
        with self._lock:
            self._poller = None  # connections that are made now are hung up
        poller.drain()
        deadline = time.monotonic() + grace
        while poller.busy and time.monotonic() < deadline:
            time.sleep(0.002)
        poller.cancel_streams()
        stuck = poller.stop(patience=1.0)
        if stuck:
            _log.warning("handlers still run after the grace of %g s: %s", grace, stuck)
        acceptor.close()  # until here it has answered who asked how far we are
        poller.hang_up()
        self._inspection.stopped()
        self.registry.bind(None)
        _log.info("stopped")

    def hand_over(
        self,
        command: Sequence[str],
        *,
        timeout: float = 10.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a successor that listens where we do, and leave new connections to it.

        ``command`` is run with the listening sockets, by systemd's protocol, and gets ``timeout``
        seconds to send ``READY=1`` to ``$NOTIFY_SOCKET``: a ``Server`` with (at least) these
        addresses does both by itself. ``env`` is its environment instead of ours.

        Returns the new process, which is the caller's to wait for. From then on this server
        accepts no connections, and serves those that it has until ``stop``.
        Raises ``ConnectError`` if the successor ends or is not ready in time, ``Error`` if this
        server does not listen or is stopped meanwhile. Then the successor has been killed, and
        this server goes on. Safe to call from any thread, also a handler's.
        """
        self._check_usable()
        check_timeout(timeout)
        if isinstance(command, str) or not command:
            msg = f"command must be a program and its arguments, not {command!r}"
            raise ValueError(msg)
        # A start is waited for: its first callers may come before it has ended. A stop is not: it
        # waits for its handlers, and one of them may have called this.
        while not self._changing.acquire(timeout=0.01):
            if not self._starting or self._stopping:
                msg = "this server is being stopped or handed over by another thread"
                raise Error(msg)
        try:
            acceptor = self._acceptor
            if acceptor is None or not acceptor.addresses:
                msg = "this server does not listen: it was not started, or has handed over already"
                raise Error(msg)
            try:
                process = handover.start_successor(
                    command, acceptor.descriptors(), env, timeout, lambda: not self._stopping
                )
            except BaseException:
                acceptor.announce()
                raise
            handover.notify(f"MAINPID={process.pid}")
            acceptor.retire(_HANDSHAKES_SECONDS, succeeded=True)
            return process
        finally:
            self._changing.release()

    def serve_forever(self) -> None:
        """Start, and serve until SIGTERM or SIGINT; then stop with the usual grace.

        In a thread other than the main one it serves until somebody calls ``stop``.
        """
        in_main = threading.current_thread() is threading.main_thread()
        with _StopSignals() if in_main else contextlib.nullcontext() as signals:
            try:
                if self._poller is None:
                    self.start()
                if signals is not None:
                    signals.wait()
                elif self._poller is not None:
                    self._poller.join()
            finally:
                self.stop()

    def __enter__(self) -> Server:
        if self._poller is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stats(self) -> dict[str, int | float]:
        """Counters of the server: calls, connections, spins, sleeps, wake-ups sent.

        And what large values take, over all connections: as ``Client.stats``.
        """
        self._check_usable()
        poller = self._poller
        if poller is None:
            return {}
        return {**poller.stats(), **total_stats(list(poller.connections.values()))}

    # ---- what workers and the acceptor need ----

    def add_connection(self, agreement: handshake.Agreement) -> None:
        """Serve a new connection from now on."""
        poller = self._poller
        if poller is None:
            agreement.close()
        else:
            poller.add(agreement, agreement.terms.address)

    def caller_of(self, connection: Connection) -> Caller:
        """What calls the client at the other end."""
        if connection.caller is None:
            connection.caller = Caller(connection)
        caller: Caller = connection.caller
        return caller

    def _check_usable(self) -> None:
        if self._forked:
            msg = "this server was made before the fork and belongs to the parent; make a new one"
            raise ForkedError(msg)

    def _forget(self) -> None:
        """In a forked child: let go of what the parent serves."""
        self._forked = True
        if self._acceptor is not None:
            self._acceptor.close_inherited()


class _StopSignals:
    """SIGTERM and SIGINT as something to wait for, without a moment in which one is missed."""

    def __enter__(self) -> _StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Do nothing: the wakeup descriptor has the number."""

    def wait(self) -> None:
        """Sleep until one of them comes, or has come since we entered."""
        while not set(self._reader.recv(64)) & set(self._before):
            pass

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
