"""What a handler can learn about the call it serves: ``current_call()``."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol

from .metadata import Metadata, check_metadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from .poller import Connection
    from .rendezvous import Credentials

__all__ = [
    "CallContext",
    "CallSource",
    "current_call",
    "enter_task",
    "enter_worker",
    "inherited_deadline",
    "leave_task",
    "leave_worker",
    "task_source",
]


class CallSource(Protocol):
    """The worker that runs a call: where its context comes from."""

    def context(self) -> CallContext | None:
        """The call that runs now, or None between calls."""

    def cancelled(self, context: CallContext) -> bool:
        """Whether the caller of this call, if it still runs, has given up."""

    def caller(self, context: CallContext) -> Any:
        """What calls the caller of this call."""

    def empty(self, context: CallContext, shape: Any, dtype: Any) -> Any:
        """An array in memory shared with the caller."""

    def loan(self, context: CallContext, nbytes: int) -> Any:
        """Such memory as it is."""

    def set_metadata(self, context: CallContext) -> None:
        """Send the reply with the context's metadata."""

    def send_initial(self, context: CallContext) -> None:
        """Send the context's initial metadata now, if the call can take it before its reply."""


class CallContext:
    """One call as its handler sees it. Valid in the handler's thread while the handler runs."""

    __slots__ = (
        "_source",
        "call_id",
        "conn_id",
        "connection",
        "deadline",
        "initial_default",
        "initial_metadata",
        "metadata",
        "method",
        "one_way",
        "peer",
        "trailing_metadata",
    )

    def __init__(
        self,
        source: CallSource,
        connection: Connection | None,
        call_id: int,
        method: str,
        peer: Credentials,
        deadline: float | None,
        metadata: dict[str, str | bytes],
    ) -> None:
        self._source = source
        self.connection = connection
        self.conn_id = 0
        self.one_way = False  # a notification: nobody waits for its end
        self.call_id = call_id
        self.method = method
        self.peer = peer
        self.metadata = metadata
        self.deadline = deadline  # time.monotonic() seconds, or None
        self.initial_metadata: dict[str, str | bytes] | None = None  # None: not sent
        self.initial_default: dict[str, str | bytes] = {}  # what interceptors add to it
        self.trailing_metadata: dict[str, str | bytes] = {}

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, negative after it; None if there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def cancelled(self) -> bool:
        """Whether the caller no longer waits: it gave up, its deadline passed, or it is gone."""
        remaining = self.time_remaining()
        return (remaining is not None and remaining <= 0) or self._source.cancelled(self)

    @property
    def caller(self) -> Any:
        """What calls methods of the caller: ``caller.call("progress", 0.5)``.

        It has a client's ``call``, ``notify``, ``submit``, ``stream``, ``open`` and ``proxy``, and
        may be kept: it works in any thread until that connection ends.
        """
        return self._source.caller(self)

    def empty(self, shape: Any, dtype: Any = "float64") -> Any:
        """As ``Client.empty``: an array that is this call's result, or an item, without a copy.

        In an asynchronous handler it has to be awaited.
        """
        return self._source.empty(self, shape, dtype)

    def loan(self, nbytes: int) -> Any:
        """As ``Client.loan``. In an asynchronous handler it has to be awaited."""
        return self._source.loan(self, nbytes)

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """Add to what goes to the caller with the end of this call.

        TypeError for anything but str to str or bytes, ValueError beyond 8 KiB in all.
        """
        check_metadata(metadata)
        before = dict(self.trailing_metadata)
        self.trailing_metadata.update(metadata)
        try:
            self._source.set_metadata(self)
        except BaseException:
            self.trailing_metadata = before
            raise

    def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send metadata before the first reply, once; a unary call's goes with its result.

        TypeError, ValueError as ``set_trailing_metadata``; RuntimeError if it was sent already.
        """
        check_metadata(metadata)
        if self.initial_metadata is not None:
            msg = f"the initial metadata of {self.method!r} was sent already"
            raise RuntimeError(msg)
        self.initial_metadata = {**self.initial_default, **metadata}
        try:
            self._source.send_initial(self)
        except BaseException:
            self.initial_metadata = None
            raise


_thread = threading.local()
_current: ContextVar[CallSource] = ContextVar("shmrpc_current_call")


# Methods of the variable themselves: they are called once a call. The first two tell `current_call`
# who runs the call of this task, or of this context, and undo that; the third gives who does.
enter_task: Callable[[CallSource], Token[CallSource]] = _current.set
leave_task: Callable[[Token[CallSource]], None] = _current.reset
task_source: Callable[[None], CallSource | None] = _current.get


def inherited_deadline() -> float | None:
    """When the call must have ended that this task serves; ``time.monotonic()`` seconds."""
    source = _current.get(None)
    if source is None:
        return None
    context = source.context()
    return context.deadline if context is not None else None


def enter_worker(source: CallSource) -> CallSource | None:
    """Tell ``current_call`` who runs the calls of this thread; returns who did before."""
    before: CallSource | None = getattr(_thread, "source", None)
    _thread.source = source
    return before


def leave_worker(before: CallSource | None) -> None:
    """Undo ``enter_worker``."""
    _thread.source = before


def current_call() -> CallContext:
    """Return the call that this thread's, or task's, handler serves; ``RuntimeError`` elsewhere."""
    source: CallSource | None = _current.get(None) or getattr(_thread, "source", None)
    context = source.context() if source is not None else None
    if context is None:
        msg = "current_call() works in a handler, in the thread that runs it"
        raise RuntimeError(msg)
    return context
