"""Workers that pass on what they are asked, instead of running a handler.

A unary call crosses in one thread: read the request, send it on and wait, send the reply back. Its
bytes are copied from one connection's slot into the other connection, and never become a Python
object. Streams have their own two loops below.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc._native import ffi, lib
from shmrpc.errors import Cancelled, Error
from shmrpc.lending import wants_room
from shmrpc.parcels import Parcel
from shmrpc.poller import FOREVER, Waiters
from shmrpc.worker import Worker

from .calls import RawRequests, blocks_of
from .raw import Reply, Request, failure_reply, same, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shmrpc.buffers import Source
    from shmrpc.poller import Connection, Slot
    from shmrpc.session import Body, Stream

    from .calls import RawCall

__all__ = ["Over", "PassingWorker"]

T = TypeVar("T")
if TYPE_CHECKING:
    from typing import TypeAlias

    Over: TypeAlias = Callable[[BaseException | None], None]

_log = logging.getLogger("shmrpc.sidecar")

_LOOK_SECONDS = 0.02
_CANCELLED, _DEADLINE_EXCEEDED = 1, 4
_EMSGSIZE_TEXT = "the reply is longer than the caller accepts (its max_message_bytes)"

_reply_from = lib.shmrpc_reply_from
_STREAM = lib.SHMRPC_FLAG_STREAM
_buffer = ffi.buffer


class PassingWorker(Worker):
    """A worker that passes on what is not its host's own."""

    @abstractmethod
    def _carry(
        self,
        method: str,
        attempt: Callable[[Any, float | None], T],
        deadline: float | None,
        *,
        repeatable: bool = True,
    ) -> tuple[T, Over]:
        """What ``attempt(leg, timeout)`` does, and what to call when that is over: as a route."""

    def _pass_on(self) -> int:
        """Pass the message on, of whatever kind; its status."""
        message = self._message
        method = self._method_name()
        if message.kind == lib.SHMRPC_NOTIFY:
            self._notify(method)
            return 0
        if message.flags & _STREAM:
            return self._stream(method)
        return self._call(method)

    def _refuse(self, error: BaseException) -> int:
        """Tell the caller of what went wrong on the way; returns the status."""
        message = self._message
        if not isinstance(error, Error):
            _log.error("passing on %r failed", self._method_name(), exc_info=error)
        if message.kind == lib.SHMRPC_NOTIFY:
            _log.warning("notification %r was not passed on: %s", self._method_name(), error)
        if isinstance(error, Cancelled):
            # There is nobody to tell, or the core does: it knows whether that was too late.
            deadline = self._deadline()
            late = deadline is not None and time.monotonic() >= deadline
            return _DEADLINE_EXCEEDED if late else _CANCELLED
        reply = failure_reply(error)
        lib.shmrpc_reply(self._slot, reply.status, reply.body, len(reply.body))
        return reply.status

    # ---- unary calls ----

    def _reply_with(self, call: Slot) -> int:
        """Send back the reply that a forwarding slot has, and give the slot back."""
        try:
            status = _reply_from(self._slot, call.c)
            if wants_room(status):
                alive = self._attach(blocks_of(call.message), "the result")
                status = _reply_from(self._slot, call.c)
                del alive
            code: int = call.message.status
        finally:
            call.connection.slots.append(call)
        if status < 0:
            self._reply_error("shmrpc.MessageTooLarge", _EMSGSIZE_TEXT, "RESOURCE_EXHAUSTED")
        return code

    def _call(self, method: str) -> int:
        """A call about which there is something to decide, or whose upstream is another kind."""
        name = method.encode()

        def attempt(leg: Any, timeout: float | None) -> Slot | Reply:
            if leg.native:
                left_ns = -1 if timeout is None else int(timeout * 1e9)
                slot: Slot = leg.forward(self._slot, name, left_ns)
                return slot
            return self._call_other(leg, timeout)

        carried, over = self._carry(method, attempt, self._deadline())
        over(None)
        if isinstance(carried, Reply):
            self._send(carried)
            return carried.status
        return self._reply_with(carried)

    def _call_other(self, leg: Any, timeout: float | None) -> Reply:
        """By a leg that waits elsewhere, where nothing tells that the caller gives up: look."""
        message = self._message
        connection = self._poller.connection(message.conn_id)

        def wanted() -> bool:
            return not (message.cancelled or connection is None or connection.closed)

        pending = leg.begin(self._request(), timeout)
        while not pending.wait(_LOOK_SECONDS):
            if not wanted():
                pending.cancel()
        reply: Reply = pending.result()
        return reply

    def _send(self, reply: Reply) -> None:
        if reply.metadata:
            lib.shmrpc_reply_metadata(self._slot, reply.metadata, len(reply.metadata))
        body, sources = split(reply.body)
        alive = self._attach(sources, "the result")
        status = lib.shmrpc_reply(self._slot, reply.status, body, len(body))
        del alive
        if status < 0:
            self._reply_error("shmrpc.MessageTooLarge", _EMSGSIZE_TEXT, "RESOURCE_EXHAUSTED")

    def _split_item(self, item: Any) -> tuple[bytes, Sequence[Source]]:
        return split(item)

    @staticmethod
    def _size_of(item: Any) -> int:
        body, sources = split(item)
        return len(body) + sum(source.nbytes for source in sources)

    def _request(self) -> Request:
        message = self._message
        size = message.body_bytes
        packed = bytes(_buffer(message.body, size)) if size else b""
        body: Body = packed
        if message.flags & lib.SHMRPC_FLAG_BLOCKS:
            body = parcel = Parcel(packed, 0, untrusted=True)
            parcel.buffers.extend(blocks_of(message))  # which the slot keeps until it is sent
        return Request(
            self._method_name(),
            body,
            self._request_metadata(),
            bool(message.flags & lib.SHMRPC_FLAG_KEYWORDS),
            self._deadline(),
        )

    def _deadline(self) -> float | None:
        deadline_ns = self._message.deadline_ns
        return deadline_ns / 1e9 if deadline_ns else None

    def _notify(self, method: str) -> None:
        request = self._request()

        def attempt(leg: Any, timeout: float | None) -> None:
            leg.notify(request, timeout)

        _, over = self._carry(method, attempt, request.deadline, repeatable=False)
        over(None)

    # ---- streams ----

    def _stream(self, method: str) -> int:
        claimed = self._claim_stream()
        if claimed is None:
            return _CANCELLED
        connection, stream = claimed
        ended = bool(self._message.flags & lib.SHMRPC_FLAG_ENDED)
        request = self._request()

        def attempt(leg: Any, timeout: float | None) -> RawCall:
            call: RawCall = leg.open(request, timeout, ended=ended)
            return call

        try:
            call, over = self._carry(method, attempt, request.deadline, repeatable=False)
            try:
                code = self._carry_stream(call, connection, stream, ended=ended)
            except BaseException as error:
                over(error)
                raise
            over(None)
            return code
        finally:
            connection.session.requests.pop(self._message.call_id, None)

    def _carry_stream(
        self, call: RawCall, connection: Connection, stream: Stream, *, ended: bool
    ) -> int:
        """Both directions until both have ended."""
        watch = _Watch(call, stream)
        watch.extend(stream.waiters if isinstance(stream.waiters, Waiters) else ())
        stream.waiters = watch  # now this thread, which waits for the upstream, hears of the caller
        up = None
        if not ended:
            deadline = self._deadline() or FOREVER
            requests = RawRequests(connection, stream, self._message.call_id, deadline)
            up = threading.Thread(
                target=_send_up, args=(requests, call), name="shmrpc-sidecar-up", daemon=True
            )
            up.start()
        try:
            return self._send_down(call, connection, stream)
        except BaseException:
            call.cancel()
            raise
        finally:
            call.close()
            stream.cancel()  # who sends up waits for more no longer
            if up is not None:
                up.join()

    def _send_down(self, call: RawCall, connection: Connection, stream: Stream) -> int:
        self._pack = self._pack_lifted = same
        try:
            deadline = self._deadline() or FOREVER
            self._send_items(self._replies(call, stream), connection, stream, deadline)
        finally:
            self._new_packers()
        reply = call.reply()
        self._send(reply)
        return reply.status

    def _replies(self, call: RawCall, stream: Stream) -> Iterator[Body]:
        told = False
        while True:
            items = call.take(stream)
            if stream.cancelled:
                msg = f"the caller of {call.method!r} does not wait any more"
                raise Cancelled(msg)
            if not told and call.initial is not None:
                self._send_initial(call.initial)
                told = True
            if items is None:
                return
            yield from items

    def _send_initial(self, packed: bytes) -> None:
        connection = self._poller.connection(self._message.conn_id)
        if connection is not None:
            connection.send(self, lib.SHMRPC_INITIAL, self._message.call_id, metadata=packed)


class _Watch(Waiters):
    """Who waits for something of a caller's stream: also the thread that waits for its upstream."""

    def __init__(self, call: RawCall, stream: Stream) -> None:
        super().__init__()
        self._call = call
        self._stream = stream

    def wake(self) -> None:
        super().wake()
        self._call.woken(self._stream)


def _send_up(requests: RawRequests, call: RawCall) -> None:
    """Pass on what the caller sends; in a thread of its own."""
    try:
        for item in requests:
            call.send(item)
        call.close_send()
    except (Error, ValueError) as error:
        if not isinstance(error, Cancelled):
            # Either the call is over, which is for the other thread to tell; or the caller's
            # messages can't be sent, of which nobody else would learn.
            call.fail(error)
        else:
            call.cancel()
