"""Calls that nobody waits for yet: ``submit`` and its futures.

There is no reader thread. Whoever asks a future for its result reads for all calls of the
connection meanwhile. Only a future that has to tell somebody by itself (``add_done_callback``,
``concurrent.futures.wait``, ``as_completed``, ``asyncio.wrap_future``) starts a thread that does
the reading while such futures are pending.
"""

from __future__ import annotations

import errno
import threading
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, LOGGER, PENDING
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from msgpack import unpackb

from ._native import lib
from .errors import Cancelled, DeadlineExceeded, Error, ForkedError, ProtocolError
from .metadata import unpack_reply_metadata
from .poller import FOREVER, Connection, Waiters
from .values import unpack_extension

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .poller import Slot
    from .session import Body

__all__ = ["CallFuture", "Ending"]


class Channel(Protocol):
    """The client, as far as its futures need it."""

    def _remote_error(
        self, connection: Connection, method: str, status: int, body: Body
    ) -> Error: ...


class _Condition(threading.Condition):
    """A Condition that Ctrl-C does not leave locked.

    ``with`` gets the lock's own methods: there is no Python code between the lock and the block
    in which a signal handler could raise.
    """

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


class _Watchers(list[Any]):
    """The futures module's list of who waits for one future, which tells when it gets one."""

    def __init__(self, future: CallFuture) -> None:
        super().__init__()
        self._future = future

    def append(self, watcher: Any) -> None:
        super().append(watcher)
        self._future.read_in_background()


