"""Calls that nobody waits for yet: ``submit`` and its futures.

There is no reader thread. Whoever asks a future for its result reads for all calls of the
connection meanwhile. Only a future that has to tell somebody by itself (``add_done_callback``,
``concurrent.futures.wait``, ``as_completed``, ``asyncio.wrap_future``) starts a thread that does
the reading while such futures are pending.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from ._native import lib
from .errors import Cancelled, DeadlineExceeded, Error, ForkedError, ProtocolError
from .metadata import unpack_reply_metadata
from .poller import FOREVER, Connection, Waiters
from .session import NOT_SENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .session import Body

__all__ = ["CallFuture"]


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


class CallFuture(Future[Any]):
    """The result of a submitted call. Safe to use from any thread, like any Future."""

    def __init__(
        self, channel: Channel, connection: Connection, method: str, deadline: float
    ) -> None:
        super().__init__()
        self._condition = _Condition()
        self._waiters = _Watchers(self)
        self.method = method
        self.deadline = deadline  # time.monotonic() seconds
        self.call_id = connection.session.next_id()
        self.position: Sequence[int] = NOT_SENT
        self.threads = Waiters()
        self._channel = channel
        self._connection = connection
        self._metadata = b""
        self._reply: tuple[int, Body] | None = None  # taken, and about to be the result

    # ---- for the channel ----

    def register(self) -> None:
        """Take the reply from now on."""
        self._connection.register(self.call_id, self)

    def unregister(self) -> None:
        """It came to nothing: nobody has seen it."""
        self._connection.session.calls.pop(self.call_id, None)

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
        self._forget()
        self.threads.wake()
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

    def replied(self, status: int, metadata: bytes, body: Body) -> Callable[[], None]:
        """Take the reply; finishing the future runs its callbacks, which may do anything."""
        self._metadata = metadata
        self._reply = status, body
        return self._settle

    def lost(self, error: int) -> Callable[[], None]:
        """The connection has ended."""
        if self._reply is not None:
            return self._settle  # the thread that took it may not have come to that yet
        outcome = self._connection.outcome(self.call_id, self.position[0])
        return lambda: self.finish(None, self._connection.lost(error, outcome, self.method))

    def _settle(self) -> None:
        """Be what the reply says. Can be repeated, by any thread."""
        reply = self._reply
        if reply is None:
            return
        self._finish_with(*reply)
        self.unregister()
        self._reply = None
        self._connection.forget_if_done()

    def _finish_with(self, status: int, body: Body) -> None:
        connection = self._connection
        if status != 0:
            error = self._channel._remote_error(connection, self.method, status, body)
            self.finish(None, error)
            return
        try:
            result = connection.decode(body) if body else None
        except (ValueError, TypeError) as reason:
            msg = f"{connection.peer} sent a result of {self.method!r} that is none: {reason}"
            self.finish(None, ProtocolError(msg))
        else:
            self.finish(result)

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Set the outcome, unless it has been cancelled meanwhile. Can be repeated."""
        with contextlib.suppress(InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(result)
        self.threads.wake()

    def expire(self) -> None:
        """Its deadline has passed, or nobody can read any more."""
        if not self._forget():
            return  # it is finished, or about to be by the thread that took its reply
        peer = self._connection.peer
        error: Exception
        if time.monotonic() >= self.deadline:
            error = DeadlineExceeded(f"{self.method!r} on {peer} took longer than its timeout")
        else:
            error = self._connection.lost(errno.EPIPE, lib.SHMRPC_UNKNOWN, self.method)
        self.finish(None, error)

    def abandon(self) -> None:
        """The client is being closed."""
        if self._forget():
            peer = self._connection.peer
            msg = f"{self.method!r} on {peer}: the client was closed meanwhile"
            self.finish(None, Cancelled(msg))

    def _forget(self) -> bool:
        """Take no reply any more, and tell the peer; False if it has come already."""
        if self._reply is not None:
            return False
        if self._connection.session.calls.pop(self.call_id, None) is None:
            return False
        self._connection.send_now(lib.SHMRPC_CANCEL, self.call_id)
        return True

    # ---- waiting ----

    def _read_until_done(self, timeout: float | None) -> float | None:
        """Read until it is finished; returns how long ``Future``'s own wait may still take."""
        finished = super().done
        if finished():
            return 0
        poller = self._connection.poller
        if poller.forked:
            msg = f"this call of {self.method!r} was made before the fork, by the parent"
            raise ForkedError(msg)
        if self.call_id not in self._connection.session.calls:
            return timeout  # about to be finished by the thread that took its reply
        until = FOREVER if timeout is None else time.monotonic() + timeout
        limit = min(until, self.deadline)
        if not poller.wait_until(self._connection, self.threads, finished, limit) and (
            limit == self.deadline or until == FOREVER
        ):
            self.expire()
        return 0 if timeout is not None or finished() else None

    def read_in_background(self) -> None:
        """Make sure that it finishes without anybody asking."""
        if not super().done():
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
            finished = {id(future) for future in list(self._watched) if Future.done(future)}
            with self._lock:
                self._watched = [f for f in self._watched if id(f) not in finished]
                watched = list(self._watched)
                if not watched:
                    self._running = False
                    return
            self._read(watched)

    def _read(self, watched: list[CallFuture]) -> None:
        def changed() -> bool:
            return len(self._watched) != len(watched) or all(map(Future.done, watched))

        deadline = min(future.deadline for future in watched)
        poller = self._connection.poller
        if not poller.wait_until(self._connection, self._waiters, changed, deadline):
            now = time.monotonic()
            for future in watched:
                if now >= future.deadline or now < deadline:  # the latter: the poller has stopped
                    future.expire()
