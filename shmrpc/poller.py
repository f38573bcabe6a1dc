"""Who waits: the core's poller with its connections, and how threads wait for something on it.

A ``Poller`` belongs to one client connection or to a whole server. There is no reader thread:
whoever waits reads for all, and hands what is not for the core to the sessions (``dispatch``).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import struct
import sys
import threading
import time
import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ._native import ffi, lib
from .attaching import slot_packers
from .codec import MsgpackCodec
from .errors import ConnectError, ConnectionLost, Error, ForkedError, ProtocolError
from .owned import free_with
from .parcels import Parcel, value_of
from .rendezvous import Credentials
from .session import Body, Pending, Run, Session, Stream
from .tending import tend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .address import Address
    from .codec import Codec
    from .handshake import Agreement

__all__ = [
    "FOREVER",
    "Connection",
    "Poller",
    "Running",
    "Slot",
    "Wait",
    "Waiters",
    "body_of",
    "check_timeout",
    "metadata_of",
    "nanoseconds_until",
]

_log = logging.getLogger("shmrpc.poller")

Wait = Literal["auto", "spin", "block"]
WAIT_MODES: dict[str, int] = {"auto": 0, "spin": 1, "block": 2}
OUTCOMES = ("unknown", "not_sent", "not_started")
FOREVER = float("inf")
_SECONDS_MAX = 9e9  # the core counts nanoseconds in 64 bits

_EPROTO, _ETIMEDOUT = errno.EPROTO, errno.ETIMEDOUT
_GO_ON = frozenset((-errno.EAGAIN, -errno.EINTR, 0))
BRIEF = struct.Struct("=QQQiHHII")  # shmrpc_brief
_FLUSHED = frozenset((0, -errno.EPIPE, -_EPROTO, -_ETIMEDOUT, lib.SHMRPC_STOPPED))


def check_timeout(timeout: Any) -> float:
    """Refuse a timeout that is no number of seconds from 0 on."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        msg = f"timeout must be seconds from 0 on, not {timeout!r}"
        raise ValueError(msg)
    return min(timeout, _SECONDS_MAX)  # an int may be beyond any float


def nanoseconds_until(deadline: float) -> int:
    """What is left until a ``time.monotonic()`` deadline; -1 if that is ``FOREVER``."""
    if deadline > _SECONDS_MAX:
        return -1
    return max(0, int((deadline - time.monotonic()) * 1e9))


class Running(NamedTuple):
    """A call under way at a server."""

    method: str
    since: float | None  # time.monotonic() seconds; None of one that has just begun, or not known
    peer_pid: int
    key: tuple[int, int]  # connection and call id


class Freed(Protocol):
    """What owns a C slot."""

    c: Any


class Slot:
    """What one thread uses for one call at a time: a C slot, its view and a packer."""

    _CONTENTS = (
        "c",
        "connection",
        "free",
        "message",
        "pack",
        "pack_beside",
        "pack_lifted",
        "thread",
        "view",
    )
    __slots__ = ("__weakref__", *_CONTENTS)

    def __init__(self, connection: Connection) -> None:
        slot = lib.shmrpc_slot_new(connection.poller.c, connection.conn_id)
        if slot == ffi.NULL:
            # It may have ended so recently that nobody has told us yet.
            status = lib.shmrpc_conn_status(connection.poller.c, connection.conn_id)
            if connection.closed or status != 0:
                raise connection.lost(errno.EPIPE, lib.SHMRPC_NOT_SENT, "a call")
            msg = "no memory for another waiting thread"
            raise ConnectError(msg)
        self.c = slot
        self.free = free_with(slot, lib.shmrpc_slot_free)
        self.connection = connection
        self.message = lib.shmrpc_slot_message(slot)
        size = lib.shmrpc_slot_view_bytes(slot)
        self.view = memoryview(ffi.buffer(lib.shmrpc_slot_view(slot), size))
        codec = connection.codec
        self.pack: Callable[[Any], bytes] = codec.encoder()
        # For a message that this slot sends next.
        self.pack_beside, self.pack_lifted = slot_packers(codec, self.c)
        self.thread = 0  # that waits with it for something on Python's side

    # Before a call raises: its frames refer to the slot, and who keeps the exception keeps them.

    def let_go(self) -> None:
        """Free it, whoever still refers to it."""
        self.view = memoryview(b"")
        self.message = None
        self.free()

    def give_back(self) -> None:
        """Put what it has into the pool, as another object."""
        other = Slot.__new__(Slot)
        for name in self._CONTENTS:
            setattr(other, name, getattr(self, name))
            delattr(self, name)
        other.connection.slots.append(other)

    def body(self) -> memoryview:
        """The body of the message just received, wherever it lies."""
        size = self.message.body_bytes
        return memoryview(ffi.buffer(self.message.body, size)) if size else memoryview(b"")

    def metadata(self) -> bytes:
        """A copy of the metadata of the message just received."""
        return metadata_of(self.message)


