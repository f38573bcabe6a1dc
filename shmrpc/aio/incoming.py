"""A request that an event loop handles, as its ``current_call()`` and its handlers know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from shmrpc import loans
from shmrpc._native import lib
from shmrpc.context import CallContext
from shmrpc.metadata import pack_metadata, pack_reply_metadata, unpack_metadata
from shmrpc.poller import FOREVER, Connection

from .pending import NO_VALUE

if TYPE_CHECKING:
    import asyncio

    from shmrpc.lending import Steps
    from shmrpc.parcels import Parcel
    from shmrpc.registry import Method
    from shmrpc.session import Stream

    from .handlers import Handlers

__all__ = ["Host", "Incoming"]


class Host(Protocol):
    """The server or client whose methods are called."""

    def shows_tracebacks(self, connection: Connection) -> bool:
        """Whether this peer sees tracebacks."""

    def caller_of(self, connection: Connection, /) -> Any:
        """What calls the peer."""


class Incoming:
    """One request and what became of it; the source of its ``current_call()``."""

    kind: int = lib.SHMRPC_REQUEST
    flags = 0
    deadline_ns = 0
    packed_metadata = b""
    value: Any = NO_VALUE  # its arguments, if they were decoded already
    body: bytes | Parcel = b""
    stream: Stream | None = None
    task: asyncio.Task[None] | None = None
    call_context: CallContext | None = None
    reply_metadata = b""
    replied = False
    started = False
    started_at: float | None = None  # time.monotonic() seconds; of those that have a task
    cancelled_by_caller = False

    def __init__(
        self, handlers: Handlers, connection: Connection, call_id: int, method: Method | None
    ) -> None:
        self.handlers = handlers
        self.connection = connection
        self.call_id = call_id
        self.method = method

    @property
    def deadline(self) -> float | None:
        """``time.monotonic()`` seconds."""
        return self.deadline_ns / 1e9 if self.deadline_ns else None

    # ---- for current_call() ----

    def context(self) -> CallContext:
        """The call as its handler sees it."""
        context = self.call_context
        if context is None:
            context = CallContext(
                self,
                self.connection,
                self.call_id,
                self.method.name if self.method is not None else "",
                self.connection.credentials,
                self.deadline,
                unpack_metadata(self.packed_metadata),
            )
            context.conn_id = self.connection.conn_id
            context.one_way = self.kind == lib.SHMRPC_NOTIFY
            self.call_context = context
        return context

    def cancelled(self, _context: CallContext) -> bool:
        """Whether the caller of this call has given up, or is gone."""
        return self.cancelled_by_caller or self.connection.closed

    def caller(self, _context: CallContext) -> Any:
        """What calls the caller of this call."""
        return self.handlers.host.caller_of(self.connection)

    def empty(self, context: CallContext, shape: Any, dtype: Any) -> Any:
        """An array in memory shared with the caller; to be awaited in an asynchronous handler."""
        deadline = context.deadline or FOREVER
        return self._lent(context, loans.making(self.connection, shape, dtype, deadline))

    def loan(self, context: CallContext, nbytes: int) -> Any:
        """Such memory as it is."""
        deadline = context.deadline or FOREVER
        nbytes = loans.check_size(nbytes)
        return self._lent(context, loans.borrowing(self.connection, nbytes, deadline))

    def _lent(self, context: CallContext, steps: Steps[Any]) -> Any:
        if self.replied or self.connection.closed:
            msg = f"the call of {context.method!r} is over"
            raise RuntimeError(msg)
        return self.handlers.meet(self, steps)

    def set_metadata(self, context: CallContext) -> None:
        """Send the reply with the context's metadata."""
        if self.replied:
            msg = f"the call of {context.method!r} is over"
            raise RuntimeError(msg)
        initial = {} if self.stream is not None else context.initial_metadata or {}
        self.reply_metadata = pack_reply_metadata(context.trailing_metadata, initial)

    def send_initial(self, context: CallContext) -> None:
        """Send the context's initial metadata: at once to a caller that has a stream."""
        if self.stream is None or self.replied:
            self.set_metadata(context)
            return
        packed = pack_metadata(context.initial_metadata)
        slot = self.connection.slot()
        self.connection.send(slot, lib.SHMRPC_INITIAL, self.call_id, metadata=packed)
        self.connection.slots.append(slot)
