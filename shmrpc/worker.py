"""Running handlers: one worker a thread, taking requests from the core one at a time.

``_serve`` is the path of every call: one C call sends the last reply and waits for the next
request. Everything else here is what to do when that is not the whole story.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import traceback
from typing import TYPE_CHECKING, Any, Protocol

from msgpack import unpackb

from ._native import ffi, lib
from .codec import Codec, MsgpackCodec
from .context import CallContext, enter_worker
from .errors import STATUS_NUMBERS, Error, RemoteError
from .metadata import unpack_metadata
from .rendezvous import Credentials

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Worker"]

_log = logging.getLogger("shmrpc.server")

_EMSGSIZE = -errno.EMSGSIZE
_TRACEBACK_MAX = 32768
_FAILED_WAIT_PAUSE = 0.05

_next = lib.shmrpc_next
_reply_next = lib.shmrpc_reply_next


class Host(Protocol):
    """The server, as far as its workers need it."""

    codec: Codec
    functions: list[Callable[..., Any]]

    def peer_of(self, conn_id: int) -> Credentials: ...
    def forget_peer(self, conn_id: int) -> None: ...
    def shows_tracebacks(self, conn_id: int) -> bool: ...
    def spawn_worker(self, poller: Any) -> None: ...


_NOT_YET: Any = object()  # what a request has not come to when it fails


class Worker:
    """One thread that runs handlers."""

    def __init__(self, server: Host, poller: Any) -> None:
        self._server = server
        self._poller = poller
        self._context: CallContext | None = None
        self._running = False

    def run(self) -> None:
        """Serve until the poller stops."""
        poller = self._poller
        slot = lib.shmrpc_slot_new(poller, 0)
        if slot == ffi.NULL:
            _log.error("no memory for another worker thread")
            return
        self._slot = slot
        self._message = lib.shmrpc_slot_message(slot)
        self._pack = self._server.codec.encoder()
        size = lib.shmrpc_slot_view_bytes(slot)
        self._view = memoryview(ffi.buffer(lib.shmrpc_slot_view(slot), size))
        enter_worker(self)
        try:
            self._serve()
        finally:
            lib.shmrpc_slot_free(slot)

    def _serve(self) -> None:
        slot, message, view, pack = self._slot, self._message, self._view, self._pack
        functions, decode = self._server.functions, self._server.codec.decode
        plain = type(self._server.codec) is MsgpackCodec
        status = _next(slot)
        while True:
            if status >= 0:
                args = result = _NOT_YET
                try:
                    if plain:  # MsgpackCodec.decode written out: 0.1 us less
                        args = unpackb(view[:status], strict_map_key=False)
                    else:
                        args = decode(view[:status])
                    result = functions[message.method](*args)
                    body = pack(result)
                except BaseException as error:
                    status = self._fail(error, args, result)
                    pack = self._pack
                    continue
                status = _reply_next(slot, body, len(body))
                continue
            if status == lib.SHMRPC_STOPPED:
                return
            status = self._special(status)

    def _special(self, status: int) -> int:
        """Whatever is not a plain request."""
        if status == lib.SHMRPC_MESSAGE:
            return self._run_message()
        if status == lib.SHMRPC_SPAWN:
            self._server.spawn_worker(self._poller)
        elif status == lib.SHMRPC_EVENTS:
            while lib.shmrpc_take(self._slot):
                if self._message.kind == lib.SHMRPC_CLOSED:
                    self._server.forget_peer(self._message.conn_id)
        elif status == _EMSGSIZE:
            text = "the result is longer than the caller accepts (its max_message_bytes)"
            self._reply_error("shmrpc.MessageTooLarge", text, "RESOURCE_EXHAUSTED")
        else:
            _log.error("waiting for requests failed: %s", os.strerror(-status))
            time.sleep(_FAILED_WAIT_PAUSE)
        return int(_next(self._slot))

    def _run_message(self) -> int:
        """A request with keywords, a large one, a queued one, or a notification."""
        message = self._message
        size = message.body_bytes
        body = memoryview(ffi.buffer(message.body, size)) if size else memoryview(b"")
        function = self._server.functions[message.method]
        args = result = _NOT_YET
        try:
            args = self._server.codec.decode(body)
            if message.flags & lib.SHMRPC_FLAG_KEYWORDS:
                result = function(*args[0], **args[1])
            else:
                result = function(*args)
            if message.kind == lib.SHMRPC_NOTIFY:
                return int(_next(self._slot))
            reply = self._pack(result)
        except BaseException as error:
            return self._fail(error, args, result)
        return int(_reply_next(self._slot, reply, len(reply)))

    def _fail(self, error: BaseException, args: Any, result: Any) -> int:
        """Reply with what the handler raised, or what kept it from running or replying."""
        message = self._message
        self._pack = self._server.codec.encoder()  # the old one may hold half a message
        if message.kind == lib.SHMRPC_NOTIFY:
            _log.error("notification %r failed", self._method_name(), exc_info=error)
        else:
            try:
                self._report(error, args, result)
            except Exception:
                # An exception that can't even be described; its caller waits all the same.
                _log.exception("an error of %r resists reporting", self._method_name())
                text = f"{self._method_name()!r} raised an error that can't be described"
                self._reply_error(type(error).__name__, text, "INTERNAL")
        return int(_next(self._slot))

    def _report(self, error: BaseException, args: Any, result: Any) -> None:
        message = self._message
        kind = type(error)
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        if args is _NOT_YET:
            text = f"the arguments of {self._method_name()!r} can't be read: {error}"
            self._reply_error(name, text, "INVALID_ARGUMENT")
        elif result is not _NOT_YET:
            text = f"{self._method_name()!r} returned what can't be sent: {error}"
            self._reply_error(name, text, "INTERNAL")
        elif isinstance(error, RemoteError):
            self._reply_error(error.type, error.message, error.code, error.details)
        elif frames is None and isinstance(error, TypeError):
            # Raised by calling it: the arguments do not fit its signature.
            self._reply_error(name, str(error), "INVALID_ARGUMENT")
        else:
            shown = ""
            if self._server.shows_tracebacks(message.conn_id):
                lines = traceback.format_exception(kind, error, frames)
                shown = "".join(lines)[-_TRACEBACK_MAX:]
            code = error.code if isinstance(error, Error) else "UNKNOWN"
            self._reply_error(name, str(error), code, shown=shown)

    def _metadata(self) -> dict[str, str | bytes]:
        message = self._message
        size = message.method_bytes + message.metadata_bytes
        head = bytes(ffi.buffer(message.head, size)) if size else b""
        return unpack_metadata(head[message.method_bytes :])

    def _method_name(self) -> str:
        message = self._message
        if not message.method_bytes:
            return ""
        return bytes(ffi.buffer(message.head, message.method_bytes)).decode("utf-8", "replace")

    def _reply_error(
        self, kind: str, text: str, code: str, details: Any = None, shown: str = ""
    ) -> None:
        fields: dict[str, Any] = {"type": _plain(kind), "message": _plain(text)}
        if shown:
            fields["traceback"] = _plain(shown)
        encode = MsgpackCodec().encoder()
        try:
            body = encode(fields if details is None else {**fields, "details": details})
        except (TypeError, ValueError, OverflowError):
            body = MsgpackCodec().encoder()({**fields, "details": _plain(repr(details))})
        number = STATUS_NUMBERS.get(code, 2)
        status = lib.shmrpc_reply(self._slot, number, ffi.NULL, 0, body, len(body))
        if status == _EMSGSIZE:
            fields = {"type": fields["type"][:256], "message": fields["message"][:256]}
            body = MsgpackCodec().encoder()(fields)
            lib.shmrpc_reply(self._slot, number, ffi.NULL, 0, body, len(body))

    # ---- for current_call() ----

    def context(self) -> CallContext | None:
        """The call that runs now."""
        message = self._message
        context = self._context
        ids = (message.conn_id, message.call_id)
        if context is None or (context.conn_id, context.call_id) != ids:
            deadline = message.deadline_ns / 1e9 if message.deadline_ns else None
            peer = self._server.peer_of(message.conn_id)
            context = CallContext(self, ids, self._method_name(), peer, deadline, self._metadata())
            self._context = context
        return context

    def cancelled(self, context: CallContext) -> bool:
        """Whether the caller of this call has given up, or is gone."""
        message = self._message
        if (message.conn_id, message.call_id) != (context.conn_id, context.call_id):
            return False
        gone = lib.shmrpc_conn_status(self._poller, message.conn_id) != 0
        return gone or bool(message.cancelled)


def _plain(text: object) -> str:
    """Text that every codec can carry, whatever the handler put into its exception."""
    return str(text).encode("utf-8", "replace").decode()