def metadata_of(message: Any) -> bytes:
    """A copy of a message's metadata."""
    size = message.metadata_bytes
    if not size:
        return b""
    return bytes(ffi.buffer(message.head + message.method_bytes, size))


class _NoSlots(list[Slot]):
    """The pool of a connection that takes no more calls."""

    def append(self, slot: Slot) -> None:
        """Let it go."""


class Connection:
    """One live connection to a peer."""

    def __init__(self, poller: Poller, agreement: Agreement, address: Address) -> None:
        self.poller = poller
        self.address = address
        self.codec = poller.codec
        self.plain = type(poller.codec) is MsgpackCodec
        self.credentials: Credentials = agreement.credentials
        if self.credentials.pid < 0:
            self.credentials = Credentials(agreement.peer_pid)
        self.peer_pid = agreement.peer_pid
        self.trusted = agreement.trusted
        # Whose values are checked to the last offset, in copies that only we can write to.
        self.untrusted_values = address.transport == "tcp" or not (
            agreement.trusted or self.credentials.uid in agreement.terms.trust_uids
        )
        self.max_request_bytes = agreement.peer_max_message_bytes
        self.max_memory_bytes = agreement.max_memory_bytes
        self.backing = agreement.terms.backing
        self.growing = threading.Lock()  # held while a segment is added to our arena
        # See tending: one of us has memory for values. Over sockets there is none.
        self.tended = address.transport != "shm"
        self.always_tended = False
        self.session = Session()
        self.slots: list[Slot] = []
        self.closed = False
        self.error = 0  # the errno that ended it
        self.retired = False
        self.refuses = False  # the peer takes no more calls: it is stopping
        self.caller: Any = None  # what handlers call their caller with, once one has asked
        self.owner: Any = None  # whose it is, where a poller has connections of several
        self.at_end: list[Callable[[], None]] = []  # to be called when it has ended
        self.reader: Any = None  # the thread that reads for futures, once one has to
        self._probe: Slot | None = None  # keeps the core's knowledge of a lost connection
        self.watched = False  # it has been taken
        self.control_fd = agreement.socket.fileno()  # the rendezvous socket: the core's from now on
        self.conn_id = agreement.add(poller.c)

    @property
    def peer(self) -> str:
        """The peer as errors name it."""
        return f"{self.address} (pid {self.peer_pid})" if self.peer_pid >= 0 else str(self.address)

    def slot(self) -> Slot:
        """A free slot; it goes back to ``slots``."""
        try:
            return self.slots.pop()
        except IndexError:
            pass  # what is raised here would show it
        if self.poller.forked:
            msg = f"this call to {self.peer} was made before the fork, by the parent"
            raise ForkedError(msg)
        return Slot(self)

    def decode(self, body: memoryview | Body) -> Any:
        """The value that a body is; ValueError or TypeError if it is none."""
        if type(body) is not Parcel:
            return self.codec.decode(body)  # type: ignore[arg-type]
        if not isinstance(self.codec, MsgpackCodec):
            raise self._buffers_refused()
        return body.decode()

    def value(self, slot: Any, message: Any) -> Any:
        """The value of the message in this C slot, which has buffers; ValueError if it is none.

        Of a peer whom we don't trust it is made of copies.
        """
        if not self.plain:
            raise self._buffers_refused()
        if not self.tended:
            tend(self)
        return value_of(slot, message, untrusted=self.untrusted_values)

    def _buffers_refused(self) -> ValueError:
        name = type(self.codec).__qualname__
        return ValueError(f"it has buffers, which are not for {name}")

    def register(self, call_id: int, pending: Pending | Stream) -> None:
        """A call of ours is about to be sent: take frames for it."""
        if not self.watched:
            self.watch()
        self.session.calls[call_id] = pending
        if self.retired and not self.closed:
            # Another thread hangs up just now, and may have forgotten us: our end has to be told,
            # and what became of this call. (Its thread has a slot: the core still knows.)
            self.poller.connections[self.conn_id] = self
            if self._probe is None:
                self._probe = Slot(self)
                if self.error:  # it has ended just now
                    self._probe = None

    def watch(self) -> None:
        """Keep what tells the outcome of calls after the connection's end."""
        self.poller.open_batch(is_event=True)
        self._probe = self.slot()
        self.watched = True

    def outcome(self, call_id: int, position: int) -> int:
        """What became of a registered call whose connection was lost."""
        if self._probe is None:
            return int(lib.SHMRPC_UNKNOWN)
        return int(lib.shmrpc_outcome_of(self._probe.c, call_id, position))

    def retire(self) -> None:
        """Take no more calls; those under way go on."""
        self.retired = True
        self.slots = _NoSlots()

    def forget_if_done(self) -> None:
        """A retired connection goes with its last call."""
        if self.retired and not self.session.calls and not self.poller.serving:
            self._probe = None
            self.poller.connections.pop(self.conn_id, None)
            self.wake_reader()
            self.poller.end()

    def shutdown(self) -> None:
        """Hang up. Threads that wait get ``ConnectionLost``.

        Descriptors and memory go at once unless somebody still waits.
        """
        self.retire()
        lib.shmrpc_conn_shutdown(self.poller.c, self.conn_id)
        self.forget_if_done()

    def end(self, error: int) -> list[Callable[[], None]]:
        """It has ended with this errno (the poller's lock is held)."""
        self.error = error
        self.closed = True
        slots = self.slots
        self.retire()
        slots.clear()  # a Caller that somebody keeps has this list, and must not keep descriptors
        self.caller = None
        calls = self.session.calls
        for call_id in list(calls):  # no items(): others register theirs meanwhile
            call = calls.get(call_id)
            if isinstance(call, Stream):
                call.outcome = self.outcome(call_id, call.position[0])
        later = self.session.lost(error)
        later += (self.wake_reader, *self.at_end)
        self.at_end = []
        self._probe = None
        return later

    def wake_reader(self) -> None:
        """Nothing comes any more that would. To be called when every future is finished."""
        if self.reader is not None:
            self.reader.wake()

    def lost(self, error: int, outcome: int, method: str) -> ConnectionLost | ProtocolError:
        """The error for a call that ended with this errno."""
        if error == _EPROTO:
            msg = f"{self.peer} broke the protocol during {method!r}; the connection is closed"
            return ProtocolError(msg)
        name = OUTCOMES[outcome]
        advice = {
            "not_sent": "it was not sent, calling again is safe",
            "not_started": "it was never started there, calling again is safe",
            "unknown": "it may have run",
        }[name]
        return ConnectionLost(f"lost {self.peer} during {method!r}: {advice}", name)

    # ---- sending what is no call ----

    def send(
        self,
        slot: Freed,
        kind: int,
        call_id: int,
        body: bytes = b"",
        *,
        flags: int = 0,
        metadata: bytes = b"",
    ) -> int:
        """Send one frame of a call that exists; -errno if that failed."""
        position = ffi.new("uint64_t *")
        size = len(body)
        beside = len(metadata)
        status: int = lib.shmrpc_send(
            slot.c, kind, flags, call_id, ffi.NULL, 0, metadata, beside, body, size, 0, position
        )
        return status

    def send_now(self, kind: int, call_id: int, body: bytes = b"", *, flags: int = 0) -> None:
        """The same from a slot of the pool, with nobody who would want to know if it failed."""
        if self.closed or self.poller.forked:
            return
        try:
            slot = self.slot()
        except Error:  # it has just ended
            return
        self.send(slot, kind, call_id, body, flags=flags)
        self.slots.append(slot)

    def say_serves(self) -> None:
        """Tell the peer that we take requests: who passes calls on needs to know."""
        self.send_now(lib.SHMRPC_SERVES, 0)

    def flush(self, slot: Slot, deadline: float) -> int:
        """Wait until what was sent has left this process, and read meanwhile; -errno otherwise."""
        status: int = lib.shmrpc_flush(slot.c, nanoseconds_until(deadline))
        while status not in _FLUSHED:
            self.poller.attend(status)
            status = lib.shmrpc_wait(slot.c)
        return status


