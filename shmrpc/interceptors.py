"""Interceptors: code around every call of a client or server, in layers.

An interceptor gets the call before it happens and ``proceed``, which makes it happen. What an
interceptor returns is what its caller gets, so it can look, change, replace, refuse or repeat.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import STATUS_NUMBERS, Error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

__all__ = [
    "AccessLog",
    "AsyncInterceptor",
    "CallInfo",
    "Interceptor",
    "compose",
    "compose_async",
    "status_of",
    "when_done",
]

_log = logging.getLogger("shmrpc.interceptors")
_access = logging.getLogger("shmrpc.access")


def status_of(error: BaseException | None) -> str:
    """The gRPC status name of how a call ended: ``"OK"`` for no error."""
    if error is None:
        return "OK"
    if isinstance(error, Error):
        return error.code if error.code in STATUS_NUMBERS else "UNKNOWN"  # as it is sent
    # What is no Exception interrupts: Ctrl-C, a closed generator, asyncio's CancelledError.
    interrupted = not isinstance(error, Exception) or isinstance(error, CancelledError)
    return "CANCELLED" if interrupted else "UNKNOWN"


def _not_idempotent() -> bool:
    return False


class CallInfo:
    """One call on its way through the interceptors of a client or server.

    Attributes may be changed until ``proceed`` is called. One thread at a time uses it, as the
    call goes on; ``add_done_callback`` and ``finish`` may be called from any.

    - ``method``, ``kind`` (a server sees ``submit`` as ``"unary"``), ``side``
    - ``args``, ``kwargs``: the method's; ``metadata``: the request's
    - ``timeout``: on a client, the caller's in seconds or None; on a server None
    - ``deadline``: ``time.monotonic()`` seconds, or None; on a client None until ``proceed``
    - ``peer``: who is at the other end, as errors name it: address and pid
    - ``initial_metadata``, ``trailing_metadata``: the response's. On a client what has come, on a
      server what goes out beside what the handler sends
    - ``code``: None until the call has ended, then ``"OK"`` or another gRPC status name
    - ``error``: what it ended with, or None
    - ``idempotent``: on a client, asks the server whether it declares the method idempotent; an
      awaitable under asyncio. Raises what a call raises. On a server False
    """

    __slots__ = (
        "_callbacks",
        "_lock",
        "args",
        "code",
        "deadline",
        "error",
        "idempotent",
        "initial_metadata",
        "kind",
        "kwargs",
        "metadata",
        "method",
        "peer",
        "side",
        "timeout",
        "trailing_metadata",
    )

    def __init__(
        self,
        method: str,
        kind: Literal["unary", "submit", "notify", "stream"],
        side: Literal["client", "server"],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        metadata: dict[str, str | bytes],
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        peer: str = "",
        idempotent: Callable[[], Any] = _not_idempotent,
    ) -> None:
        self.method = method
        self.kind: Literal["unary", "submit", "notify", "stream"] = kind
        self.side: Literal["client", "server"] = side
        self.args = args
        self.kwargs = kwargs
        self.metadata = metadata
        self.timeout = timeout
        self.deadline = deadline
        self.peer = peer
        self.initial_metadata: dict[str, str | bytes] = {}
        self.trailing_metadata: dict[str, str | bytes] = {}
        self.code: str | None = None
        self.error: BaseException | None = None
        self.idempotent = idempotent
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[CallInfo], None]] = []

    def add_done_callback(self, fn: Callable[[CallInfo], None]) -> None:
        """Call ``fn`` with this object when the call has ended, in the thread that ends it.

        At once if it has. An exception that it raises is logged, and ends nothing.
        """
        with self._lock:
            if self.code is None:
                self._callbacks.append(fn)
                return
        self._run(fn)

    def finish(self, error: BaseException | None = None) -> None:
        """The call has ended; for clients and servers. Only the first time counts."""
        with self._lock:
            if self.code is not None:
                return
            self.error = error
            self.code = status_of(error)
            callbacks, self._callbacks = self._callbacks, []
        for fn in callbacks:
            self._run(fn)

    def _run(self, fn: Callable[[CallInfo], None]) -> None:
        try:
            fn(self)
        except Exception:
            _log.exception("a done callback of %r failed", self.method)

    def __repr__(self) -> str:
        return f"<CallInfo {self.side} {self.kind} {self.method!r} {self.code or 'running'}>"


def when_done(call: CallInfo, result: Any, done: Callable[[BaseException | None], None]) -> None:
    """Call ``done(error)`` when what ``proceed`` has begun is over; for interceptors that measure.

    ``result`` is what ``proceed`` returned. A unary call of a client is over by then, a future
    when it has its outcome (of each attempt, if an interceptor further out repeats the call), a
    stream and a server's call when they have ended.
    """
    if call.side == "server" or call.kind == "stream":
        call.add_done_callback(lambda ended: done(ended.error))
    elif call.kind == "submit":
        result.add_done_callback(lambda future: done(_error_of(future)))
    else:
        done(None)


def _error_of(future: Any) -> BaseException | None:
    """A finished future's exception, be it of threads or of asyncio."""
    if future.cancelled():
        return CancelledError()
    error: BaseException | None = future.exception()
    return error


