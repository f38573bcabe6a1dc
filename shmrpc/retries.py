"""Repeating calls that have not run, and of those that may have, the ones that may run twice."""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from .errors import ConnectError, ConnectionLost, Error
from .scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .interceptors import CallInfo

__all__ = ["Retries", "repeating"]

_log = logging.getLogger("shmrpc.retries")

# An attempt blocks its thread while it connects, and the futures of a server that is away may come
# by the thousand: few threads, so that they leave the others of the program alone.
_THREADS_MAX = 4
_scheduler = Scheduler("shmrpc-retries", _THREADS_MAX)


class Retries:
    """Interceptor for clients that repeats calls which got lost on the way.

    A call is attempted ``attempts`` times in all. It is repeated if there was no connection, or
    if the connection was lost before the server started it. If it may have run it is repeated
    only where the server declares the method idempotent. All other errors are answers: they are
    never repeated. A stream or notification is repeated only while nothing of it has been sent.

    Before each repetition it pauses for a random time of up to ``backoff`` seconds, doubled each
    time up to ``backoff_max``, so that many clients do not come back all at once. A call's
    timeout counts from its first attempt; rather than sleep past it, a call fails at once.

    When all attempts have failed, the last error is raised; or, if an earlier attempt may have
    run, that one's, so that ``outcome`` is never better than the truth.

    A future of ``submit`` is repeated by background threads; a client's reader thread watches it.
    Any number of clients and threads may share one ``Retries``.
    """

    def __init__(
        self, attempts: int = 3, *, backoff: float = 0.01, backoff_max: float = 1.0
    ) -> None:
        """``ValueError`` for less than one attempt or a negative pause."""
        if attempts < 1:
            msg = f"attempts must be at least 1, not {attempts}"
            raise ValueError(msg)
        if not 0 <= backoff <= backoff_max:
            msg = f"0 <= backoff <= backoff_max must hold, not {backoff} and {backoff_max}"
            raise ValueError(msg)
        self.attempts = attempts
        self.backoff = backoff
        self.backoff_max = backoff_max

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        """See ``Interceptor``."""
        attempts = _Attempts(self, call)
        if call.kind == "submit":
            return _Submission(attempts, proceed)
        while True:
            attempts.begin()
            try:
                if attempts.asking:
                    attempts.answered(call.idempotent())
                return proceed(call)
            except Error as error:
                pause = attempts.failed(error)
            time.sleep(pause)

    async def intercept_async(
        self, call: CallInfo, proceed: Callable[[CallInfo], Awaitable[Any]]
    ) -> Any:
        """See ``AsyncInterceptor``."""
        from asyncio import sleep  # here it is loaded already; elsewhere it would be a burden

        attempts = _Attempts(self, call)
        while True:
            attempts.begin()
            try:
                if attempts.asking:
                    answer = call.idempotent()
                    attempts.answered(await answer if inspect.isawaitable(answer) else answer)
                return await proceed(call)
            except Error as error:
                pause = attempts.failed(error)
            await sleep(pause)


def repeating(retries: Any) -> list[Retries]:
    """What goes around a client's calls for its option ``retries``; ValueError if that is none."""
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        msg = f"retries must be a number of repetitions from 0 on, not {retries!r}"
        raise ValueError(msg)
    return [Retries(retries + 1)] if retries else []


