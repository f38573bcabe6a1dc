"""The synchronous client: a connection that is made again when it is lost."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .channel import Channel
from .codec import Codec, MsgpackCodec
from .errors import Cancelled, ConnectError, ForkedError
from .futures import CallFuture
from .intercepted import Intercepted
from .lending import MEMORY_BYTES, connection_stats
from .link import check_waiting, connect_link, failure_of, terms_of
from .poller import Connection, Poller, Wait, check_timeout
from .registry import Registry
from .retries import repeating
from .worker import InlineWorkers, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from .interceptors import Interceptor
    from .segments import Backing

__all__ = ["Client"]

F = TypeVar("F", bound="Callable[..., Any]")

_log = logging.getLogger("shmrpc.client")

_BACKOFF_FIRST = 0.002
_BACKOFF_MAX = 0.2
_WORKERS = 16
_MAX_CONCURRENCY = 1024


class Client(Channel):
    """A connection to a server that is made again when it is lost.

    All methods may be used by any number of threads at once. A client made before a fork raises
    ``ForkedError`` in the child. Use it as a context manager, or ``close`` it.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 5.0,
        fallback: str | None = None,
        max_message_bytes: int = 64 << 20,
        max_memory_bytes: int = MEMORY_BYTES,
        backing: Backing = "auto",
        allow_uids: Iterable[int] = (),
        trust_uids: Iterable[int] = (),
        wait: Wait = "auto",
        spin_budget: float | None = None,
        codec: Codec | None = None,
        interceptors: Iterable[Interceptor] = (),
        retries: int = 0,
    ) -> None:
        """Connect; see ``connect`` for the parameters."""
        timeout = check_timeout(timeout)
        self._terms = terms_of(
            [address] if fallback is None else [address, fallback],
            max_message_bytes=max_message_bytes,
            max_memory_bytes=max_memory_bytes,
            backing=backing,
            allow_uids=allow_uids,
            trust_uids=trust_uids,
        )
        check_waiting(wait, spin_budget)
        super().__init__(codec if codec is not None else MsgpackCodec(), timeout)
        self._wait: Wait = wait
        self._spin_budget = spin_budget
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._forked = False
        self._reconnects = -1
        self._link: Connection | None = None
        self._retired: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.registry = Registry()
        around = [*interceptors, *repeating(retries)]
        if around:
            # In place of our own methods, so that clients without interceptors pay nothing.
            calls = Intercepted(self, around, self._peer_name, self._is_idempotent)
            self.__dict__.update(calls.methods())
        _clients.add(self)
        self._connect(time.monotonic() + timeout, once=True)

    # ---- connecting ----

    def _connection(self, deadline: float) -> Connection:
        """The live connection, made now if there is none; tries until the deadline."""
        return self._connect(min(deadline, time.monotonic() + self._timeout))

    def _connect(self, deadline: float, *, once: bool = False) -> Connection:
        link = self._link
        if link is not None:
            return link
        delay = _BACKOFF_FIRST
        while True:
            self._check_usable()
            left = deadline - time.monotonic()
            if not self._connecting.acquire(timeout=max(left, 0.001)):
                msg = f"another thread is still connecting to {self._terms[0].address}"
                raise ConnectError(msg)
            try:
                self._check_usable()
                if self._link is None:
                    self._adopt(self._connect_once(max(left, 0.001)))
                assert self._link is not None  # noqa: S101
                return self._link
            except ConnectError:
                if once or time.monotonic() + delay >= deadline:
                    raise
            finally:
                self._connecting.release()
            time.sleep(delay)
            delay = min(delay * 2, _BACKOFF_MAX)

    def _connect_once(self, timeout: float) -> Connection:
        failures = []
        for terms in self._terms:
            try:
                return connect_link(
                    terms, self._codec, timeout, wait=self._wait, spin_budget=self._spin_budget
                )
            except ConnectError as error:
                failures.append(error)
        raise failure_of(failures)

    def _adopt(self, link: Connection) -> None:
        with self._lock:
            if self._closed:
                link.shutdown()
                self._check_usable()
            if self._serves:
                self._serve(link)
            self._link = link
            self._slots = link.slots
            self._reconnects += 1
        _log.debug("connected to %s", link.peer)

    def _drop(self, connection: Connection) -> None:
        """Stop using a connection that was lost; the next call makes a new one."""
        self._retire(connection)
        connection.shutdown()
        _log.debug("hung up on %s", connection.peer)

    def _retire(self, connection: Connection) -> None:
        """Make the next call on a new connection; those under way on this one go on."""
        with self._lock:
            if self._link is connection:
                self._unlink()
            self._retired.add(connection)
        connection.retire()

    def _unlink(self) -> None:
        """Have no connection (our lock is held)."""
        self._link = None
        self._slots = []
        self.registry.bind(None)

    def _check_fork(self) -> None:
        if self._forked:
            msg = f"this client of {self._terms[0].address} was made before the fork; connect anew"
            raise ForkedError(msg)

    def _check_usable(self) -> None:
        self._check_fork()
        if self._closed:
            msg = f"this client of {self._terms[0].address} is closed"
            raise Cancelled(msg)

    # ---- methods that the server may call ----

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
        """Offer a function to the server: ``current_call().caller.call(...)`` in its handlers.

        Use it as ``Server.method``. It runs in a thread that waits for a reply on this client, if
        there is one, else in a thread of the client's own; ``current_call()`` works in it.
        """

        def add(wrapped: Any) -> Any:
            self._check_usable()
            self.registry.add(wrapped, name, requests=requests, idempotent=idempotent)
            with self._lock:
                if self._link is not None:
                    self._serve(self._link)
            return wrapped

        return add if function is None else add(function)

    @property
    def _serves(self) -> bool:
        """Whether there is anything that the server may call."""
        return len(self.registry) > 0

    def _serve(self, link: Connection) -> None:
        """Run the registered methods for this server (our lock is held)."""
        if link.poller.serving:
            return
        self.registry.bind(link.poller)
        inline = self._inline_workers(link.poller)
        link.at_end.append(inline.end)
        link.poller.serve(
            self._run_worker,
            inline.serve,
            workers=_WORKERS,
            max_concurrency=_MAX_CONCURRENCY,
        )
        link.say_serves()

    def _inline_workers(self, poller: Poller) -> InlineWorkers:
        """What serves in threads that wait for something else."""
        return InlineWorkers(self, poller)

    def _run_worker(self, poller: Poller) -> None:
        worker = Worker(self, poller)
        del poller  # the traceback of an error that somebody keeps knows this frame
        worker.run()

    @property
    def codec(self) -> Codec:
        """How values travel."""
        return self._codec

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

    def _is_idempotent(self, method: str) -> bool:
        """Ask the server; what it does not know is not."""
        described = self._call_with("shmrpc.describe", (method,), {}, self._timeout, None)
        return isinstance(described, dict) and described.get("idempotent") is True

    # ---- the rest ----

    def stats(self) -> dict[str, int | float]:
        """Counters of the current connection, and what large values take.

        Spins, sleeps, wake-ups, frames, late replies; ``arena_bytes`` of shared memory there are
        for what we send, ``lent_blocks`` and ``lent_bytes`` of them the server holds, the oldest
        for ``lent_oldest_s`` seconds, ``loans`` are ours; ``pinned_blocks`` and ``pinned_bytes``
        of the server's are held here by values that were received.
        """
        link = self._connection(time.monotonic() + self._timeout)
        return {**connection_stats(link), "reconnects": self._reconnects}

    def close(self) -> None:
        """Hang up. Calls under way in other threads end with an error. Safe to repeat."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = [*self._retired] if self._link is None else [self._link, *self._retired]
            self._unlink()
        for link in links:
            calls = link.session.calls
            for call_id in list(calls):  # no items(): making these lets other threads run
                pending = calls.get(call_id)
                if isinstance(pending, CallFuture):
                    pending.abandon()
                elif pending is not None and calls.pop(call_id, None) is not None:
                    pending.lost(errno.EPIPE)
            link.shutdown()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._link else "not connected"
        return f"<shmrpc.Client {self._terms[0].address} {state}>"

    def _forget(self) -> None:
        """In a forked child: this client belongs to the parent."""
        self._forked = True
        self._link = None
        self._slots = []


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