class AccessLog:
    """Interceptor for clients and servers that logs each call when it has ended, at INFO.

    The logger is ``shmrpc.access``; records also have the attributes ``side``, ``method``,
    ``kind``, ``peer``, ``code`` and ``seconds``. Arguments and results are not logged. Where that
    logger is not enabled for INFO a call costs next to nothing.
    """

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        """See ``Interceptor``."""
        if not _access.isEnabledFor(logging.INFO):
            return proceed(call)
        started = time.perf_counter()
        try:
            result = proceed(call)
        except BaseException as error:
            _log_access(call, started, error)
            raise
        when_done(call, result, lambda error: _log_access(call, started, error))
        return result

    async def intercept_async(
        self, call: CallInfo, proceed: Callable[[CallInfo], Awaitable[Any]]
    ) -> Any:
        """See ``AsyncInterceptor``."""
        if not _access.isEnabledFor(logging.INFO):
            return await proceed(call)
        started = time.perf_counter()
        try:
            result = await proceed(call)
        except BaseException as error:
            _log_access(call, started, error)
            raise
        when_done(call, result, lambda error: _log_access(call, started, error))
        return result


def _log_access(call: CallInfo, started: float, error: BaseException | None) -> None:
    seconds = time.perf_counter() - started
    code = status_of(error)
    fields = {
        "side": call.side,
        "method": call.method,
        "kind": call.kind,
        "peer": call.peer,
        "code": code,
        "seconds": seconds,
    }
    _access.info(
        "%s %s %r %s %s %s %.3f ms",
        call.side,
        call.kind,
        call.method,
        "from" if call.side == "server" else "to",
        call.peer,
        code,
        seconds * 1e3,
        extra=fields,
    )


class Interceptor(Protocol):
    """What ``connect`` and ``Server`` take as ``interceptors``. Used by many threads at once."""

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        """Handle a call; ``proceed(call)`` runs the interceptors further in, and the call.

        On a client ``proceed`` returns the result of a ``"unary"`` call, a Future for
        ``"submit"``, None for ``"notify"`` and a call object to iterate over for ``"stream"``;
        on a server what the handler returns, which is a generator where it streams. Return that,
        or something of the same kind. Exceptions go outwards. It need not be called (then
        nothing is sent, or the handler does not run), and may be called again.
        """


class AsyncInterceptor(Protocol):
    """An interceptor's other face, for asyncio. An interceptor may have both."""

    async def intercept_async(
        self, call: CallInfo, proceed: Callable[[CallInfo], Awaitable[Any]]
    ) -> Any:
        """As ``Interceptor.intercept``, with a ``proceed`` that is awaited."""


def compose(
    interceptors: Iterable[Interceptor], final: Callable[[CallInfo], Any]
) -> Callable[[CallInfo], Any]:
    """Make one function of interceptors, the first outermost, around ``final``."""
    chain = final
    for interceptor in reversed(list(interceptors)):
        chain = _bind(_face(interceptor, "intercept"), chain)
    return chain


def compose_async(
    interceptors: Iterable[AsyncInterceptor], final: Callable[[CallInfo], Awaitable[Any]]
) -> Callable[[CallInfo], Awaitable[Any]]:
    """As ``compose``, of their asynchronous faces."""
    chain = final
    for interceptor in reversed(list(interceptors)):
        chain = _bind(_face(interceptor, "intercept_async"), chain)
    return chain


def _face(interceptor: Any, name: str) -> Any:
    face = getattr(interceptor, name, None)
    if isinstance(interceptor, type) or not callable(face):
        msg = f"an interceptor must be an object with a method {name}(), not {interceptor!r}"
        raise TypeError(msg)
    return face


def _bind(intercept: Callable[..., Any], proceed: Callable[..., Any]) -> Callable[..., Any]:
    def chain(call: CallInfo) -> Any:
        return intercept(call, proceed)

    return chain
