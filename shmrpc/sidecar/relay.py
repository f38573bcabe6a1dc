"""Where requests come in over shm, unix and tcp, and are passed on by the thread that read them.

A unary call crosses a sidecar in one thread and three calls into C: read the request, send it on
and wait, send the reply back. Its bytes are copied from one connection's slot into the other
connection, and never become a Python object. Streams have their own two loops below.
"""

from __future__ import annotations

import logging
import threading
import time
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from shmrpc._native import ffi, lib
from shmrpc.errors import Cancelled, Error
from shmrpc.parcels import Parcel
from shmrpc.poller import FOREVER, Waiters
from shmrpc.server import Server
from shmrpc.worker import Worker

from .endpoint import RawRequests
from .raw import Reply, Request, failure_reply, same, split

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shmrpc.buffers import Source
    from shmrpc.poller import Connection, Poller, Slot
    from shmrpc.session import Body, Stream

    from .counts import Cell
    from .endpoint import RawCall
    from .routes import Route, Table
    from .service import Sidecar

__all__ = ["RelayServer"]

_log = logging.getLogger("shmrpc.sidecar")

_WORKERS = 256  # calls that are passed on at a time: each waits in a thread
_MAX_CONCURRENCY = 4096
_LOOK_SECONDS = 0.02
_CANCELLED, _DEADLINE_EXCEEDED = 1, 4
_EMSGSIZE_TEXT = "the reply is longer than the caller accepts (its max_message_bytes)"

_next, _forward = lib.shmrpc_next, lib.shmrpc_forward
_reply_from = lib.shmrpc_reply_from
_MESSAGE, _STREAM = lib.SHMRPC_MESSAGE, lib.SHMRPC_FLAG_STREAM
_buffer = ffi.buffer