class _Attempts:
    """What one call has left of its attempts and its time: decides, and does nothing itself."""

    def __init__(self, policy: Retries, call: CallInfo) -> None:
        self.call = call
        # Whether the next thing to do is to ask if the method is idempotent.
        self.asking = False
        self._policy = policy
        self._request = call.args, dict(call.kwargs), dict(call.metadata)
        self._until = None if call.timeout is None else time.monotonic() + call.timeout
        self._failures = 0
        self._idempotent = False
        self._unsure: ConnectionLost | None = None  # the end of an attempt that may have run

    def begin(self) -> None:
        """Before each attempt: the request as it was, and the time that is left."""
        if self._failures == 0:
            return
        call = self.call
        # Interceptors further in may have changed the request, and will do so again.
        call.args, kwargs, metadata = self._request
        call.kwargs, call.metadata = dict(kwargs), dict(metadata)
        call.initial_metadata, call.trailing_metadata = {}, {}
        call.deadline = None
        if self._until is not None:
            call.timeout = max(0.0, self._until - time.monotonic())

    def answered(self, idempotent: bool) -> None:
        """What the server says of the method; raises the call's error if it may not run twice."""
        if not idempotent and self._unsure is not None:
            raise self._unsure
        self.asking = False
        self._idempotent = True

    def failed(self, error: Error) -> float:
        """Seconds to pause before the next attempt; raises what the caller gets if none is due."""
        self._failures += 1
        pause = self._pause()
        if self._repeatable(error) and self._failures < self._policy.attempts and pause is not None:
            _log.debug("%r is repeated in %.3f s: %s", self.call.method, pause, error)
            return pause
        # Neither a failed question nor an attempt that has not run says that none has.
        hides = self.asking or isinstance(error, (ConnectError, ConnectionLost))
        outcome = self._unsure if hides and self._unsure is not None else error
        self._unsure = None
        try:
            raise outcome from outcome.__cause__  # and not from what came after it
        finally:
            del outcome, error  # its traceback has this frame: let them not keep each other alive

    def _repeatable(self, error: Error) -> bool:
        if error is self._unsure:
            return False  # the answer was no
        if isinstance(error, ConnectError):
            return True
        if not isinstance(error, ConnectionLost):
            return False
        if self.asking or error.outcome == "not_sent":
            return True
        if self.call.kind in {"notify", "stream"}:
            return False
        if error.outcome != "not_started":
            self._unsure = error
            self.asking = not self._idempotent
        return True

    def _pause(self) -> float | None:
        """How long to wait now; None if that would be past the timeout."""
        policy = self._policy
        # Doubled 64 times, any pause is beyond any maximum; doubled 2,000 times, no float.
        longest = policy.backoff * 2.0 ** min(self._failures - 1, 64)
        pause = random.uniform(0.0, min(longest, policy.backoff_max))  # noqa: S311 - jitter
        if self._until is not None and time.monotonic() + pause >= self._until:
            return None
        return pause


class _Submission(Future[Any]):
    """The outcome of whichever attempt is the last."""

    def __init__(self, attempts: _Attempts, proceed: Callable[[CallInfo], Future[Any]]) -> None:
        """Make the first attempt; raises what can't be repeated."""
        super().__init__()
        self._attempts = attempts
        self._proceed = proceed
        self._current: Future[Any] | None = None
        self._cancelling = threading.Lock()
        self._attempt()

    def cancel(self) -> bool:
        """Cancel the attempt that is under way, and make no other; False if it is finished."""
        if not super().cancel():
            return False
        if self._cancelling.acquire(blocking=False):  # once, and never released
            self.set_running_or_notify_cancel()
            current = self._current
            if current is not None:
                current.cancel()
        return True

    def _attempt(self) -> None:
        attempts = self._attempts
        attempts.begin()
        try:
            if attempts.asking:
                attempts.answered(attempts.call.idempotent())
            future = self._proceed(attempts.call)
        except Error as error:
            _scheduler.after(attempts.failed(error), self._attempt_later)
            return
        self._current = future
        if self.cancelled():  # while it was being sent
            future.cancel()
        future.add_done_callback(self._ended)

    def _attempt_later(self) -> None:
        """In a thread of the scheduler."""
        if self.cancelled():
            return
        try:
            self._attempt()
        except BaseException as error:
            self._settle(error)

    def _ended(self, future: Future[Any]) -> None:
        """The current attempt has, in whatever thread noticed."""
        self._current = None  # the two would keep each other alive
        if future.cancelled():
            self.cancel()
            return
        error = future.exception()
        if isinstance(error, Error):
            try:
                _scheduler.after(self._attempts.failed(error), self._attempt_later)
            except Exception as last:  # the outcome, or no thread to be had
                self._settle(last)
        elif error is not None:
            self._settle(error)
        else:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                self.set_result(future.result())

    def _settle(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)
