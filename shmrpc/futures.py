"""Calls that nobody waits for yet: ``submit`` and its futures.

There is no reader thread. Whoever asks a future for its result reads for all futures of the
client meanwhile. Only a future that has to tell somebody by itself (``add_done_callback``,
``concurrent.futures.wait``, ``as_completed``, ``asyncio.wrap_future``) starts a thread that does
the reading while such futures are pending.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Protocol

from ._native import ffi, lib
from .errors import DeadlineExceeded, Error
from .link import Link, Slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from .codec import Codec

__all__ = ["CallFuture", "Futures", "Host"]

_EAGAIN, _EINTR, _ETIMEDOUT = -11, -4, -110
_NEVER = float("inf")


class Host(Protocol):
    """The client, as far as its futures need it."""

    _codec: Codec

    def _slot(self, timeout: float | None = None) -> Slot: ...
    def _check_usable(self) -> None: ...
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
        self.link = link
        self.method = method
        self.call_id = 0
        self.position = 0
        self.deadline = deadline  # time.monotonic() seconds
        self.readers: list[Slot] = []

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future.result``; reads from the connection while it waits."""
        self._read_until_done(timeout)
        return super().result(timeout=0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``; reads from the connection while it waits."""
        self._read_until_done(timeout)
        return super().exception(timeout=0)

    def done(self) -> bool:
        """Whether it is finished; takes what has arrived into account."""
        if not super().done():
            self._read_until_done(0)
        return super().done()

    def cancel(self) -> bool:
        """Cancel the call, also if it was sent already; False if it is finished."""
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

    def _read_until_done(self, timeout: float | None) -> None:
        if super().done():
            return
        until = _NEVER if timeout is None else time.monotonic() + timeout
        slot = self.futures.slot_of(self.link)
        self.readers.append(slot)
        try:
            while not super().done():
                if not self.futures.read(slot, min(until, self.deadline)):
                    if time.monotonic() >= self.deadline:
                        self.futures.expire(self)
                    elif time.monotonic() >= until:
                        return
        finally:
            self.readers.remove(slot)
        self.link.slots.append(slot)


class Futures:
    """The pending futures of one client."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pending: dict[int, CallFuture] = {}
        self._ids = itertools.count(1)
        self._wanted = threading.Condition()
        self._reader: threading.Thread | None = None
        self._closed = False

    # ---- sending ----

    def submit(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None
    ) -> CallFuture:
        """Send a request; see ``Client.submit``."""
        name = self._host._name(method)  # noqa: SLF001
        if timeout is not None and not timeout >= 0:
            msg = f"timeout must be seconds from 0 on, not {timeout!r}"
            raise ValueError(msg)
        slot = self._host._slot(timeout)  # noqa: SLF001
        try:
            body = slot.pack([args, kwargs] if kwargs else args)
        except Exception as error:
            raise self._host._unpackable(slot, method, args, kwargs, error) from error  # noqa: SLF001
        flags = lib.SHMRPC_FLAG_KEYWORDS if kwargs else 0
        return self._send(slot, lib.SHMRPC_REQUEST, method, name, flags, body, timeout)

    def ping(self, timeout: float) -> float:
        """See ``Client.ping``."""
        start = time.perf_counter()
        slot = self._host._slot(timeout)  # noqa: SLF001
        self._send(slot, lib.SHMRPC_PING, "ping", ffi.NULL, 0, b"", timeout).result()
        return time.perf_counter() - start

    def _send(
        self,
        slot: Slot,
        kind: int,
        method: str,
        name: Any,
        flags: int,
        body: bytes,
        timeout: float | None,
    ) -> CallFuture:
        deadline = _NEVER if timeout is None else time.monotonic() + timeout
        deadline_ns = 0 if timeout is None else int(min(deadline, 1e9) * 1e9)
        future = CallFuture(self, slot.link, method, deadline)
        future.call_id = next(self._ids) << 16 | lib.SHMRPC_PYTHON_INDEX
        self._pending[future.call_id] = future
        position = ffi.new("uint64_t *")
        status = lib.shmrpc_send(
            slot.c,
            kind,
            flags,
            future.call_id,
            name,
            0,
            ffi.NULL,
            0,
            body,
            len(body),
            deadline_ns,
            position,
        )
        future.position = position[0]
        if status > 0:  # the ring is full: wait for room here, and read meanwhile
            status = self._flush(slot, deadline)
        if status < 0 and status != _ETIMEDOUT:
            self._pending.pop(future.call_id, None)
            slot.message.outcome = lib.shmrpc_outcome_of(
                slot.link.poller, slot.link.conn_id, future.call_id, future.position
            )
            raise self._host._failure(slot, method, status)  # noqa: SLF001
        slot.link.slots.append(slot)
        return future

    def _flush(self, slot: Slot, deadline: float) -> int:
        status: int = lib.shmrpc_flush(slot.c, _nanoseconds_until(deadline))
        while status in (_EAGAIN, _EINTR, lib.SHMRPC_EVENTS):
            if status == lib.SHMRPC_EVENTS:
                self.dispatch(slot.link)
            status = lib.shmrpc_wait(slot.c)
        return status

    # ---- reading ----

    def slot_of(self, link: Link) -> Slot:
        """A free slot of this link, which may be another than the client's current one."""
        self._host._check_usable()  # noqa: SLF001
        try:
            return link.slots.pop()
        except IndexError:
            return Slot(link, self._host._codec)  # noqa: SLF001

    def read(self, slot: Slot, until: float) -> bool:
        """Wait for something to happen; False when the time (``time.monotonic()``) is up."""
        status = lib.shmrpc_wait_events(slot.c, _nanoseconds_until(until))
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
                future = self._pending.pop(message.call_id, None)
                if future is not None:
                    self._settle(future, slot)
            elif message.kind == lib.SHMRPC_CLOSED:
                self._lose(link, -message.status)
        link.slots.append(slot)

    def _settle(self, future: CallFuture, slot: Slot) -> None:
        message = slot.message
        body = slot.body() if message.body_bytes else memoryview(b"")
        if message.status != 0:
            error = self._host._remote_error(  # noqa: SLF001
                slot.link, future.method, message.status, bytes(body)
            )
            future.finish(None, error)
            return
        try:
            result = self._host._codec.decode(body) if body else None  # noqa: SLF001
        except ValueError as reason:
            future.finish(None, reason)
        else:
            future.finish(result)

    # ---- ends ----

    def _lose(self, link: Link, status: int) -> None:
        """The link has ended: tell each of its futures what became of its call."""
        for call_id, future in list(self._pending.items()):
            if future.link is link and self._pending.pop(call_id, None) is not None:
                outcome = lib.shmrpc_outcome_of(
                    link.poller, link.conn_id, call_id, future.position
                )
                future.finish(None, link.lost(status, outcome, future.method))

    def expire(self, future: CallFuture) -> None:
        """Its deadline has passed."""
        msg = f"{future.method!r} on {future.link.peer} took longer than its timeout"
        self.forget(future)
        future.finish(None, DeadlineExceeded(msg))

    def forget(self, future: CallFuture) -> None:
        """Take no reply for it any more, and tell the server."""
        if self._pending.pop(future.call_id, None) is None:
            return
        slot = self.slot_of(future.link)
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
        future.link.slots.append(slot)

    def close(self) -> None:
        """The client is closing: nobody will read any more."""
        self._closed = True
        for future in list(self._pending.values()):
            self._lose(future.link, -32)
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

    def _read_for_all(self) -> None:
        while not self._closed:
            future = next(iter(list(self._pending.values())), None)
            if future is None:
                with self._wanted:
                    if not self._pending and not self._closed:
                        self._wanted.wait()
                continue
            slot = self.slot_of(future.link)
            future.readers.append(slot)
            until = min((other.deadline for other in list(self._pending.values())), default=_NEVER)
            self.read(slot, until)
            with contextlib.suppress(ValueError):
                future.readers.remove(slot)
            future.link.slots.append(slot)
            now = time.monotonic()
            for other in list(self._pending.values()):
                if now >= other.deadline:
                    self.expire(other)


def _nanoseconds_until(deadline: float) -> int:
    if deadline == _NEVER:
        return -1
    return max(0, int((deadline - time.monotonic()) * 1e9))


