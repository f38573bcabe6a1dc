"""How calls end that an event loop handles: results, errors and what goes beside them."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from shmrpc._native import ffi, lib
from shmrpc.codec import pack_lifted
from shmrpc.failures import Failure
from shmrpc.poller import FOREVER

from .lending import attach

if TYPE_CHECKING:
    from shmrpc.codec import Codec
    from shmrpc.failures import Stage
    from shmrpc.poller import Slot

    from .incoming import Host, Incoming
    from .loop import LoopPoller

__all__ = ["Replies"]

_log = logging.getLogger("shmrpc.server")

_EMSGSIZE = -errno.EMSGSIZE
_REPLY, _NOTIFY = lib.SHMRPC_REPLY, lib.SHMRPC_NOTIFY


class Replies:
    """Sends what calls end with. Belongs to its loop's thread."""

    def __init__(self, host: Host, codec: Codec) -> None:
        """``host`` says who sees tracebacks."""
        self.host = host
        self._codec = codec
        self._pack = codec.encoder()
        self._position = ffi.new("uint64_t *")
        self._poller: LoopPoller | None = None

    async def _end_beside(self, call: Incoming, held: list[Any]) -> None:
        """Send a result that has buffers beside it. Nobody but the list holds it."""
        connection = call.connection
        if call.kind == _NOTIFY or connection.closed:
            return
        slot = connection.slot()
        deadline = call.deadline if call.deadline is not None else FOREVER
        alive: Any = None  # until it was sent
        try:
            body, sources = pack_lifted(slot.pack_lifted, held[0])
            # If it has views of the caller's blocks, they go back before the reply: its next call
            # finds them free, and still in the caches.
            held.clear()
            if sources:
                name = call.method.name if call.method is not None else ""
                what = f"the result of {name!r}"
                alive = await attach(connection, slot.c, sources, deadline, what)
                sources.clear()
            self._end(call, 0, body, slot)
        except BaseException:
            slot.let_go()  # its packers may hold half a message
            raise
        lib.shmrpc_detach(slot.c)  # if nobody wanted it
        connection.slots.append(slot)
        del alive

    def _end(
        self, call: Incoming, status: int, body: bytes = b"", slot: Slot | None = None
    ) -> None:
        """Send the reply, if there is somebody who wants one; from a slot with its buffers."""
        if call.kind == _NOTIFY or call.replied:
            return
        call.replied = True
        connection = call.connection
        if connection.closed or call.cancelled_by_caller:
            return
        if self._send(call, status, body, slot) == _EMSGSIZE:
            self._refuse_result(call)
        if self._poller is not None:
            self._poller.schedule()

    def _refuse_result(self, call: Incoming) -> None:
        text = "the result is longer than the caller accepts (its max_message_bytes)"
        failure = Failure("shmrpc.MessageTooLarge", text, "RESOURCE_EXHAUSTED")
        self._send(call, failure.number, failure.pack())

    def _send(self, call: Incoming, status: int, body: bytes, prepared: Slot | None = None) -> int:
        slot = prepared or call.connection.slot()
        metadata = call.reply_metadata
        sent: int = lib.shmrpc_send(
            slot.c,
            _REPLY,
            0,
            call.call_id,
            ffi.NULL,
            status,
            metadata,
            len(metadata),
            body,
            len(body),
            0,
            self._position,
        )
        if prepared is None:
            call.connection.slots.append(slot)
        return sent

    def _fail(self, call: Incoming, error: BaseException, stage: Stage) -> None:
        name = call.method.name if call.method is not None else ""
        self._pack = self._codec.encoder()  # the old one may hold half a message
        if call.kind == _NOTIFY:
            _log.error("notification %r failed", name, exc_info=error)
            return
        try:
            shows = self.host.shows_tracebacks(call.connection)
            failure = Failure.of(error, stage, name, shows)
        except Exception:
            _log.exception("an error of %r resists reporting", name)
            text = f"{name!r} raised an error that can't be described"
            failure = Failure(type(error).__name__, text, "INTERNAL")
        self._fail_with(call, failure)

    def _fail_with(self, call: Incoming, failure: Failure) -> None:
        if call.kind == _NOTIFY:
            _log.error("a notification was refused")
            return
        body = failure.pack()
        if len(body) > call.connection.max_request_bytes:
            body = failure.pack_short()
        self._end(call, failure.number, body)
        if call.task is None and call.stream is not None:
            call.connection.session.requests.pop(call.call_id, None)
