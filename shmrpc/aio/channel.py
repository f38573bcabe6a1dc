"""Calling under asyncio: what a client and a handler that calls its caller back have in common."""

from __future__ import annotations

import asyncio
import errno
import time
from abc import ABC, abstractmethod
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, overload

from shmrpc import loans
from shmrpc._native import ffi, lib
from shmrpc.codec import PACKING_ERRORS, Codec, MsgpackCodec, explain_arguments, pack_split
from shmrpc.context import inherited_deadline, task_source
from shmrpc.errors import Cancelled, ConnectionLost, DeadlineExceeded, Error, ProtocolError
from shmrpc.metadata import Metadata, pack_metadata
from shmrpc.outcomes import remote_error, send_error
from shmrpc.poller import FOREVER, Connection, Slot, check_timeout
from shmrpc.proxy import Proxy, make_proxy
from shmrpc.registry import make_name
from shmrpc.session import NOT_SENT
from shmrpc.values import LARGE, NOT_PLAIN, may_hold_large

from .calls import Call
from .lending import attach, meet_all
from .loop import LoopPoller, check_loop
from .pending import NO_VALUE, Pending, Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmrpc.buffers import Source
    from shmrpc.session import Body

__all__ = ["STREAM", "STREAM_ENDED", "Channel"]

T = TypeVar("T")

_NAMES_MAX = 4096
STREAM = lib.SHMRPC_FLAG_STREAM
STREAM_ENDED = lib.SHMRPC_FLAG_STREAM | lib.SHMRPC_FLAG_ENDED
_REQUEST = lib.SHMRPC_REQUEST
_send = lib.shmrpc_send
_send_request = lib.shmrpc_send_request

_EPIPE, _EPROTO, _ENOTCONN = -errno.EPIPE, -errno.EPROTO, -errno.ENOTCONN


class Registered(Protocol):
    """A pending or open call, as far as sending its request is concerned."""

    position: Sequence[int] | None  # one number: see the core's shmrpc_outcome_of

    @property
    def call_id(self) -> int: ...
    def register(self) -> None: ...
    def unregister(self) -> None: ...


