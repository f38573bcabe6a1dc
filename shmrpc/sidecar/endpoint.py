"""One upstream server that speaks shmrpc: calls are passed on to it without being looked into.

All callers share one connection to it; but one that serves gets a connection of its own, so that
the server can call it back (back.py).
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from shmrpc.client import Client
from shmrpc.errors import ConnectionLost
from shmrpc.tending import tend

from .back import BackInline, BackWorker
from .calls import RawChannel
from .raw import RawCodec

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmrpc.poller import Connection, Poller, Slot

    from .calls import RawCall, RawFuture
    from .raw import Request

__all__ = ["NativeEndpoint", "OwnEndpoint"]


class _RelayClient(RawChannel, Client):
    """A client that passes requests on as they are, and reconnects by one attempt a call.

    Who can wait, or go elsewhere, is the caller.
    """

    def __init__(self, address: str, changed: Callable[[], None], **options: Any) -> None:
        """``changed`` is called when a connection must not be used any more."""
        self._changed = changed
        super().__init__(address, codec=RawCodec(), **options)

    def _connection(self, deadline: float) -> Connection:
        return self._connect(min(deadline, time.monotonic() + self._timeout), once=True)

    def _adopt(self, link: Connection) -> None:
        super()._adopt(link)
        if not link.tended:
            link.always_tended = True  # replies with blocks pass by us
            tend(link)

    def _retire(self, connection: Connection) -> None:
        super()._retire(connection)
        self._changed()


class _OwnClient(_RelayClient):
    """That of one caller, to whom calls in the other direction go."""

    def __init__(self, caller: Connection, *arguments: Any, **options: Any) -> None:
        self._caller = caller
        super().__init__(*arguments, **options)

    @property
    def _serves(self) -> bool:
        return True

    def _serve(self, link: Connection) -> None:
        self.registry.admits_others = True
        super()._serve(link)

    def _run_worker(self, poller: Poller) -> None:
        worker = BackWorker(self, poller, self._caller)
        del poller
        worker.run()

    def _inline_workers(self, poller: Poller) -> BackInline:
        return BackInline(self, poller, self._caller)


class NativeEndpoint:
    """One address of an upstream. It connects when the first call comes, and anew after a loss."""

    native = True

    def __init__(
        self,
        address: str,
        connect_timeout: float,
        max_message_bytes: int,
        changed: Callable[[], None],
    ) -> None:
        """``changed`` is called when a connection must not be used any more."""
        self.address = address
        self._timeout = connect_timeout
        self._limit = max_message_bytes
        self._changed = changed
        self._lock = threading.Lock()
        self._connected: _RelayClient | None = None  # the client, once there was a connection
        self._closed = False
        self._own: dict[Connection, OwnEndpoint] = {}

    def _make_client(self, timeout: float) -> _RelayClient:
        return _RelayClient(
            self.address, self._changed, timeout=timeout, max_message_bytes=self._limit
        )

    def client(self, timeout: float | None = None) -> _RelayClient:
        """The client, connected once; ``ConnectError``."""
        client = self._connected
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                msg = f"lost {self.address}: it is no upstream any more"
                raise ConnectionLost(msg, "not_sent")
            if self._connected is None:
                limit = self._timeout if timeout is None else min(timeout, self._timeout)
                self._connected = self._make_client(limit)
                self._connected._timeout = self._timeout
            return self._connected

    def of(self, caller: Connection) -> OwnEndpoint:
        """The same for one caller alone; to be left (``leave``) when the call has ended."""
        with self._lock:
            own = self._own.get(caller)
            if own is None:
                own = OwnEndpoint(caller, self.address, self._timeout, self._limit)
                self._own[caller] = own
                caller.at_end.append(partial(self._forget, caller))
            own.enter()
        if caller.closed:  # perhaps before it could tell us
            self._forget(caller)
        return own

    def _forget(self, caller: Connection) -> None:
        with self._lock:
            own = self._own.pop(caller, None)
        if own is not None:
            own.end()

    def is_current(self, connection: Connection) -> bool:
        """Whether calls go to this connection now."""
        client = self._connected
        return client is not None and client._link is connection

    def forward(
        self, worker: Any, method: bytes, timeout_ns: int, slot: Slot | None = None, status: int = 0
    ) -> Slot:
        """See ``RawChannel.forward``."""
        return self.client().forward(worker, method, timeout_ns, slot, status)

    def begin(self, request: Request, timeout: float | None) -> RawFuture:
        """See ``RawChannel.begin``."""
        return self.client(timeout).begin(request, timeout)

    def notify(self, request: Request, timeout: float | None) -> None:
        """See ``RawChannel.send_on``."""
        self.client(timeout).send_on(request, timeout)

    def open(self, request: Request, timeout: float | None, *, ended: bool) -> RawCall:
        """See ``RawChannel.open_raw``."""
        return self.client(timeout).open_raw(request, timeout, ended=ended)

    def close(self) -> None:
        """Hang up. Calls under way end with an error."""
        with self._lock:
            self._closed = True
            client, self._connected = self._connected, None
            own, self._own = list(self._own.values()), {}
        for one in own:
            one.end()
        if client is not None:
            client.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"


class OwnEndpoint(NativeEndpoint):
    """An address as one caller has it, by a connection of its own. It ends with the caller."""

    def __init__(
        self, caller: Connection, address: str, connect_timeout: float, max_message_bytes: int
    ) -> None:
        super().__init__(address, connect_timeout, max_message_bytes, _nothing)
        self._caller = caller
        self._users = 0  # calls under way; guarded by our lock
        self._ended = False

    def _make_client(self, timeout: float) -> _RelayClient:
        return _OwnClient(
            self._caller,
            self.address,
            self._changed,
            timeout=timeout,
            max_message_bytes=self._limit,
        )

    def enter(self) -> None:
        """A call begins: its notifications are sent, whatever becomes of the caller."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """It has ended."""
        with self._lock:
            self._users -= 1
            closes = self._ended and not self._users
        if closes:
            self.close()

    def end(self) -> None:
        """Hang up, when nobody uses it any more."""
        with self._lock:
            self._ended = True
            closes = not self._users
        if closes:
            self.close()


def _nothing() -> None:
    """No way goes by such a connection."""
