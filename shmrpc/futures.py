"""Calls that nobody waits for yet: ``submit`` and its futures.

There is no reader thread. Whoever asks a future for its result reads for all futures of the
client meanwhile. Only a future that has to tell somebody by itself (``add_done_callback``,
``concurrent.futures.wait``, ``as_completed``, ``asyncio.wrap_future``) starts a thread that does
the reading while such futures are pending.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Protocol

from ._native import ffi, lib
from .errors import Cancelled, DeadlineExceeded, Error, ProtocolError
from .link import FOREVER, Link, Slot, check_timeout, nanoseconds_until
from .metadata import Metadata, pack_metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from .codec import Codec

__all__ = ["CallFuture", "Futures", "Host"]

_EAGAIN, _EINTR, _ETIMEDOUT = -errno.EAGAIN, -errno.EINTR, -errno.ETIMEDOUT
_EPIPE, _EPROTO, _ENOTCONN = -errno.EPIPE, -errno.EPROTO, -errno.ENOTCONN


class Host(Protocol):
    """The client, as far as its futures need it."""

    _codec: Codec

    def _slot(self, timeout: float | None = None) -> Slot: ...
    def _check_fork(self) -> None: ...
    def _drop(self, link: Link) -> None: ...
    def _name(self, method: str) -> Any: ...
    def _failure(self, slot: Slot, method: str, status: int) -> Exception: ...
    def _remote_error(self, link: Link, method: str, status: int, body: bytes) -> Error: ...
    def _unpackable(
        self,
        slot: Slot,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        error: Exception,
    ) -> Exception: ...


class _Waiters(list[Any]):
    """The futures module's list of who waits for one future, which tells when it gets one."""

    def __init__(self, future: CallFuture) -> None:
        super().__init__()
        self._future = future

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._future.read_in_background()


class CallFuture(Future[Any]):
    """The result of a submitted call. Safe to use from any thread, like any Future."""

    def __init__(self, futures: Futures, link: Link, method: str, deadline: float) -> None:
        super().__init__()
        self._waiters = _Waiters(self)
        self.futures = futures
        self.peer = link.peer
        self.method = method
        self.call_id = 0
        self.position = 0
        self.deadline = deadline  # time.monotonic() seconds
        self.readers: list[Slot] = []

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future.result``; reads from the connection while it waits."""
        return super().result(self._read_until_done(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``; reads from the connection while it waits."""
        return super().exception(self._read_until_done(timeout))

    def done(self) -> bool:
        """Whether it is finished; takes what has arrived into account."""
        if not super().done():
            self._read_until_done(0)
        return super().done()

    def cancel(self) -> bool:
        """Cancel the call, also if it was sent already; False if it is finished."""
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self.set_running_or_notify_cancel()
        self.futures.forget(self)
        self.wake_readers()
        return True

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """As ``Future.add_done_callback``; a background thread reads from now on."""
        super().add_done_callback(fn)
        self.read_in_background()

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Set the outcome, unless it has been cancelled meanwhile."""
        with contextlib.suppress(InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(result)
        self.wake_readers()

    def wake_readers(self) -> None:
        """End the waits of threads that read on this future's behalf."""
        for slot in list(self.readers):
            lib.shmrpc_poke(slot.c)

    def read_in_background(self) -> None:
        """Make sure that it finishes without anybody asking."""
        if not super().done():
            self.futures.start_reader()

    def _read_until_done(self, timeout: float | None) -> float | None:
        """Read until it is finished; returns how long ``Future``'s own wait may still take."""
        if super().done():
            return 0
        until = FOREVER if timeout is None else time.monotonic() + timeout
        link = self.futures.link_of(self)
        if link is None:
            return timeout  # finished, or about to be by the thread that took it
        slot = self.futures.slot_of(link)
        self.readers.append(slot)
        try:
            while not super().done():
                if not self.futures.read(slot, min(until, self.deadline)):
                    if time.monotonic() >= self.deadline:
                        self.futures.expire(self)
                    elif time.monotonic() >= until:
                        return 0
        finally:
            self.readers.remove(slot)
        link.slots.append(slot)
        return 0