class Channel(ABC):
    """Calls over a connection, from the tasks of one event loop."""

    def __init__(self, codec: Codec, timeout: float) -> None:
        """``timeout`` in seconds is for connecting, and for ``ping`` by default."""
        self._timeout = timeout
        self._codec = codec
        self._plain = type(codec) is MsgpackCodec
        self._names: dict[str, Any] = {}
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._link: Connection | None = None
        self._closed = False

    # ---- what differs ----

    @abstractmethod
    async def _connect(self, deadline: float, /) -> Connection:
        """The live connection, made now if there is none."""

    @abstractmethod
    def _drop(self, connection: Connection, /) -> None:
        """Stop using a connection that was lost."""

    @abstractmethod
    def _retire(self, connection: Connection, /) -> None:
        """Make no more calls on a connection whose peer takes none."""

    # ---- sending ----

    def _name(self, method: Any) -> Any:
        if not isinstance(method, str):
            msg = f"the method's name must be a str, not {type(method).__name__}"
            raise TypeError(msg) from None
        name = make_name(method)
        if len(self._names) >= _NAMES_MAX:
            self._names.clear()
        self._names[method] = name
        return name

    def _new_slot(self, connection: Connection) -> Slot | None:
        """A slot to send from; None if the connection has just ended, and is dropped now."""
        try:
            return connection.slot()
        except ConnectionLost:
            self._drop(connection)
            return None

    def _send_request(
        self,
        slot: Slot,
        pending: Registered,
        kind: int,
        flags: int,
        name: Any,
        beside: bytes,
        body: bytes,
        deadline: float,
    ) -> int:
        """Send it: 0, 1 if it waits for room, or -errno (and it is not registered any more)."""
        position = ffi.new("uint64_t *", NOT_SENT[0])
        pending.position = position
        deadline_ns = 0
        if kind == _REQUEST and deadline != FOREVER:
            deadline_ns = int(min(deadline, 9e9) * 1e9)
        pending.register()
        status: int = _send(
            slot.c,
            kind,
            flags,
            pending.call_id,
            name,
            0,
            beside,
            len(beside),
            body,
            len(body),
            deadline_ns,
            position,
        )
        if status < 0:
            pending.unregister()
        return status

    def _pack(
        self, slot: Slot, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bytes, Sequence[Source]]:
        try:
            values = [args, kwargs] if kwargs else args
            return pack_split(self._codec, slot.pack_beside, values, slot.pack_lifted)
        except PACKING_ERRORS as error:  # the slot's packers may hold half a message: let it go
            raise explain_arguments(self._codec, method, args, kwargs, error) from error

    def _deadline(self, timeout: float | None) -> float:
        inherited = inherited_deadline()
        if timeout is None:
            return FOREVER if inherited is None else inherited
        own = time.monotonic() + check_timeout(timeout)
        return own if inherited is None else min(own, inherited)

    def _sent_error(self, connection: Connection, method: str, status: int) -> Exception:
        if status in (_EPIPE, _EPROTO):
            self._drop(connection)
            return connection.lost(-status, lib.SHMRPC_NOT_SENT, method)
        return send_error(connection, method, status)

    def _remote_error(self, connection: Connection, method: str, status: int, body: Body) -> Error:
        error = remote_error(connection, method, status, body)
        if connection.refuses:
            self._retire(connection)
        return error

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
        """Call a method and return its result; as ``shmrpc.Client.call``.

        Cancelling the task cancels the call. May return without the loop having run in between.
        """
        connection = self._link
        if connection is None or kwargs or timeout is not None or metadata is not None:
            return await self._call_with(method, args, kwargs, timeout, metadata)
        if task_source(None) is not None and inherited_deadline() is not None:
            return await self._call_with(method, args, kwargs, timeout, metadata)
        poller: LoopPoller = connection.poller  # type: ignore[assignment]
        if get_ident() != self._thread or not (poller.in_turn or self._loop.is_running()):
            check_loop(self._loop, repr(self))
        # From here on it is _call_with for a call that has nothing but arguments.
        try:
            name = self._names[method]
        except (KeyError, TypeError):
            name = self._name(method)
        slots = connection.slots
        if not slots:
            slot = self._new_slot(connection)
            if slot is None:
                return await self._call_with(method, args, kwargs, timeout, metadata)
            slots.append(slot)
        slot = slots[-1]  # it stays there: nobody else runs before the request is sent
        try:
            body = slot.pack(args)
            size = len(body)
            large = size >= LARGE and self._plain and may_hold_large(body)
        except NOT_PLAIN:
            body, size, large = b"", 0, True
        except PACKING_ERRORS:
            slots.pop()
            del slots  # as below
            try:
                body, _ = self._pack(slot, method, args, kwargs)  # says why
            except BaseException:
                slot.let_go()
                raise
            slots = connection.slots
            slots.append(slot)
            large, size = False, len(body)
        if large:
            del slot, slots
            return await self._call_with(method, args, kwargs, timeout, metadata)
        session = connection.session
        pending = Pending()  # as Pending.of
        pending.connection = connection
        pending._loop = self._loop
        pending.call_id = call_id = session.next_id()
        if connection.retired or not connection.watched:
            pending.register()
        else:
            session.calls[call_id] = pending
        position = _send_request(slot.c, call_id, name, body, size)
        del slot, slots  # the frames of an exception that somebody keeps would keep the connection
        if position < 0:
            pending.unregister()
            if position != _ENOTCONN:
                raise self._sent_error(connection, method, position)
            self._drop(connection)
            return await self._call_with(method, args, kwargs, timeout, metadata)
        pending.sent_at = position >> 2
        if not poller.scheduled:
            poller.schedule()
        try:
            await pending
        except BaseException:
            self._cancel(pending)
            raise
        value = pending.value
        return self._result(pending, method) if value is NO_VALUE else value

    def _result(self, pending: Pending, method: str) -> Any:
        error = pending.error
        if not error and not pending.status:
            if pending.value is not NO_VALUE:
                return pending.value
            try:
                return pending.connection.decode(pending.body or b"")
            except (ValueError, TypeError) as reason:
                error = reason
        if not isinstance(error, Exception):
            raise self._reply_error(pending, method)
        msg = f"{pending.connection.peer} sent a result of {method!r} that is none: {error}"
        raise ProtocolError(msg) from error

    async def _call_with(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
        reply_metadata: list[bytes] | None = None,
    ) -> Any:
        check_loop(self._loop, repr(self))
        beside = b"" if metadata is None else pack_metadata(metadata)
        deadline = self._deadline(timeout)
        try:
            name = self._names[method]
        except (KeyError, TypeError):
            name = self._name(method)
        while True:
            connection = self._link
            if connection is None:
                connection = await self._connect(deadline)
            slot = self._new_slot(connection)
            if slot is None:
                continue
            alive: Any = None  # until it was sent
            try:
                body, sources = self._pack(slot, method, args, kwargs)
                if sources:
                    what = f"the request of {method!r}"
                    alive = await attach(connection, slot.c, sources, deadline, what)
                    if self._link is not connection:  # it was closed or lost meanwhile
                        lib.shmrpc_detach(slot.c)
                        connection.slots.append(slot)
                        continue
                pending = Pending.of(connection, self._loop)
                flags = lib.SHMRPC_FLAG_KEYWORDS if kwargs else 0
                status = self._send_request(
                    slot, pending, _REQUEST, flags, name, beside, body, deadline
                )
            except BaseException:
                slot.let_go()
                raise
            connection.slots.append(slot)
            del slot
            del alive
            if status >= 0:
                break
            if status != _ENOTCONN:
                raise self._sent_error(connection, method, status)
            self._drop(connection)
        connection.poller.schedule()  # type: ignore[attr-defined]
        await self._wait_reply(pending, method, deadline)
        if reply_metadata is not None:
            reply_metadata.append(pending.metadata)
        return self._result(pending, method)

    async def _wait_reply(self, pending: Pending, method: str, deadline: float) -> None:
        timer = None
        if deadline != FOREVER:
            left = max(0.0, deadline - time.monotonic())
            timer = self._loop.call_later(left, pending.wake)
        try:
            await pending
        except BaseException:
            self._cancel(pending)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if pending.status < 0:
            self._cancel(pending)
            peer = pending.connection.peer
            msg = f"{method!r} on {peer} took longer than its timeout"
            raise DeadlineExceeded(msg)

    def _cancel(self, pending: Pending) -> None:
        if pending.status < 0:
            pending.unregister()
            pending.connection.send_now(lib.SHMRPC_CANCEL, pending.call_id)

    def _reply_error(self, pending: Pending, method: str) -> Exception:
        connection = pending.connection
        error = pending.error
        if not isinstance(error, int) or not error:
            return self._remote_error(connection, method, pending.status, pending.body or b"")
        self._drop(connection)
        if self._closed:
            return Cancelled(f"{method!r} on {connection.peer}: the client was closed meanwhile")
        return connection.lost(error, pending.status, method)

    async def notify(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> None:
        """Call a method without waiting for it; as ``shmrpc.Client.notify``."""
        kind = lib.SHMRPC_NOTIFY
        await self._send(
            kind, 0, method, args, kwargs, self._deadline(timeout), metadata, _NoPending
        )

    async def _send(
        self,
        kind: int,
        flags: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float,
        metadata: Metadata | None,
        make: Callable[[Connection], Any],
    ) -> Any:
        """Send something, and wait while there is no room for it."""
        check_loop(self._loop, repr(self))
        beside = b"" if metadata is None else pack_metadata(metadata)
        name = ffi.NULL
        if kind != lib.SHMRPC_PING:
            name = self._names.get(method) or self._name(method)
        if kwargs:
            flags |= lib.SHMRPC_FLAG_KEYWORDS
        while True:
            connection = self._link or await self._connect(deadline)
            slot = self._new_slot(connection)
            if slot is None:
                continue
            alive: Any = None  # until it was sent
            body = b""
            try:
                if kind != lib.SHMRPC_PING:
                    body, sources = self._pack(slot, method, args, kwargs)
                    if sources:
                        what = f"the request of {method!r}"
                        alive = await attach(connection, slot.c, sources, deadline, what)
                        if self._link is not connection:  # it was closed or lost meanwhile
                            lib.shmrpc_detach(slot.c)
                            continue
                pending = make(connection)
                status = self._send_request(
                    slot, pending, kind, flags, name, beside, body, deadline
                )
            except BaseException:
                slot.let_go()
                raise
            connection.slots.append(slot)
            del alive
            if status >= 0:
                break
            if status != _ENOTCONN:
                del slot
                raise self._sent_error(connection, method, status)
            self._drop(connection)
        poller: LoopPoller = connection.poller  # type: ignore[assignment]
        poller.schedule()
        if status > 0 and not await poller.room(connection, slot, deadline):
            if kind == _REQUEST:
                pending.unregister()
                connection.send_now(lib.SHMRPC_CANCEL, pending.call_id)
            del slot
            raise send_error(connection, method, -errno.ETIMEDOUT)
        return pending

    async def ping(self, timeout: float | None = None) -> float:
        """Ask the peer's core for an answer and return the seconds that took."""
        deadline = self._deadline(self._timeout if timeout is None else timeout)
        start = time.perf_counter()

        def make(connection: Connection) -> Probe:
            return Probe.of(connection, self._loop)

        pending = await self._send(lib.SHMRPC_PING, 0, "ping", (), {}, deadline, None, make)
        await self._wait_reply(pending, "ping", deadline)
        if pending.status or pending.error:
            raise self._reply_error(pending, "ping")
        return time.perf_counter() - start

    def stream(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """Call a method that streams its results: ``async for item in client.stream(...)``.

        The call begins when it is awaited first. Else as ``shmrpc.Client.stream``.
        """
        return self._open(STREAM_ENDED, method, args, kwargs, timeout, metadata)

    def open(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """Open a call of any kind: ``async with client.open(...) as call``.

        The call begins when it is awaited first. Else as ``shmrpc.Client.open``.
        """
        return self._open(STREAM, method, args, kwargs, timeout, metadata)

    def _open(
        self,
        flags: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> Call:
        deadline = self._deadline(timeout)

        async def begin(call: Call) -> Call:
            return await self._begin_call(call, flags, method, args, kwargs, deadline, metadata)

        return Call(self, method, begin, streams=flags == STREAM_ENDED)

    async def _begin_call(
        self,
        call: Call,
        flags: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float,
        metadata: Metadata | None,
    ) -> Call:
        def attach(connection: Connection) -> Call:
            return call.attach(connection, deadline)

        await self._send(_REQUEST, flags, method, args, kwargs, deadline, metadata, attach)
        return call

    # ---- memory that is sent without a copy ----

    async def empty(
        self, shape: Any, dtype: Any = "float64", *, timeout: float | None = None
    ) -> Any:
        """Return a numpy array in memory shared with the peer; as ``shmrpc.Client.empty``."""
        check_loop(self._loop, repr(self))
        deadline = self._deadline(timeout)
        connection = self._link or await self._connect(deadline)
        return await meet_all(connection, loans.making(connection, shape, dtype, deadline))

    async def loan(self, nbytes: int, *, timeout: float | None = None) -> memoryview:
        """Return a writable memoryview of such memory; as ``shmrpc.Client.loan``."""
        check_loop(self._loop, repr(self))
        deadline = self._deadline(timeout)
        nbytes = loans.check_size(nbytes)
        connection = self._link or await self._connect(deadline)
        return await meet_all(connection, loans.borrowing(connection, nbytes, deadline))

    def __reduce__(self) -> NoReturn:
        msg = f"{self!r} can't be copied or pickled; connect anew where it is needed"
        raise TypeError(msg)

    # ---- views ----

    @overload
    def proxy(self, interface: Callable[..., T], *, prefix: str = "") -> T: ...
    @overload
    def proxy(self, interface: None = None, *, prefix: str = "") -> Proxy: ...
    def proxy(self, interface: Any = None, *, prefix: str = "") -> Any:
        """Return an object whose methods are awaitable calls; as ``shmrpc.Client.proxy``."""
        return make_proxy(self.call, interface, prefix)


class _NoPending:
    """A notification: nothing comes back for it."""

    call_id = 0
    position: Sequence[int] = NOT_SENT

    def __init__(self, connection: Connection) -> None:
        """Needs no connection."""

    def register(self) -> None:
        """Nothing to take."""

    def unregister(self) -> None:
        """Nothing to forget."""