class Waiters(list[Slot]):
    """The threads that wait for one thing; ``wake`` makes them look again."""

    def wake(self) -> None:
        """End their waits. Whoever reads for all is awake, and looks by itself."""
        this_thread = get_ident()
        for slot in list(self):
            if slot.thread != this_thread and not slot.connection.poller.forked:
                lib.shmrpc_poke(slot.c)


_pollers: weakref.WeakSet[Poller] = weakref.WeakSet()


class Poller:
    """The core's poller, its connections, and its worker threads if it serves."""

    # In a child that a thread forked, CPython 3.13.0 tells the main thread of the parent, which is
    # not there, of signals; other calls into it see that they have come.
    misses_signals = False

    def __init__(
        self,
        codec: Codec,
        *,
        server: bool = False,
        wait: Wait = "auto",
        spin_budget: float | None = None,
    ) -> None:
        """For a client's one connection, or a server's. ``ConnectError`` without descriptors."""
        budget_ns = int(spin_budget * 1e9) if spin_budget is not None else 0
        c = lib.shmrpc_poller_new(server, server, WAIT_MODES[wait], budget_ns)
        if c == ffi.NULL:
            msg = f"can't wait for connections: {os.strerror(ffi.errno)} (ulimit -n)"
            raise ConnectError(msg)
        self.c = c
        free_with(c, lib.shmrpc_poller_free)
        self.codec = codec
        self._server = server
        self.forked = False
        self.connections: dict[int, Connection] = {}
        self._dropped = 0  # frames, by connections that have ended
        self.threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._taker = lib.shmrpc_slot_new(self.c, 0)
        if self._taker == ffi.NULL:
            raise MemoryError
        free_with(self._taker, lib.shmrpc_slot_free)
        self._message = lib.shmrpc_slot_message(self._taker)
        self._unfinished: Any = None  # what has been made of the message that was taken last
        self._batch_briefs = self._batch = memoryview(b"")  # plain messages that come together
        self._run_worker: Callable[[Poller], None] | None = None
        self._serve_queued: Callable[[], None] | None = None
        self.ended: Callable[[], None] = _nothing  # called for each connection that has ended
        _pollers.add(self)

    def open_batch(self, *, is_event: bool) -> None:
        """Take plain messages together from now on, as an event or from ``shmrpc_poll``."""
        if self._batch:
            return
        briefs = lib.shmrpc_poller_batch(self.c, is_event)
        if briefs == ffi.NULL:
            raise MemoryError
        size = lib.SHMRPC_BATCH_BRIEFS * BRIEF.size
        self._batch_briefs = memoryview(ffi.buffer(briefs, size))
        bodies = lib.shmrpc_poller_batch_bytes(self.c)
        self._batch = memoryview(ffi.buffer(bodies, lib.SHMRPC_BATCH_BYTES))

    # ---- connections ----

    def add(self, agreement: Agreement, address: Address) -> Connection:
        """Take a new connection in."""
        # A request may come, or the connection end, before this thread runs on: both are looked
        # up under the lock.
        with self._lock:
            connection = Connection(self, agreement, address)
            self.connections[connection.conn_id] = connection
        return connection

    def connection(self, conn_id: int) -> Connection | None:
        """The connection with this id."""
        connection = self.connections.get(conn_id)
        if connection is None:
            with self._lock:
                connection = self.connections.get(conn_id)
        return connection

    def add_method(self, name: bytes, index: int, *, fast: bool) -> None:
        """Give requests for this name that number; the empty one is every other's."""
        if lib.shmrpc_method_add(self.c, name, len(name), index, fast) < 0:
            raise MemoryError

    # ---- events ----

    def dispatch(self) -> None:
        """Take what the core has for us, and tell those concerned."""
        later: list[Callable[[], None]] = []
        try:
            self._dispatch(later)
        except BaseException:
            self._interrupted(later)
            raise

    def _dispatch(self, later: list[Callable[[], None]]) -> None:
        message = self._message
        with self._lock:
            while True:
                if not message.kind:  # else it was taken, and not seen to the end
                    self._unfinished = None
                    if not lib.shmrpc_take(self._taker):
                        break
                self._take(later)
                message.kind = 0
        for run in later:
            run()

    def _interrupted(self, later: list[Callable[[], None]]) -> None:
        """A signal handler has raised, anywhere: what came is for other threads as well.

        Another thread repeats what may not be complete; there no signal handlers run.
        """
        threading.Thread(
            target=self._repeat, args=(later,), name="shmrpc-interrupted", daemon=True
        ).start()

    def _repeat(self, later: list[Callable[[], None]]) -> None:
        try:
            self._dispatch(later)
        except Exception:  # it was no signal handler
            self._message.kind = 0
            raise

    def _take(self, later: list[Callable[[], None]]) -> None:
        message = self._message
        kind, call_id = message.kind, message.call_id
        if kind == lib.SHMRPC_BRIEFS:
            self._take_replies(later)
            return
        connection = self.connections.get(message.conn_id)
        if connection is None:
            return
        session = connection.session
        if kind == lib.SHMRPC_ITEM:
            self._take_items(connection, call_id)
        elif kind == lib.SHMRPC_REPLY:
            body = self._body(connection)
            run = session.replied(call_id, message.status, metadata_of(message), body)
            if run is not None:
                later.append(run)
            connection.forget_if_done()
        elif kind == lib.SHMRPC_CREDIT:
            stream = session.stream_of(call_id, from_caller=self._from_caller())
            if stream is not None:
                self._take_credit(session, stream)
        elif kind in (lib.SHMRPC_REQUEST, lib.SHMRPC_NOTIFY):
            self._take_request(connection, message, later)
        elif kind == lib.SHMRPC_CANCEL:
            self._take_cancel(connection, call_id, later)
        elif kind == lib.SHMRPC_END:
            stream = session.stream_of(call_id, from_caller=True)
            if stream is not None and not stream.end():
                session.dropped += 1
        elif kind == lib.SHMRPC_INITIAL:
            stream = session.stream_of(call_id, from_caller=False)
            if stream is not None and not stream.begin(metadata_of(message)):
                session.dropped += 1
        elif kind == lib.SHMRPC_ROOM:
            self._take_room(connection)
        elif kind == lib.SHMRPC_CLOSED:
            later += connection.end(message.status)
            if _log.isEnabledFor(logging.DEBUG):
                later.append(functools.partial(_log.debug, "%s has gone", connection.peer))
            self._take_end(connection, later)
            self._dropped += session.dropped
            self.connections.pop(connection.conn_id, None)
            self.ended()
            self.end()

    def _take_replies(self, later: list[Callable[[], None]]) -> None:
        """Plain replies that came together: ``Session.replied`` written out for each.

        Can be repeated: those that were taken are dropped.
        """
        message, connections = self._message, self.connections
        bodies = bytes(self._batch[: message.body_bytes])
        briefs = BRIEF.iter_unpack(self._batch_briefs[: message.item_count * BRIEF.size])
        for conn_id, call_id, _, _, _, _, start, end in briefs:
            connection = connections.get(conn_id)
            if connection is None:
                continue
            calls = connection.session.calls
            pending = calls.get(call_id)
            if pending is None:
                connection.session.dropped += 1
                continue
            run = pending.replied(0, b"", bodies[start:end])
            if run is not None:
                later.append(run)
                continue
            calls.pop(call_id, None)
            if connection.retired:
                connection.forget_if_done()

    def _take_request(
        self, connection: Connection, message: Any, _later: list[Callable[[], None]]
    ) -> None:
        """A stream was admitted; a worker will run it."""
        ended = bool(message.flags & lib.SHMRPC_FLAG_ENDED)
        connection.session.opened(message.call_id, Stream(Waiters(), ended=ended))

    def _take_cancel(
        self, connection: Connection, call_id: int, _later: list[Callable[[], None]]
    ) -> None:
        """A stream was cancelled, or dropped before it started."""
        connection.session.cancelled(call_id)

    def _take_room(self, connection: Connection) -> None:
        """All that was sent has left this process."""

    def _take_end(self, connection: Connection, later: list[Callable[[], None]]) -> None:
        """A connection has ended."""

    def _from_caller(self) -> bool:
        return bool(self._message.flags & lib.SHMRPC_FLAG_CALLER)

    def _take_items(self, connection: Connection, call_id: int) -> None:
        session = connection.session
        count = self._message.item_count
        stream = session.stream_of(call_id, from_caller=self._from_caller(), frames=count)
        if stream is None:
            return
        run = self._unfinished
        if not isinstance(run, Run):
            data = self._body(connection)
            ends: Sequence[int] = (
                ffi.unpack(self._message.ends, count) if count > 1 else (len(data),)
            )
            run = self._unfinished = Run(data, ends)
        if not stream.items(run):
            session.dropped += count

    def _body(self, connection: Connection) -> bytes | Parcel:
        """The body of what was taken, with what is beside it. Can be repeated."""
        message = self._message
        body = body_of(message)
        if not message.flags & lib.SHMRPC_FLAG_BLOCKS:
            return body
        parcel: Parcel | None = self._unfinished
        if parcel is None:
            if not connection.tended:
                tend(connection)
            weight = lib.shmrpc_message_weight(message)
            parcel = self._unfinished = Parcel(body, weight, untrusted=connection.untrusted_values)
        parcel.fill(self._taker, message)
        return parcel

    def _take_credit(self, session: Session, stream: Stream) -> None:
        credit = self._unfinished
        if credit is None:
            credit = self._unfinished = stream.credited(body_of(self._message))
        if credit is None:
            session.dropped += 1
        else:
            stream.grant(credit)

    # ---- waiting ----

    def attend(self, status: int) -> None:
        """Do what has to be done before a wait that ended with this can go on."""
        if status == lib.SHMRPC_EVENTS:
            self.dispatch()
        elif status == lib.SHMRPC_QUEUED:
            if self._serve_queued is not None:
                self._serve_queued()
        elif status == lib.SHMRPC_SPAWN:
            self.spawn_worker()
        elif status not in _GO_ON:
            msg = f"waiting failed: {os.strerror(-status)}"
            raise Error(msg)
        elif self.misses_signals:
            signal.pthread_sigmask(signal.SIG_BLOCK, ())  # runs the handlers of what has come

    def wait(self, slot: Slot, deadline: float, /) -> bool:
        """Wait until something happens; False when the time has passed or the poller stops."""
        status: int = lib.shmrpc_wait_events(slot.c, nanoseconds_until(deadline))
        if status in (-_ETIMEDOUT, lib.SHMRPC_STOPPED):
            return False
        self.attend(status)
        return True

    def wait_until(
        self,
        connection: Connection,
        waiters: Waiters,
        ready: Callable[[], bool],
        deadline: float,
    ) -> bool:
        """Wait until ``ready()``; False when the time has passed or the poller stops."""
        try:
            slot = connection.slot()
        except ConnectionLost:  # everybody has been told what there was to tell
            return ready()
        slot.thread = get_ident()
        waiters.append(slot)
        goes_on = True
        try:
            while goes_on and not ready():
                goes_on = self.wait(slot, deadline)
        finally:
            waiters.remove(slot)
        connection.slots.append(slot)
        return goes_on or ready()

    def look(self, connection: Connection, /) -> None:
        """Read what has come, if it may be that nobody else does: see ``tending``."""
        if self._server or self.serving:
            return  # there are threads for that
        slot = connection.slot()
        self.wait(slot, 0)
        connection.slots.append(slot)

    # ---- serving ----

    def serve(
        self,
        run_worker: Callable[[Poller], None],
        serve_queued: Callable[[], None] | None = None,
        *,
        workers: int,
        max_concurrency: int,
    ) -> None:
        """Take requests from now on, in threads that run this.

        ``serve_queued``, on a client, serves in a thread that waits for something else.
        """
        self._run_worker = run_worker
        self._serve_queued = serve_queued
        lib.shmrpc_poller_serve(self.c, workers, max_concurrency)
        for _ in range(2):  # one to lead, one to stand by
            self.spawn_worker()

    @property
    def serving(self) -> bool:
        """Whether it takes requests."""
        return self._run_worker is not None

    def spawn_worker(self) -> None:
        """Start another worker thread, when the core asks for it."""
        if self._run_worker is None:
            return  # it is stopping
        thread = threading.Thread(
            target=self._run_worker,
            args=(self,),
            name=f"shmrpc-worker-{len(self.threads)}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: those there are go on
            _log.error("can't start another worker thread: %s", error)
            return
        self.threads = [other for other in self.threads if other.is_alive()] + [thread]

    def end(self) -> None:
        """The connection is over: a client's poller goes with it, once no thread is inside."""
        if not self._server:
            lib.shmrpc_poller_end(self.c)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        lib.shmrpc_poller_drain(self.c)

    @property
    def busy(self) -> bool:
        """Whether requests run or wait, or something was not sent yet."""
        stats = self.stats()
        return bool(stats["running"] or stats["queued"] or stats["outbox_bytes"])

    def cancel_streams(self) -> None:
        """Tell the handlers of streams that nobody waits for them any more."""
        for connection in list(self.connections.values()):
            for stream in list(connection.session.requests.values()):
                stream.cancel()

    def hang_up(self) -> None:
        """End every connection, after ``stop``; say that nothing unanswered was started."""
        for connection in list(self.connections.values()):
            lib.shmrpc_conn_goodbye(self.c, connection.conn_id)
            connection.shutdown()
            later, connection.at_end = connection.at_end, []  # nobody is left to see it end
            for run in later:
                run()

    def join(self) -> None:
        """Wait for the worker threads to end."""
        for thread in list(self.threads):
            thread.join()

    def stop(self, patience: float) -> list[str]:
        """End all waits and workers; the names of threads that still run after that time."""
        self._run_worker = None
        lib.shmrpc_poller_stop(self.c)
        until = time.monotonic() + patience
        threads = self.threads  # a worker that starts another one meanwhile replaces the list
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]

    # ---- statistics, forks ----

    def stats(self) -> dict[str, int]:
        """The core's counters, and what the sessions dropped."""
        counters = ffi.new("shmrpc_stats *")
        lib.shmrpc_poller_stats(self.c, counters)
        stats = {name: int(getattr(counters, name)) for name in dir(counters)}
        connections = list(self.connections.values())
        dropped = sum(connection.session.dropped for connection in connections)
        stats["frames_dropped"] += self._dropped + dropped
        return stats

    def running(self, names: Sequence[str]) -> list[Running]:
        """The requests that run in workers, whose methods have these names by number."""
        count = int(lib.SHMRPC_RUNNING_MAX)
        found = ffi.new("shmrpc_running[]", count)
        used = lib.shmrpc_poller_running(self.c, found, count)
        calls = []
        for call in found[0:used]:
            connection = self.connection(call.conn_id)
            calls.append(
                Running(
                    names[call.method] if 0 <= call.method < len(names) else "",
                    call.since_ns / 1e9 if call.since_ns else None,
                    -1 if connection is None else connection.peer_pid,
                    (call.conn_id, call.call_id),
                )
            )
        return calls

    def method_counts(self, count: int) -> list[int]:
        """How many requests were started for each of the first ``count`` methods."""
        counts = ffi.new("uint64_t[]", count)
        lib.shmrpc_method_counts(self.c, counts, count)
        return list(counts)

    def forget(self) -> None:
        """In a forked child: give up what is the parent's.

        Descriptors are closed, so that the parent's death can still be noticed by its peers;
        the core leaves its memory as it is, because its locks may be held by threads that the
        child does not have.
        """
        self.forked = True
        for connection in self.connections.values():
            connection.slots.clear()
        count = 1 << 18
        fds = ffi.new("int[]", count)
        for fd in fds[0 : lib.shmrpc_poller_fds(self.c, fds, count)]:
            os.close(fd)


def body_of(message: Any) -> bytes:
    """A copy of a message's body."""
    size = message.body_bytes
    return bytes(ffi.buffer(message.body, size)) if size else b""


def _nothing() -> None:
    pass


def _after_fork_in_child() -> None:
    Poller.misses_signals = sys.version_info[:2] == (3, 13)
    for poller in list(_pollers):
        poller.forget()
    _pollers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
