"""The synchronous client: calls from any number of threads over one connection.

``call`` packs its arguments, makes one C call that sends the request and waits for the reply, and
unpacks the result; everything else here is what to do when that is not the whole story.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

import msgpack

from . import address as addresses
from ._native import ffi, lib
from .codec import Codec, MsgpackCodec, explain_arguments
from .errors import (
    STATUS_NAMES,
    Cancelled,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    ForkedError,
    MessageTooLarge,
    MethodNotFound,
    Overloaded,
    ProtocolError,
    RemoteError,
)
from .futures import CallFuture, Futures
from .handshake import Terms
from .link import (
    FOREVER,
    Link,
    Slot,
    Wait,
    check_options,
    check_timeout,
    make_name,
    nanoseconds_until,
)
from .metadata import Metadata, pack_metadata
from .proxy import Proxy, make_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from .segments import Backing

__all__ = ["Client", "connect"]

T = TypeVar("T")

_NAMES_MAX = 4096
_BACKOFF_FIRST = 0.002
_BACKOFF_MAX = 0.2

_call = lib.shmrpc_call
_unpackb = msgpack.unpackb
_MESSAGE = lib.SHMRPC_MESSAGE
_EVENTS = lib.SHMRPC_EVENTS
_EINTR, _EAGAIN, _ENOMEM, _EPIPE = -errno.EINTR, -errno.EAGAIN, -errno.ENOMEM, -errno.EPIPE
_EPROTO, _EMSGSIZE, _ENOTCONN = -errno.EPROTO, -errno.EMSGSIZE, -errno.ENOTCONN
_ETIMEDOUT = -errno.ETIMEDOUT


def connect(
    address: str,
    *,
    timeout: float = 5.0,
    fallback: str | None = None,
    max_message_bytes: int = 64 << 20,
    backing: Backing = "auto",
    allow_uids: Iterable[int] = (),
    wait: Wait = "auto",
    spin_budget: float | None = None,
    codec: Codec | None = None,
) -> Client:
    """Connect to a server and return a client.

    ``address`` is a service's name such as ``"calc"``, or ``shm://``, ``unix://`` or ``tcp://``;
    ``fallback`` is tried when nobody can be reached there. ``timeout`` in seconds is for making
    the connection, now and whenever it has to be made again; calls have their own.
    ``max_message_bytes`` limits what the server may send. ``backing`` is where our memory comes
    from: ``"shm"``, ``"memfd"`` or ``"auto"``. ``allow_uids`` are the other users' servers that
    may be talked to. ``wait`` is ``"auto"``, ``"spin"`` (lowest latency at any cost) or
    ``"block"``; ``spin_budget`` in seconds is how long ``"auto"`` spins at most.

    Raises ``ConnectError``.
    """
    return Client(
        address,
        timeout=timeout,
        fallback=fallback,
        max_message_bytes=max_message_bytes,
        backing=backing,
        allow_uids=allow_uids,
        wait=wait,
        spin_budget=spin_budget,
        codec=codec,
    )


class Client:
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
        backing: Backing = "auto",
        allow_uids: Iterable[int] = (),
        wait: Wait = "auto",
        spin_budget: float | None = None,
        codec: Codec | None = None,
    ) -> None:
        """Connect; see ``connect`` for the parameters."""
        check_options(max_message_bytes, backing, wait, spin_budget)
        check_timeout(timeout)
        uids = frozenset(allow_uids)
        self._terms = [
            Terms(addresses.parse(text), max_message_bytes, backing=backing, allow_uids=uids)
            for text in ([address] if fallback is None else [address, fallback])
        ]
        self._timeout = timeout
        self._wait: Wait = wait
        self._spin_budget = spin_budget
        self._codec: Codec = codec if codec is not None else MsgpackCodec()
        self._decode = self._codec.decode
        self._plain = type(self._codec) is MsgpackCodec
        self._names: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._closed = False
        self._forked = False
        self._reconnects = -1
        # The pool of the current link's free slots. Empty when there is no link, so that the
        # path of every call needs to look at nothing else.
        self._slots: list[Slot] = []
        self._link: Link | None = None
        self._retired: weakref.WeakSet[Link] = weakref.WeakSet()
        self._futures: Futures | None = None
        _clients.add(self)
        self._current_link(time.monotonic() + timeout, once=True)

    # ---- connecting ----

    def _current_link(self, deadline: float, *, once: bool = False) -> Link:
        """The live link, made now if there is none; tries until the deadline."""
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

    def _connect_once(self, timeout: float) -> Link:
        failures = []
        for terms in self._terms:
            try:
                return Link(terms, timeout, wait=self._wait, spin_budget=self._spin_budget)
            except ConnectError as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        raise ConnectError("; ".join(str(error) for error in failures)) from failures[0]

    def _adopt(self, link: Link) -> None:
        with self._lock:
            if self._closed:
                link.shutdown()
                self._check_usable()
            self._link = link
            self._slots = link.slots
            self._reconnects += 1

    def _drop(self, link: Link) -> None:
        """Stop using a link that was lost; the next call makes a new one."""
        self._retire(link)
        link.shutdown()

    def _retire(self, link: Link) -> None:
        """Make no more calls over a link, whose server stops; those under way go on."""
        with self._lock:
            if self._link is link:
                self._link = None
                self._slots = []
            self._retired.add(link)
        link.retire()

    def _check_fork(self) -> None:
        if self._forked:
            msg = f"this client of {self._terms[0].address} was made before the fork; connect anew"
            raise ForkedError(msg)

    def _check_usable(self) -> None:
        self._check_fork()
        if self._closed:
            msg = f"this client of {self._terms[0].address} is closed"
            raise Cancelled(msg)

    def _slot(self, timeout: float | None = None) -> Slot:
        """A free slot of a live link."""
        try:
            return self._slots.pop()
        except IndexError:
            pass
        patience = self._timeout if timeout is None else min(timeout, self._timeout)
        return Slot(self._current_link(time.monotonic() + patience), self._codec)

    def _name(self, method: Any) -> Any:
        if not isinstance(method, str):
            msg = f"the method's name must be a str, not {type(method).__name__}"
            raise TypeError(msg)
        name = make_name(method)
        if len(self._names) >= _NAMES_MAX:
            self._names.clear()
        self._names[method] = name
        return name

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
        """Call a method and return its result.

        ``timeout`` in seconds bounds the whole call; None waits as long as the server lives.
        ``metadata`` (str to str or bytes, up to 8 KiB) is what the handler finds in
        ``current_call().metadata``. Other keywords go to the method.
        Arguments are copied; the result is a new object. Raises ``DeadlineExceeded``,
        ``RemoteError``, ``MethodNotFound``, ``Overloaded``, ``MessageTooLarge``,
        ``ConnectionLost``, ``ConnectError``, and TypeError or ValueError for arguments that can't
        be sent. Interrupting it (Ctrl-C) cancels the call.
        """
        if kwargs or timeout is not None or metadata is not None:
            return self._call_with(method, args, kwargs, timeout, metadata)
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = self._slot()
        try:
            name = self._names[method]
        except (KeyError, TypeError):
            name = self._name(method)
        try:
            body = slot.pack(args)
        except Exception as error:
            raise self._unpackable(slot, method, args, kwargs, error) from error
        count = _call(slot.c, name, body, len(body), -1)
        if count < 0:
            if count == _ENOTCONN:
                self._drop(slot.link)
                return self.call(method, *args)
            return self._finish(slot, method, count)
        try:
            if self._plain:  # MsgpackCodec.decode written out: 0.1 us less
                result = _unpackb(slot.view[:count], strict_map_key=False)
            else:
                result = self._decode(slot.view[:count])
        except (ValueError, TypeError) as error:
            raise self._undecodable(slot, method, error) from error
        slot.link.slots.append(slot)
        return result

    def _call_with(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> Any:
        """Call with more than arguments; the timeout includes connecting again."""
        beside = b"" if metadata is None else pack_metadata(metadata)
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        while True:
            slot = self._slot(None if timeout is None else max(0.0, deadline - time.monotonic()))
            name = self._names.get(method) or self._name(method)
            try:
                body = slot.pack([args, kwargs] if kwargs else args)
            except Exception as error:
                raise self._unpackable(slot, method, args, kwargs, error) from error
            left_ns = nanoseconds_until(deadline)
            flags = lib.SHMRPC_FLAG_KEYWORDS if kwargs else 0
            status = lib.shmrpc_call_with(
                slot.c, name, flags, beside, len(beside), body, len(body), left_ns
            )
            if status != _ENOTCONN:
                return self._finish(slot, method, status)
            self._drop(slot.link)

    def _unpackable(
        self,
        slot: Slot,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        error: Exception,
    ) -> Exception:
        slot.pack = self._codec.encoder()  # the old one may hold half a message
        slot.link.slots.append(slot)
        return explain_arguments(self._codec, method, args, kwargs, error)

    def _undecodable(self, slot: Slot, method: str, error: Exception) -> ProtocolError:
        slot.link.slots.append(slot)
        return ProtocolError(f"{slot.link.peer} sent a result of {method!r} that is none: {error}")

    def _finish(self, slot: Slot, method: str, status: int) -> Any:
        """Bring a call to its end whose C call returned anything but a plain result."""
        link = slot.link
        try:
            while status in (_EAGAIN, _EINTR, _EVENTS):
                if status == _EVENTS:
                    self._pump().dispatch(link)
                # Between two C calls Python runs the handlers of pending signals.
                status = lib.shmrpc_wait(slot.c)
        except BaseException:
            lib.shmrpc_abandon(slot.c)
            raise
        if status < 0 and status != _MESSAGE:
            raise self._failure(slot, method, status)
        body: memoryview | bytes
        if status >= 0:
            body = slot.view[:status]
        else:
            body = slot.body() if slot.message.body_bytes else b""
            if slot.message.status != 0:
                failure = self._remote_error(link, method, slot.message.status, bytes(body))
                link.slots.append(slot)
                raise failure
        try:
            result = self._decode(body)
        except (ValueError, TypeError) as error:
            raise self._undecodable(slot, method, error) from error
        link.slots.append(slot)
        return result

    def _remote_error(self, link: Link, method: str, status: int, body: bytes) -> Error:
        code = STATUS_NAMES[status] if status < len(STATUS_NAMES) else "UNKNOWN"
        if not body:
            return self._core_error(link, method, code)
        try:
            fields = MsgpackCodec().decode(body)
            error = RemoteError(
                str(fields["message"]),
                type=str(fields["type"]),
                code=code,
                remote_traceback=str(fields.get("traceback", "")),
                details=fields.get("details"),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return ProtocolError(f"{link.peer} sent an error for {method!r} that is not readable")
        if error.type == "shmrpc.MessageTooLarge":
            return MessageTooLarge(f"{link.peer}: {error.message}")
        return error

    def _core_error(self, link: Link, method: str, code: str) -> Error:
        """What an error without a body means: the server's core sent it, no handler did."""
        peer = link.peer
        if code == "UNIMPLEMENTED":
            return MethodNotFound(f"{peer} has no method {method!r}")
        if code == "RESOURCE_EXHAUSTED":
            return Overloaded(f"{peer} refused {method!r}: it has as many calls as it may take")
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{method!r} on {peer} expired before it was started")
        if code == "UNAVAILABLE":
            self._retire(link)
            return ConnectionLost(f"{peer} is stopping and did not start {method!r}", "not_started")
        return RemoteError(f"{peer} ended {method!r}", code=code)

    def _failure(self, slot: Slot, method: str, status: int) -> Exception:
        """The exception for a call that ended without a reply."""
        link = slot.link
        if status == _ETIMEDOUT:
            link.slots.append(slot)
            return DeadlineExceeded(f"{method!r} on {link.peer} took longer than its timeout")
        if status == _EMSGSIZE:
            link.slots.append(slot)
            return MessageTooLarge(
                f"the request of {method!r} is longer than {link.peer} accepts "
                f"(max_message_bytes={link.max_request_bytes})"
            )
        if status == _ENOMEM:
            link.slots.append(slot)
            return MemoryError(f"no memory to send the request of {method!r} to {link.peer}")
        if status in (_EPIPE, _EPROTO):
            self._drop(link)
            if self._closed:
                return Cancelled(f"{method!r} on {link.peer}: the client was closed meanwhile")
            return link.lost(status, slot.message.outcome, method)
        return Error(f"waiting for {method!r} on {link.peer} failed: {os.strerror(-status)}")

    def notify(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> None:
        """Call a method without waiting for it, or for a result or an error of it.

        Returns once the message has left this process: with a server that does not keep up it
        waits for room, at most ``timeout`` seconds. Raises as ``call``, but nothing remote.
        """
        self._pump().notify(method, args, kwargs, timeout, metadata)

    def submit(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> CallFuture:
        """Start a call and return a ``concurrent.futures.Future`` of its result.

        ``timeout`` in seconds bounds the call; ``cancel`` on the future cancels it also after it
        was sent. Raises at once what ``call`` would before sending; all else is in the future.
        """
        return self._pump().submit(method, args, kwargs, timeout, metadata)

    def _pump(self) -> Futures:
        if self._futures is None:
            with self._lock:
                if self._futures is None:
                    self._futures = Futures(self)
        return self._futures

    # ---- views ----

    @overload
    def proxy(self, interface: Callable[..., T], *, prefix: str = "") -> T: ...
    @overload
    def proxy(self, interface: None = None, *, prefix: str = "") -> Proxy: ...
    def proxy(self, interface: Any = None, *, prefix: str = "") -> Any:
        """Return an object whose methods are calls: ``client.proxy(Calculator).add(1, 2)``.

        With a class or Protocol, it has that class's public methods and type-checks as it; without,
        any attribute is a method. ``prefix`` is put before each name.
        """
        return make_proxy(self.call, interface, prefix)

    def ping(self, timeout: float | None = None) -> float:
        """Ask the server's core for an answer and return the seconds that took.

        Works also while all its handlers are busy. Raises as ``call``.
        """
        return self._pump().ping(self._timeout if timeout is None else timeout)

    def stats(self) -> dict[str, int]:
        """Counters of the current connection: spins, sleeps, wake-ups, frames, late replies."""
        link = self._current_link(time.monotonic() + self._timeout)
        counters = ffi.new("shmrpc_stats *")
        lib.shmrpc_poller_stats(link.poller, counters)
        shown = (
            "spins_hit",
            "spins_missed",
            "yields",
            "sleeps",
            "wakeups_sent",
            "frames_received",
            "frames_dropped",
            "late_replies",
            "outbox_bytes",
        )
        stats = {name: int(getattr(counters, name)) for name in shown}
        stats["reconnects"] = self._reconnects
        return stats

    # ---- the end ----

    def close(self) -> None:
        """Hang up. Calls under way in other threads end with an error. Safe to repeat."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            link, self._link = self._link, None
            self._slots = []
            links = [link] if link is not None else []
            links += self._retired
        for link in links:
            link.shutdown()
        if self._futures is not None:
            self._futures.close()

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