class _RelayWorker(Worker):
    """A worker that passes on what is not its server's own."""

    def __init__(self, host: RelayServer, poller: Poller) -> None:
        super().__init__(host, poller)
        self._sidecar = host.sidecar
        self._cells: dict[str, Cell] = {}
        self.table: Table | None = None  # in use now: its upstreams stay
        self.route: Route | None = None
        host.sidecar.workers.add(self)

    def end(self) -> None:
        """See ``Worker``."""
        sidecar = self._sidecar
        sidecar.workers.discard(self)
        sidecar.counts.end(self._cells)
        super().end()

    def _serve(self) -> None:
        slot, message, sidecar = self._slot, self._message, self._sidecar
        status = _next(slot)
        while True:
            if status >= 0 and message.method < 0:
                # The way of nearly every call: what _relay does, where nothing is to be decided.
                start = perf_counter_ns()
                self.table = table = sidecar.table
                try:
                    if sidecar.table is not table:
                        raise LookupError  # replaced meanwhile: it might be dismantled already
                    route = table.known[bytes(_buffer(message.head, message.method_bytes))]
                    call = route.direct.connected._slots.pop()
                except (LookupError, AttributeError):
                    self._relay(start)
                else:
                    self.route = route
                    result = _forward(call.c, slot, route.timeout_ns)
                    if result >= 0 and _reply_from(slot, call.c) >= 0:
                        call.connection.slots.append(call)
                        self.table = self.route = None
                        self._count(route.prefix, 0, perf_counter_ns() - start)
                    else:
                        self._relay(start, call, result)
            elif status >= 0 or status == _MESSAGE:
                if message.method < 0:
                    self._relay(perf_counter_ns())
                else:
                    self._run_message()
            elif status == lib.SHMRPC_STOPPED:
                return
            else:
                self._special(status)
            status = _next(slot)

    def _count(self, prefix: str, status: int, nanoseconds: int) -> None:
        cell = self._cells.get(prefix)
        if cell is None:
            cell = self._cells[prefix] = self._sidecar.counts.cell(prefix)
        cell.count(status, nanoseconds)

    def _relay(self, start: int, call: Slot | None = None, result: int = 0) -> None:
        """Pass the message on. It may have been sent on ``call`` already, with this result."""
        message = self._message
        while call is None and self.table is not self._sidecar.table:
            self.table = self._sidecar.table
        table = self.table or self._sidecar.table
        code, route = 0, self.route
        try:
            name = bytes(_buffer(message.head, message.method_bytes))
            if route is None:
                self.route = route = table.find(name)
            leg = route.direct
            flags, whole = message.flags & _STREAM, message.kind != lib.SHMRPC_NOTIFY
            if leg is not None and leg.native and whole and not flags:
                code = self._reply_with(
                    leg.forward(self._slot, name, route.timeout_ns, call, result)
                )
            elif not whole:
                self._notify(route, name.decode("utf-8", "replace"))
            elif flags:
                code = self._stream(route, name.decode("utf-8", "replace"))
            else:
                code = self._call(route, name)
        except BaseException as error:
            code = self._refuse(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self.table = self.route = None
            self._count(route.prefix if route else "-", code, perf_counter_ns() - start)

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
        """Send back the reply that a forwarding slot has."""
        status = _reply_from(self._slot, call.c)
        code: int = call.message.status
        call.connection.slots.append(call)
        if status < 0:
            self._reply_error("shmrpc.MessageTooLarge", _EMSGSIZE_TEXT, "RESOURCE_EXHAUSTED")
        return code

    def _call(self, route: Route, name: bytes) -> int:
        """A call about which there is something to decide, or whose upstream is another kind."""
        method = name.decode("utf-8", "replace")

        def attempt(leg: Any, timeout: float | None) -> Slot | Reply:
            if leg.native:
                left_ns = -1 if timeout is None else int(timeout * 1e9)
                slot: Slot = leg.forward(self._slot, name, left_ns)
                return slot
            return self._call_other(leg, timeout)

        carried, over = route.carry(method, attempt, uid=self._uid(), deadline=self._deadline())
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

    def _split(self, item: Any) -> tuple[bytes, Sequence[Source]]:
        return split(item)

    def _request(self) -> Request:
        message = self._message
        size = message.body_bytes
        packed = bytes(_buffer(message.body, size)) if size else b""
        body: Body = packed
        if message.flags & lib.SHMRPC_FLAG_BLOCKS:
            # Copies: the slot keeps its buffers for the next attempt, which may forward them.
            blocks = message.blocks[0 : message.block_count]
            body = parcel = Parcel(packed, 0, untrusted=True)
            parcel.buffers.extend(memoryview(bytes(_buffer(b.data, b.bytes))) for b in blocks)
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

    def _uid(self) -> int:
        connection = self._poller.connection(self._message.conn_id)
        return connection.credentials.uid if connection is not None else -1

    def _notify(self, route: Route, method: str) -> None:
        request = self._request()

        def attempt(leg: Any, timeout: float | None) -> None:
            leg.notify(request, timeout)

        deadline = request.deadline
        _, over = route.carry(method, attempt, uid=self._uid(), deadline=deadline, repeatable=False)
        over(None)

    # ---- streams ----

    def _stream(self, route: Route, method: str) -> int:
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
            call, over = route.carry(
                method, attempt, uid=self._uid(), deadline=request.deadline, repeatable=False
            )
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
        self._pack = same
        try:
            deadline = self._deadline() or FOREVER
            self._send_items(self._replies(call, stream), connection, stream, deadline)
        finally:
            self._pack = self._host.codec.encoder()
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


class RelayServer(Server):
    """A server whose methods are elsewhere."""

    def __init__(self, sidecar: Sidecar, address: str, **options: Any) -> None:
        super().__init__(address, workers=_WORKERS, max_concurrency=_MAX_CONCURRENCY, **options)
        self.sidecar = sidecar
        self.registry.admits_others = True
        self.registry.add(sidecar.describe, "shmrpc.describe", idempotent=True)

    def _run_worker(self, poller: Poller) -> None:
        worker = _RelayWorker(self, poller)
        del poller
        worker.run()
