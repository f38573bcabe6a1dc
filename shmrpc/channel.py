"""Calling: what a client and a handler that calls its caller back have in common.

``call`` packs its arguments, makes one C call that sends the request and waits for the reply, and
unpacks the result; everything else here is what to do when that is not the whole story.
"""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, overload

import msgpack

from . import loans
from ._native import ffi, lib
from .calls import Call
from .codec import PACKING_ERRORS, Codec, MsgpackCodec, explain_arguments, pack_lifted, pack_split
from .errors import Cancelled, ConnectionLost, Error, ProtocolError
from .futures import CallFuture
from .lending import attach
from .metadata import Metadata, pack_metadata
from .outcomes import remote_error, send_error
from .poller import FOREVER, Connection, Slot, check_timeout, nanoseconds_until
from .proxy import Proxy, make_proxy
from .registry import make_name
from .session import NOT_SENT, Body
from .values import LARGE as _LARGE
from .values import NOT_PLAIN, may_hold_large, unpack_extension

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Channel"]

T = TypeVar("T")
P = TypeVar("P", bound="Registered")

_NAMES_MAX = 4096
_STREAM = lib.SHMRPC_FLAG_STREAM
_STREAM_ENDED = lib.SHMRPC_FLAG_STREAM | lib.SHMRPC_FLAG_ENDED

_REQUEST = lib.SHMRPC_REQUEST

_call = lib.shmrpc_call
_send_request = lib.shmrpc_send_request
_inherited_deadline = lib.shmrpc_inherited_deadline
_unpackb = msgpack.unpackb
_MESSAGE = lib.SHMRPC_MESSAGE
_BLOCKS = lib.SHMRPC_FLAG_BLOCKS
_EINTR, _EAGAIN, _ETIMEDOUT = -errno.EINTR, -errno.EAGAIN, -errno.ETIMEDOUT
_EPIPE, _EPROTO, _ENOTCONN = -errno.EPIPE, -errno.EPROTO, -errno.ENOTCONN
_LARGE_BODY: bytes = msgpack.packb(bytes(_LARGE))  # like that of arguments which are large
_GOES_ON = frozenset((_EAGAIN, _EINTR, lib.SHMRPC_EVENTS, lib.SHMRPC_SPAWN, lib.SHMRPC_QUEUED))


def _inherit(deadline: float) -> float:
    """Not later than that of the call which this thread serves."""
    inherited_ns = _inherited_deadline()
    return min(deadline, inherited_ns / 1e9) if inherited_ns else deadline


class Registered(Protocol):
    """A future or an open call, as far as sending its request is concerned."""

    position: Sequence[int]  # one number: see the core's shmrpc_outcome_of

    @property
    def call_id(self) -> int: ...
    def register(self) -> None: ...
    def unregister(self) -> None: ...


