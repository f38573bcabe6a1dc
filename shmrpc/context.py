"""What a handler can learn about the call it serves: ``current_call()``."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .rendezvous import Credentials

__all__ = ["CallContext", "current_call", "enter_worker"]


class CallSource(Protocol):
    """The worker that runs a call: where its context comes from."""

    def context(self) -> CallContext | None:
        """The call that runs now, or None between calls."""

    def cancelled(self, context: CallContext) -> bool:
        """Whether the caller of this call, if it still runs, has given up."""


class CallContext:
    """One call as its handler sees it. Valid in the handler's thread while the handler runs."""

    __slots__ = ("_source", "call_id", "conn_id", "deadline", "metadata", "method", "peer")

    def __init__(
        self,
        source: CallSource,
        ids: tuple[int, int],
        method: str,
        peer: Credentials,
        deadline: float | None,
        metadata: dict[str, str | bytes],
    ) -> None:
        self._source = source
        self.conn_id, self.call_id = ids
        self.method = method
        self.peer = peer
        self.metadata = metadata
        self.deadline = deadline  # time.monotonic() seconds, or None

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, negative after it; None if there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def cancelled(self) -> bool:
        """Whether the caller no longer waits: it gave up, its deadline passed, or it is gone."""
        remaining = self.time_remaining()
        return (remaining is not None and remaining <= 0) or self._source.cancelled(self)


_thread = threading.local()


def enter_worker(source: CallSource) -> None:
    """Tell ``current_call`` who runs the calls of this thread."""
    _thread.source = source


def current_call() -> CallContext:
    """Return the call that this thread's handler serves; ``RuntimeError`` outside a handler."""
    source: CallSource | None = getattr(_thread, "source", None)
    context = source.context() if source is not None else None
    if context is None:
        msg = "current_call() works in a handler, in the thread that runs it"
        raise RuntimeError(msg)
    return context