class Futures:
    """The pending futures of one client."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pending: dict[int, tuple[CallFuture, Link]] = {}
        self._ids = itertools.count(1)
        self._wanted = threading.Condition()
        self._reader: threading.Thread | None = None
        self._reader_slot: Slot | None = None
        self._closed = False

    # ---- sending ----

    def submit(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> CallFuture:
        """Send a request; see ``Client.submit``."""
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        return self._send(lib.SHMRPC_REQUEST, method, args, kwargs, deadline, metadata)

    def notify(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> None:
        """Send a notification; see ``Client.notify``."""
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        self._send(lib.SHMRPC_NOTIFY, method, args, kwargs, deadline, metadata)

    def ping(self, timeout: float) -> float:
        """See ``Client.ping``."""
        start = time.perf_counter()
        deadline = time.monotonic() + check_timeout(timeout)
        self._send(lib.SHMRPC_PING, "ping", (), {}, deadline).result()
        return time.perf_counter() - start

    def _send(
        self,
        kind: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float,
        metadata: Metadata | None = None,
    ) -> CallFuture:
        """Send a message, over a new connection if the old one turns out to be gone."""
        beside = b"" if metadata is None else pack_metadata(metadata)
        while True:
            left = None if deadline == FOREVER else max(0.0, deadline - time.monotonic())
            slot = self._host._slot(left)
            future = CallFuture(self, slot.link, method, deadline)
            if kind != lib.SHMRPC_NOTIFY:
                future.call_id = next(self._ids) << 16 | lib.SHMRPC_PYTHON_INDEX
                self._pending[future.call_id] = (future, slot.link)
            status = self._send_once(slot, kind, future, args, kwargs, beside)
            if status > 0:  # the ring is full: wait for room here, and read meanwhile
                status = self._flush(slot, deadline)
            if status == 0:
                slot.link.slots.append(slot)
                return future
            self._pending.pop(future.call_id, None)
            if status == _ENOTCONN:
                self._host._drop(slot.link)
                continue
            if status in (_EPIPE, _EPROTO):
                slot.message.outcome = lib.shmrpc_outcome_of(
                    slot.link.poller, slot.link.conn_id, future.call_id, future.position
                )
            raise self._host._failure(slot, method, status)

    def _send_once(
        self,
        slot: Slot,
        kind: int,
        future: CallFuture,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        beside: bytes,
    ) -> int:
        name, body, flags = ffi.NULL, b"", 0
        if kind != lib.SHMRPC_PING:
            name = self._host._name(future.method)
            try:
                body = slot.pack([args, kwargs] if kwargs else args)
            except Exception as error:
                self._pending.pop(future.call_id, None)
                raise self._host._unpackable(slot, future.method, args, kwargs, error) from error
            flags = lib.SHMRPC_FLAG_KEYWORDS if kwargs else 0
        deadline_ns = 0
        if kind == lib.SHMRPC_REQUEST and future.deadline != FOREVER:
            deadline_ns = int(min(future.deadline, 9e9) * 1e9)
        position = ffi.new("uint64_t *")
        status: int = lib.shmrpc_send(
            slot.c,
            kind,
            flags,
            future.call_id,
            name,
            0,
            beside,
            len(beside),
            body,
            len(body),
            deadline_ns,
            position,
        )
        future.position = position[0]
        return status

    def _flush(self, slot: Slot, deadline: float) -> int:
        status: int = lib.shmrpc_flush(slot.c, nanoseconds_until(deadline))
        while status in (_EAGAIN, _EINTR, lib.SHMRPC_EVENTS):
            if status == lib.SHMRPC_EVENTS:
                self.dispatch(slot.link)
            status = lib.shmrpc_wait(slot.c)
        return status

    # ---- reading ----

    def link_of(self, future: CallFuture) -> Link | None:
        """The link that a pending future's reply will come by."""
        self._host._check_fork()
        entry = self._pending.get(future.call_id)
        return entry[1] if entry is not None else None

    def slot_of(self, link: Link) -> Slot:
        """A free slot of this link, which may be another than the client's current one."""
        self._host._check_fork()
        try:
            return link.slots.pop()
        except IndexError:
            return Slot(link, self._host._codec)

    def read(self, slot: Slot, until: float) -> bool:
        """Wait for something to happen; False when the time (``time.monotonic()``) is up."""
        status = lib.shmrpc_wait_events(slot.c, nanoseconds_until(until))
        if status == lib.SHMRPC_EVENTS:
            self.dispatch(slot.link)
        elif status < 0 and status not in (_EAGAIN, _EINTR):
            if status != _ETIMEDOUT:
                self._lose(slot.link, status)
            return False
        return True

    def dispatch(self, link: Link) -> None:
        """Take the events that the link has and finish their futures."""
        slot = self.slot_of(link)
        message = slot.message
        while lib.shmrpc_take(slot.c):
            if message.kind == lib.SHMRPC_REPLY:
                entry = self._pending.get(message.call_id)
                if entry is not None:
                    self._settle(entry[0], slot)
                    self._pending.pop(message.call_id, None)
            elif message.kind == lib.SHMRPC_CLOSED:
                self._lose(link, -message.status)
        link.slots.append(slot)

    def _settle(self, future: CallFuture, slot: Slot) -> None:
        message = slot.message
        body = slot.body() if message.body_bytes else memoryview(b"")
        if message.status != 0:
            error = self._host._remote_error(slot.link, future.method, message.status, bytes(body))
            future.finish(None, error)
            return
        try:
            result = self._host._codec.decode(body) if body else None
        except (ValueError, TypeError) as reason:
            msg = f"{slot.link.peer} sent a result of {future.method!r} that is none: {reason}"
            future.finish(None, ProtocolError(msg))
        else:
            future.finish(result)

    # ---- ends ----

    def _lose(self, link: Link, status: int) -> None:
        """The link has ended: tell each of its futures what became of its call."""
        for call_id, (future, carrier) in list(self._pending.items()):
            if carrier is link and self._pending.pop(call_id, None) is not None:
                outcome = lib.shmrpc_outcome_of(link.poller, link.conn_id, call_id, future.position)
                future.finish(None, link.lost(status, outcome, future.method))

    def expire(self, future: CallFuture) -> None:
        """Its deadline has passed."""
        msg = f"{future.method!r} on {future.peer} took longer than its timeout"
        self.forget(future)
        future.finish(None, DeadlineExceeded(msg))

    def forget(self, future: CallFuture) -> None:
        """Take no reply for it any more, and tell the server."""
        entry = self._pending.pop(future.call_id, None)
        if entry is None:
            return
        slot = self.slot_of(entry[1])
        lib.shmrpc_send(
            slot.c,
            lib.SHMRPC_CANCEL,
            0,
            future.call_id,
            ffi.NULL,
            0,
            ffi.NULL,
            0,
            b"",
            0,
            0,
            ffi.new("uint64_t *"),
        )
        slot.link.slots.append(slot)

    def close(self) -> None:
        """The client is closing: nobody will read any more."""
        self._closed = True
        for call_id, (future, link) in list(self._pending.items()):
            if self._pending.pop(call_id, None) is not None:
                msg = f"{future.method!r} on {link.peer}: the client was closed meanwhile"
                future.finish(None, Cancelled(msg))
        with self._wanted:
            self._wanted.notify_all()

    # ---- the background reader ----

    def start_reader(self) -> None:
        """Read in a thread until no future is pending; it is kept for the next time."""
        with self._wanted:
            if self._reader is None or not self._reader.is_alive():
                self._reader = threading.Thread(
                    target=self._read_for_all, name="shmrpc-futures", daemon=True
                )
                self._reader.start()
            self._wanted.notify_all()
        slot = self._reader_slot
        if slot is not None:
            lib.shmrpc_poke(slot.c)  # a deadline may be nearer than the one it waits for

    def _read_for_all(self) -> None:
        while not self._closed:
            if self._pending:
                self._read_once()
                continue
            with self._wanted:
                if not self._pending and not self._closed:
                    self._wanted.wait()

    def _read_once(self) -> None:
        """Wait for something to happen to any pending future, and expire those that are due."""
        link = next((link for _, link in list(self._pending.values())), None)
        if link is None:
            return
        slot = self.slot_of(link)
        self._reader_slot = slot  # from here on a new deadline pokes us
        pending = list(self._pending.values())
        if not pending:
            link.slots.append(slot)
            return
        future = pending[0][0]
        future.readers.append(slot)
        self.read(slot, min(other.deadline for other, _ in pending))
        self._reader_slot = None
        with contextlib.suppress(ValueError):
            future.readers.remove(slot)
        link.slots.append(slot)
        now = time.monotonic()
        for other, _ in list(self._pending.values()):
            if now >= other.deadline:
                self.expire(other)