class _Lazy:
    """An attribute that is made when it is first asked for, once, whoever asks."""

    def __init__(self, make: Callable[[CallFuture], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, future: CallFuture, owner: type) -> Any:
        return future.__dict__.setdefault(self._name, self._make(future))


def _lazy(make: Callable[[CallFuture], Any]) -> Any:
    return _Lazy(make)


Ending: TypeAlias = "tuple[Any, BaseException | None]"
"""A result, or an error."""

_CANCELLED = object()


class CallFuture(Future[Any]):
    """The result of a submitted call. Safe to use from any thread, like any Future.

    Nearly all are asked once, for a result that has come. So what others need to wait for one
    (a lock, lists) is made when somebody asks for it, and nothing here needs that lock:

    - What the call came to is put into ``_came`` by ``dict.setdefault``: the first one wins.
    - Who ends a call does that first and then looks who waits (``_tell``). Who waits first makes
      what the other looks for, and then looks whether the call has ended. One sees the other.
    - With the lock held, nothing ends: where there is a lock, a call has ended when that was told
      (``_told``), by who ends it or by the next one who is about to take the lock. ``wait`` and
      ``as_completed`` count on that, or they would count a future twice, or wait for none.
    """

    _waiters = _lazy(_Watchers)
    _done_callbacks = _lazy(lambda _future: [])
    threads = _lazy(lambda _future: Waiters())

    _lock: _Condition  # what ``_condition`` has made
    _came: Any = None  # a plain reply's body, not decoded yet; any other Ending; or _CANCELLED
    _decoded: Ending | None = None  # what that body is
    _told = False
    _metadata = b""
    _reply: tuple[int, Body] | None = None  # one that is not plain: taken, about to be what came
    position: Sequence[int] = ()  # empty until it was sent: see the core's shmrpc_outcome_of

    def __init__(
        self, channel: Channel, connection: Connection, method: str, deadline: float
    ) -> None:
        # Not Future's own: what it makes is above.
        self.method = method
        self.deadline = deadline  # time.monotonic() seconds
        self.call_id = connection.session.next_id()
        self._channel = channel
        self._connection = connection

    # ---- what Future and those that know it look at ----

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        lock: _Condition = self.__dict__.get("_lock") or self.__dict__.setdefault(
            "_lock", _Condition()
        )
        if self._came is not None and not self._told:
            self._tell_watchers()  # who ended it may have seen no lock, or not come to that yet
        return lock

    @property
    def _state(self) -> str:  # type: ignore[override]
        came = self._came
        if came is None or ("_lock" in self.__dict__ and not self._told):
            return PENDING
        return CANCELLED_AND_NOTIFIED if came is _CANCELLED else FINISHED

    @property
    def _result(self) -> Any:  # type: ignore[override]
        return self._ending()[0]

    @property
    def _exception(self) -> BaseException | None:  # type: ignore[override]
        return self._ending()[1]

    # ---- for the channel ----

    def register(self) -> None:
        """Take the reply from now on."""
        self._connection.register(self.call_id, self)

    def unregister(self) -> None:
        """It came to nothing: nobody has seen it."""
        self._connection.session.calls.pop(self.call_id, None)

    def lost_while_sending(self, slot: Slot) -> None:
        """The connection has ended before the position was known; who ended it could not tell."""
        if self._came is None and self.position:
            connection = self._connection
            outcome = lib.shmrpc_outcome_of(slot.c, self.call_id, self.position[0])
            self.finish(None, connection.lost(connection.error, outcome, self.method))

    def observe(self, fn: Callable[[BaseException | None], None]) -> None:
        """Call this when it is finished, with its error, without reading in the background."""
        # The base class's callback: ours would start a reader. It is called at once if another
        # thread has taken the reply already.
        super().add_done_callback(
            lambda _: fn(CancelledError() if self.cancelled() else self.exception(0))
        )

    def reply_metadata(self) -> tuple[dict[str, str | bytes], dict[str, str | bytes]]:
        """Trailing and initial metadata, as far as they have come."""
        return unpack_reply_metadata(self._metadata)

    # ---- as any Future ----

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future.result``; reads from the connection while it waits."""
        if self._came is None and not self._read_until_done(timeout):
            raise FutureTimeoutError
        result, error = self._decoded or self._ending()
        if error is None:
            return result
        try:
            raise error
        finally:
            del self, error  # its traceback has this frame: let them not keep each other alive

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``; reads from the connection while it waits."""
        if self._came is None and not self._read_until_done(timeout):
            raise FutureTimeoutError
        if self._came is _CANCELLED:
            raise CancelledError
        return self._ending()[1]

    def done(self) -> bool:
        """Whether it is finished; takes what has arrived into account."""
        return self._came is not None or self._read_until_done(0)

    def cancel(self) -> bool:
        """Cancel the call, also if it was sent already; False if it is finished."""
        if self.__dict__.setdefault("_came", _CANCELLED) is not _CANCELLED:
            return False
        self._forget()
        self._tell()
        return True

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """As ``Future.add_done_callback``; a background thread reads from now on."""
        super().add_done_callback(fn)
        self.read_in_background()

    @property
    def initial_metadata(self) -> dict[str, str | bytes]:
        """What the handler sent before its result; waits for the result."""
        self.exception()
        return self.reply_metadata()[1]

    @property
    def trailing_metadata(self) -> dict[str, str | bytes]:
        """What the handler set for the end of the call; waits for the result."""
        self.exception()
        return self.reply_metadata()[0]

    # ---- for who reads the connection ----

    def replied(self, status: int, metadata: bytes, body: Body) -> Callable[[], None] | None:
        """Take the reply; what runs other people's code is returned, to be run later."""
        if status == 0 and not metadata and type(body) is bytes:
            own = self.__dict__  # it is decoded by who asks for it
            own.setdefault("_came", body)
            return self._tell_later if "threads" in own or "_lock" in own else None
        self._metadata = metadata
        self._reply = status, body
        return self._settle

    def lost(self, error: int) -> Callable[[], None] | None:
        """The connection has ended."""
        if self._reply is not None:
            return self._settle  # the thread that took it may not have come to that yet
        if not self.position:
            return None  # see lost_while_sending
        connection = self._connection
        outcome = connection.outcome(self.call_id, self.position[0])
        self.__dict__.setdefault("_came", (None, connection.lost(error, outcome, self.method)))
        return self._tell

    def _settle(self) -> None:
        """Be what the reply says. Can be repeated, by any thread."""
        reply = self._reply
        if reply is None:
            return
        self.finish(*self._interpret(*reply))
        self.unregister()
        self._reply = None
        self._connection.forget_if_done()

    def _interpret(self, status: int, body: Body) -> Ending:
        """What a reply says."""
        connection = self._connection
        if status != 0:
            return None, self._channel._remote_error(connection, self.method, status, body)
        if not body:
            return None, None
        try:
            if type(body) is bytes and connection.plain:  # its decode written out: 0.1 us less
                result = unpackb(body, strict_map_key=False, ext_hook=unpack_extension)
            else:
                result = connection.decode(body)
        except (ValueError, TypeError) as reason:
            msg = f"{connection.peer} sent a result of {self.method!r} that is none: {reason}"
            return None, ProtocolError(msg)
        return result, None

    def _ending(self) -> Ending:
        """What it is that came."""
        came = self._came
        if type(came) is bytes:
            return self._decoded or self.__dict__.setdefault("_decoded", self._interpret(0, came))
        if type(came) is tuple:
            return came
        return None, CancelledError() if came is _CANCELLED else None

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Set the outcome, unless it has one already. Can be repeated."""
        self.__dict__.setdefault("_came", (result, error))
        self._tell()

    def _tell_later(self) -> None:
        self._tell()
        self.unregister()
        self._connection.forget_if_done()

    def _tell(self) -> None:
        """Tell everybody who waits that it has ended. Can be repeated."""
        own = self.__dict__
        if "threads" in own:
            self.threads.wake()
        if "_lock" in own:
            self._tell_watchers()
            self._invoke_callbacks()

    def _tell_watchers(self) -> None:
        error = self._exception
        with self._lock:
            if self._told:
                return
            for waiter in self._waiters:
                if self._came is _CANCELLED:
                    waiter.add_cancelled(self)
                elif error is not None:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)
            self._lock.notify_all()
            self._told = True

    def _invoke_callbacks(self) -> None:
        while True:
            try:
                fn = self._done_callbacks.pop(0)
            except IndexError:
                return
            try:
                fn(self)
            except Exception:
                LOGGER.exception("exception calling callback for %r", self)

    def expire(self) -> None:
        """Its deadline has passed, or nobody can read any more."""
        peer = self._connection.peer
        error: Exception
        if time.monotonic() >= self.deadline:
            error = DeadlineExceeded(f"{self.method!r} on {peer} took longer than its timeout")
        else:
            error = self._connection.lost(errno.EPIPE, lib.SHMRPC_UNKNOWN, self.method)
        self._give_up(error)

    def abandon(self) -> None:
        """The client is being closed."""
        peer = self._connection.peer
        self._give_up(Cancelled(f"{self.method!r} on {peer}: the client was closed meanwhile"))

    def _give_up(self, error: Exception) -> None:
        if self._reply is not None:
            self._settle()  # its reply was taken, by a thread that may not have come to that yet
            return
        ending = (None, error)
        if self.__dict__.setdefault("_came", ending) is ending:
            self._forget()
            self._tell()

    def _forget(self) -> None:
        """Take no reply any more, and tell the peer unless it has come already."""
        taken = self._reply is not None
        if self._connection.session.calls.pop(self.call_id, None) is not None and not taken:
            self._connection.send_now(lib.SHMRPC_CANCEL, self.call_id)

    # ---- waiting ----

    def _read_until_done(self, timeout: float | None) -> bool:
        """Read until it is finished; False when the timeout has passed."""
        poller = self._connection.poller
        if poller.forked:
            msg = f"this call of {self.method!r} was made before the fork, by the parent"
            raise ForkedError(msg)
        until = FOREVER if timeout is None else time.monotonic() + timeout
        limit = min(until, self.deadline)
        if not poller.wait_until(self._connection, self.threads, self._has_ended, limit) and (
            limit == self.deadline or until == FOREVER
        ):
            self.expire()
        return self._came is not None

    def _has_ended(self) -> bool:
        return self._came is not None

    def read_in_background(self) -> None:
        """Make sure that it finishes without anybody asking."""
        if self._came is None:
            _Reader.of(self._connection).watch(self)


class _Reader:
    """A thread that reads one connection as long as some futures have to finish by themselves."""

    _lock = threading.Lock()

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._watched: list[CallFuture] = []
        self._waiters = Waiters()
        self._running = False

    @classmethod
    def of(cls, connection: Connection) -> _Reader:
        """The reader of this connection."""
        with cls._lock:
            if connection.reader is None:
                connection.reader = cls(connection)
            reader: _Reader = connection.reader
            return reader

    def watch(self, future: CallFuture) -> None:
        """Read until this future is finished, too."""
        with self._lock:
            self._watched.append(future)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="shmrpc-futures", daemon=True).start()
        self.wake()  # its deadline may be nearer than the one that is waited for

    def wake(self) -> None:
        """Have the thread look again whether it still has to read."""
        self._waiters.wake()

    def _run(self) -> None:
        while True:
            # Not with our lock held: who watches a future may hold the future's.
            finished = {id(future) for future in list(self._watched) if future._has_ended()}
            with self._lock:
                self._watched = [f for f in self._watched if id(f) not in finished]
                watched = list(self._watched)
                if not watched:
                    self._running = False
                    return
            self._read(watched)

    def _read(self, watched: list[CallFuture]) -> None:
        def changed() -> bool:
            return len(self._watched) != len(watched) or all(
                future._has_ended() for future in watched
            )

        deadline = min(future.deadline for future in watched)
        poller = self._connection.poller
        if not poller.wait_until(self._connection, self._waiters, changed, deadline):
            now = time.monotonic()
            for future in watched:
                if now >= future.deadline or now < deadline:  # the latter: the poller has stopped
                    future.expire()