class Channel(ABC):
    """Calls over a connection. All methods may be used by any number of threads at once."""

    def __init__(self, codec: Codec, timeout: float) -> None:
        """``timeout`` in seconds is for connecting, and for ``ping`` by default."""
        self._timeout = timeout
        self._codec = codec
        self._decode = codec.decode
        self._plain = type(codec) is MsgpackCodec
        self._names: dict[str, Any] = {}
        # The pool of the connection's free slots. Empty when there is none, so that the path of
        # every call needs to look at nothing else.
        self._slots: list[Slot] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether its owner has hung up."""
        return self._closed

    # ---- what differs ----

    @abstractmethod
    def _connection(self, deadline: float, /) -> Connection:
        """The live connection, made now if there is none."""

    @abstractmethod
    def _drop(self, connection: Connection, /) -> None:
        """Stop using a connection that was lost."""

    @abstractmethod
    def _retire(self, connection: Connection) -> None:
        """Make no more calls on a connection whose peer takes none."""

    # ---- slots and names ----

    def _slot(self, deadline: float = FOREVER) -> Slot:
        """A free slot of a live connection."""
        try:
            return self._slots.pop()
        except IndexError:
            pass  # nothing is done here, as in call()
        return self._new_slot(deadline)

    def _new_slot(self, deadline: float) -> Slot:
        while True:
            # Connecting is part of the call that a handler makes.
            connection = self._connection(_inherit(deadline))
            try:
                return Slot(connection)
            except ConnectionLost:  # it has ended, and nobody has called since
                self._drop(connection)

    def _name(self, method: Any) -> Any:
        if not isinstance(method, str):
            msg = f"the method's name must be a str, not {type(method).__name__}"
            raise TypeError(msg) from None
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

        ``timeout`` in seconds bounds the whole call; None waits as long as the server lives. In a
        handler, the deadline of the call that it serves bounds it as well.
        ``metadata`` (str to str or bytes, up to 8 KiB) is what the handler finds in
        ``current_call().metadata``. Other keywords go to the method.
        Arguments are copied; the result is a new object. Raises ``DeadlineExceeded``,
        ``RemoteError``, ``MethodNotFound``, ``Overloaded``, ``MessageTooLarge``,
        ``ConnectionLost``, ``ConnectError``, and TypeError or ValueError for arguments that can't
        be sent. Interrupting it (Ctrl-C) cancels the call.
        """
        if kwargs or timeout is not None or metadata is not None:
            return self._call_with(method, args, kwargs, timeout, metadata)
        while True:  # once
            try:
                slot = self._slots.pop()
                break
            except IndexError:
                pass  # what is raised in such a block shows to the user what it has caught
            slot = self._new_slot(FOREVER)
            break
        try:
            name = self._names[method]
        except (KeyError, TypeError):
            name = self._name(method)
        try:
            body = slot.pack_beside(args)
        except NOT_PLAIN:  # it holds what can't go into blocks at once
            body = _LARGE_BODY
        except PACKING_ERRORS as error:
            raise self._unpackable(slot, method, args, kwargs, error) from error
        size = len(body)
        if size >= _LARGE and self._plain and may_hold_large(body):
            return self._call_beside(slot, method, args)
        try:
            count = _call(slot.c, name, body, size, -1)
            if count < 0:
                count = self._wait_on(slot, count)
        except BaseException:  # a signal's handler has raised, and somebody may keep our frame
            lib.shmrpc_abandon(slot.c)
            raise
        if count < 0:
            if count == _ENOTCONN:
                self._drop(slot.connection)
                return self.call(method, *args)
            return self._finish(slot, method, count)
        try:
            if self._plain:  # MsgpackCodec.decode written out: 0.1 us less
                result = _unpackb(
                    slot.view[:count], strict_map_key=False, ext_hook=unpack_extension
                )
            else:
                result = self._decode(slot.view[:count])
        except (ValueError, TypeError) as error:
            raise self._undecodable(slot, method, error) from error
        slot.connection.slots.append(slot)
        return result

    def _call_beside(self, slot: Slot, method: str, args: tuple[Any, ...]) -> Any:
        lib.shmrpc_detach(slot.c)
        slot.connection.slots.append(slot)
        return self._call_with(method, args, {}, None, None, large=True)

    def _call_with(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
        reply_metadata: list[bytes] | None = None,
        *,
        large: bool = False,
    ) -> Any:
        """Call with more than arguments; the timeout includes connecting again.

        ``large``: it is known that the arguments have buffers.
        """
        beside = b"" if metadata is None else pack_metadata(metadata)
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        while True:
            slot = self._slot(deadline)
            name = self._names.get(method) or self._name(method)
            body, alive = self._pack(slot, method, args, kwargs, deadline, large=large)
            left_ns = nanoseconds_until(deadline)
            flags = lib.SHMRPC_FLAG_KEYWORDS if kwargs else 0
            try:
                status = lib.shmrpc_call_with(
                    slot.c, name, flags, beside, len(beside), body, len(body), left_ns
                )
                status = self._wait_on(slot, status)
            except BaseException:
                lib.shmrpc_abandon(slot.c)
                raise
            del alive
            if status != _ENOTCONN:
                return self._finish(slot, method, status, reply_metadata)
            self._drop(slot.connection)

    def _pack(
        self,
        slot: Slot,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float,
        *,
        large: bool = False,
    ) -> tuple[bytes, Any]:
        """The body of a request, and what has to live until it was sent with this slot."""
        values = [args, kwargs] if kwargs else args
        try:
            if large:
                body, sources = pack_lifted(slot.pack_lifted, values)
            else:
                body, sources = pack_split(self._codec, slot.pack_beside, values, slot.pack_lifted)
        except PACKING_ERRORS as error:
            raise self._unpackable(slot, method, args, kwargs, error) from error
        if not sources:
            return body, None
        connection = slot.connection
        try:
            what = f"the request of {method!r}"
            alive = attach(connection, slot.c, sources, _inherit(deadline), what)
        except BaseException:
            slot.give_back()
            raise
        return body, alive

    def _unpackable(
        self,
        slot: Slot,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        error: Exception,
    ) -> Exception:
        slot.let_go()  # its packers may hold half a message
        return explain_arguments(self._codec, method, args, kwargs, error)

    def _undecodable(self, slot: Slot, method: str, error: Exception) -> ProtocolError:
        connection = slot.connection
        slot.give_back()
        return ProtocolError(f"{connection.peer} sent a result of {method!r} that is none: {error}")

    def _wait_on(self, slot: Slot, status: int) -> int:
        """Wait as long as a C call wants to go on; what it ends with."""
        while status in _GOES_ON:
            slot.connection.poller.attend(status)
            # Between two C calls Python runs the handlers of pending signals.
            status = lib.shmrpc_wait(slot.c)
        return status

    def _finish(
        self, slot: Slot, method: str, status: int, reply_metadata: list[bytes] | None = None
    ) -> Any:
        """Bring a call to its end whose C call returned anything but a plain result."""
        connection = slot.connection
        if status < 0 and status != _MESSAGE:
            raise self._failure(slot, method, status)
        message = slot.message
        if status < 0:
            if reply_metadata is not None:
                reply_metadata.append(slot.metadata())
            if message.status != 0:
                body = bytes(slot.body())
                failure = self._remote_error(connection, method, message.status, body)
                slot.give_back()
                raise failure
        try:
            if status >= 0:
                result = self._decode(slot.view[:status])
            elif message.flags & _BLOCKS:
                result = connection.value(slot.c, message)
            else:
                result = self._decode(slot.body())
        except (ValueError, TypeError) as error:
            raise self._undecodable(slot, method, error) from error
        connection.slots.append(slot)
        return result

    # ---- errors ----

    def _remote_error(self, connection: Connection, method: str, status: int, body: Body) -> Error:
        error = remote_error(connection, method, status, body)
        if connection.refuses:
            self._retire(connection)
        return error

    def _failure(self, slot: Slot, method: str, status: int) -> Exception:
        """The exception for a call that ended without a reply."""
        connection = slot.connection
        if status in (_EPIPE, _EPROTO, lib.SHMRPC_STOPPED):
            outcome = slot.message.outcome
            slot.let_go()
            self._drop(connection)
            if self._closed:
                peer = connection.peer
                return Cancelled(f"{method!r} on {peer}: the client was closed meanwhile")
            if status == lib.SHMRPC_STOPPED:
                return connection.lost(errno.EPIPE, lib.SHMRPC_UNKNOWN, method)
            return connection.lost(-status, outcome, method)
        slot.give_back()
        return send_error(connection, method, status)

    # ---- calls that are not waited for at once ----

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
        self._send(lib.SHMRPC_NOTIFY, 0, method, args, kwargs, timeout, metadata, _NoPending)

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
        if kwargs or timeout is not None or metadata is not None:
            return self._submit_with(method, args, kwargs, timeout, metadata)
        # From here on it is _send for a call that has nothing but arguments.
        while True:  # once, as in call()
            try:
                slot = self._slots.pop()
                break
            except IndexError:
                pass
            slot = self._new_slot(FOREVER)
            break
        try:
            name = self._names[method]
        except (KeyError, TypeError):
            name = self._name(method)
        connection = slot.connection
        try:
            body = slot.pack(args)
            large = len(body) >= _LARGE and self._plain and may_hold_large(body)
        except (*NOT_PLAIN, *PACKING_ERRORS):
            slot.pack = self._codec.encoder()  # the old one may hold half a message
            body, large = b"", True
        if large:
            connection.slots.append(slot)
            return self._submit_with(method, args, kwargs, timeout, metadata)
        future = CallFuture(self, connection, method, FOREVER)
        status = 0
        try:
            call_id = future.call_id
            connection.register(call_id, future)
            position = _send_request(slot.c, call_id, name, body, len(body))
            if position >= 0:
                future.position = (position >> 2,)
                if connection.closed:
                    future.lost_while_sending(slot)
                if position & 3:
                    future.deadline = _inherit(FOREVER)
                    if position & 1:
                        status = self._wait_for_room(slot, _REQUEST, future.deadline)
            else:
                status = position
        except BaseException:  # Ctrl-C
            future.unregister()
            connection.send_now(lib.SHMRPC_CANCEL, future.call_id)
            raise
        if status != 0:
            self._give_up_sending(slot, _REQUEST, method, future, status)
            return self._submit_with(method, args, kwargs, timeout, metadata)
        connection.slots.append(slot)
        return future

    def _submit_with(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> CallFuture:
        def future(connection: Connection, deadline: float) -> CallFuture:
            return CallFuture(self, connection, method, deadline)

        return self._send(lib.SHMRPC_REQUEST, 0, method, args, kwargs, timeout, metadata, future)

    def ping(self, timeout: float | None = None) -> float:
        """Ask the peer's core for an answer and return the seconds that took.

        Works also while all its handlers are busy. Raises as ``call``.
        """

        def future(connection: Connection, deadline: float) -> CallFuture:
            return CallFuture(self, connection, "ping", deadline)

        timeout = self._timeout if timeout is None else timeout
        start = time.perf_counter()
        self._send(lib.SHMRPC_PING, 0, "ping", (), {}, timeout, None, future).result()
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
        """Call a method that streams its results; iterate over the ``Call`` to get them.

        ``timeout`` in seconds bounds the whole stream. Closing the call (``close``, a ``with``
        block, dropping it) cancels it, and the handler is told. Raises as ``call``, the handler's
        errors after the items that came before them.
        """
        return self._open(_STREAM_ENDED, method, args, kwargs, timeout, metadata)

    def open(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """Open a call of any kind: ``send`` messages, iterate over replies, ask for its result.

        ``timeout`` in seconds bounds the whole call. Use it as a context manager: leaving the
        block cancels the call unless it is over. Raises as ``call``.
        """
        return self._open(_STREAM, method, args, kwargs, timeout, metadata)

    def _open(
        self,
        flags: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> Call:
        def call(connection: Connection, deadline: float) -> Call:
            return Call(self, connection, method, deadline, streams=flags == _STREAM_ENDED)

        return self._send(lib.SHMRPC_REQUEST, flags, method, args, kwargs, timeout, metadata, call)

    def _send(
        self,
        kind: int,
        flags: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
        make: Callable[[Connection, float], P],
    ) -> P:
        """Send a request whose reply is Python's, over a new connection if the old one is gone."""
        beside = b"" if metadata is None else pack_metadata(metadata)
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        deadline = _inherit(deadline)
        while True:
            slot = self._slot(deadline)
            connection = slot.connection
            pending = make(connection, deadline)
            body, name, alive = b"", ffi.NULL, None
            if kind != lib.SHMRPC_PING:
                name = self._names.get(method) or self._name(method)
                body, alive = self._pack(slot, method, args, kwargs, deadline)
                if kwargs:
                    flags |= lib.SHMRPC_FLAG_KEYWORDS
            try:
                pending.register()
                status = self._send_once(slot, kind, flags, pending, name, beside, body, deadline)
            except BaseException:  # Ctrl-C while it waits for room
                pending.unregister()
                if kind == lib.SHMRPC_REQUEST:
                    connection.send_now(lib.SHMRPC_CANCEL, pending.call_id)
                raise
            del alive
            if status == 0:
                connection.slots.append(slot)
                return pending
            self._give_up_sending(slot, kind, method, pending, status)

    def _give_up_sending(
        self, slot: Slot, kind: int, method: str, pending: Registered, status: int
    ) -> None:
        """Raise what a request that was not sent, or not to the end, has come to.

        Only where the connection had ended before it returns, and another one has to be made.
        """
        connection = slot.connection
        pending.unregister()
        if status != _ENOTCONN:
            if status == _ETIMEDOUT and kind == lib.SHMRPC_REQUEST:
                connection.send_now(lib.SHMRPC_CANCEL, pending.call_id)  # a part may be out
            if status in (_EPIPE, _EPROTO):
                position = (pending.position or NOT_SENT)[0]
                slot.message.outcome = lib.shmrpc_outcome_of(slot.c, pending.call_id, position)
            raise self._failure(slot, method, status)
        self._drop(connection)

    def _send_once(
        self,
        slot: Slot,
        kind: int,
        flags: int,
        pending: Registered,
        name: Any,
        beside: bytes,
        body: bytes,
        deadline: float,
    ) -> int:
        # The core fills it in before the peer can see the request: another thread may need it
        # before this one runs on.
        position = ffi.new("uint64_t *", NOT_SENT[0])
        pending.position = position
        deadline_ns = 0
        if kind == lib.SHMRPC_REQUEST and deadline != FOREVER:
            deadline_ns = int(min(deadline, 9e9) * 1e9)
        status: int = lib.shmrpc_send(
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
        return self._wait_for_room(slot, kind, deadline) if status > 0 else status

    def _wait_for_room(self, slot: Slot, kind: int, deadline: float) -> int:
        """The ring is full: wait here until it has all of the message, and read meanwhile."""
        status = slot.connection.flush(slot, deadline)
        if status in (_EPIPE, _EPROTO) and kind != lib.SHMRPC_NOTIFY:
            return 0  # what became of it is told later: it may have run, its reply be here
        return status

    # ---- memory that is sent without a copy ----

    def empty(self, shape: Any, dtype: Any = "float64", *, timeout: float | None = None) -> Any:
        """Return a numpy array, with any contents, in memory shared with the peer.

        Sent over this connection it, or a contiguous part of it, is not copied; it becomes
        read-only then. It goes back when nothing refers to it. Over unix and tcp it is an ordinary
        array. Waits for room at most ``timeout`` seconds. Raises ``DeadlineExceeded`` or
        ``Overloaded`` if there is none, ``ConnectError``, TypeError, ValueError, MemoryError.
        """
        return loans.empty(*self._lender(timeout, shape, dtype))

    def loan(self, nbytes: int, *, timeout: float | None = None) -> memoryview:
        """Return a writable memoryview of such memory; else as ``empty``, but it stays writable."""
        return loans.borrow(*self._lender(timeout, nbytes))

    def _lender(self, timeout: float | None, *what: Any) -> Any:
        deadline = FOREVER if timeout is None else time.monotonic() + check_timeout(timeout)
        deadline = _inherit(deadline)
        slot = self._slot(deadline)
        slot.connection.slots.append(slot)
        return slot.connection, *what, deadline

    def __reduce__(self) -> NoReturn:
        msg = f"{self!r} can't be copied or pickled; connect anew where it is needed"
        raise TypeError(msg)

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


class _NoPending:
    """A notification: nothing comes back for it."""

    call_id = 0
    position: Sequence[int] = NOT_SENT

    def __init__(self, connection: Connection, deadline: float) -> None:
        """Needs neither."""

    def register(self) -> None:
        """Nothing to take."""

    def unregister(self) -> None:
        """Nothing to forget."""
