"""Running handlers: one worker a thread, taking requests from the core one at a time.

``_serve`` is the path of every call: one C call sends the last reply and waits for the next
request. Everything else here is what to do when that is not the whole story.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgpack import unpackb

from . import loans
from ._native import ffi, lib
from .attaching import slot_packers
from .codec import Codec, MsgpackCodec, pack_lifted, pack_split
from .context import CallContext, enter_worker, leave_worker
from .errors import Cancelled, ConnectionLost, Error, RemoteError
from .failures import Failure, unsendable_item
from .lending import attach
from .metadata import pack_metadata, pack_reply_metadata, unpack_metadata
from .owned import free_with
from .poller import FOREVER, Connection, Poller, Waiters
from .receiving import Requests
from .rendezvous import Credentials
from .values import LARGE as _LARGE
from .values import NOT_PLAIN, NotPlain, encode, may_hold_large, unpack_extension

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .buffers import Source
    from .failures import Stage
    from .registry import Method, Registry
    from .session import Stream

__all__ = ["InlineWorkers", "Worker"]

_log = logging.getLogger("shmrpc.server")

_EMSGSIZE = -errno.EMSGSIZE
_FAILED_WAIT_PAUSE = 0.05

_MESSAGE, _REQUEST = lib.SHMRPC_MESSAGE, lib.SHMRPC_REQUEST
_BLOCKS = lib.SHMRPC_FLAG_BLOCKS

_next = lib.shmrpc_next
_reply_next = lib.shmrpc_reply_next


class Host(Protocol):
    """The server or client whose methods are called, as far as its workers need it."""

    registry: Registry

    @property
    def codec(self) -> Codec: ...
    def shows_tracebacks(self, connection: Connection) -> bool: ...
    def caller_of(self, connection: Connection, /) -> Any: ...


_NOT_YET: Any = object()  # what a request has not come to when it fails


class Worker:
    """What runs handlers: the requests of one thread, one at a time."""

    def __init__(self, host: Host, poller: Poller) -> None:
        self._host = host
        self._poller = poller
        self._context: CallContext | None = None
        self._thread = 0  # that runs the handler
        self._interruptible = False  # it is the main thread, and has other things to do
        self._interruption: BaseException | None = None
        slot = lib.shmrpc_worker_new(poller.c)
        if slot == ffi.NULL:
            raise MemoryError
        self.c = self._slot = slot
        self._free = free_with(slot, lib.shmrpc_slot_free)
        self._message = lib.shmrpc_slot_message(self._slot)
        self._new_packers()
        size = lib.shmrpc_slot_view_bytes(self._slot)
        self._view = memoryview(ffi.buffer(lib.shmrpc_slot_view(self._slot), size))

    def _new_packers(self) -> None:
        codec = self._host.codec
        self._pack = codec.encoder()
        # For what this slot sends next.
        self._pack_beside, self._pack_lifted = slot_packers(codec, self._slot)

    def run(self) -> None:
        """Serve until the poller stops."""
        enter_worker(self)
        self._thread = threading.get_ident()
        try:
            self._serve()
        finally:
            self.end()

    def end(self) -> None:
        """Give the slot up, with the request that it may have."""
        self._free()
        self._forget_context()
        # Errors that somebody keeps know our frames, and must not keep the connections.
        self.__dict__.clear()

    def _serve(self) -> None:
        slot, message, view, pack = self._slot, self._message, self._view, self._pack_beside
        functions, decode = self._host.registry.functions, self._host.codec.decode
        plain = type(self._host.codec) is MsgpackCodec
        status = _next(slot)
        while True:
            if status >= 0:
                args = result = _NOT_YET
                try:
                    if plain:  # MsgpackCodec.decode written out: 0.1 us less
                        args = unpackb(
                            view[:status], strict_map_key=False, ext_hook=unpack_extension
                        )
                    else:
                        args = decode(view[:status])
                    result = functions[message.method](*args)
                    body = pack(result)
                except BaseException as error:
                    if result is not _NOT_YET and isinstance(error, NOT_PLAIN):
                        self._reply_beside(result)
                    else:
                        self._fail(error, args, result)
                    args = result = None  # or what they are made of is not given back
                    pack = self._pack_beside
                    status = _next(slot)
                    continue
                size = len(body)
                if size >= _LARGE and plain and may_hold_large(body):
                    self._reply_beside(result)
                    status = _next(slot)
                else:
                    status = _reply_next(slot, body, size)
                continue
            if status == lib.SHMRPC_STOPPED:
                return
            self._special(status)
            pack = self._pack_beside
            status = _next(slot)

    def serve_queued(self, mine: list[Worker], done: Callable[[list[Worker]], None]) -> None:
        """Run a request that is queued, in a thread that waits for something else.

        A stream gets a thread of its own: its next message may depend on what this one does next.
        What interrupts the main thread in a handler, such as Ctrl-C, is not for the handler alone:
        it is raised here, too. ``mine`` has this worker until another thread or ``done`` takes it.
        """
        if lib.shmrpc_next_queued(self._slot) == lib.SHMRPC_MESSAGE:
            if self._message.flags & lib.SHMRPC_FLAG_STREAM:
                self._hand_over(mine, done, "shmrpc-stream")
                return
            self._run_here()
        done(mine)

    def _hand_over(
        self, mine: list[Worker], done: Callable[[list[Worker]], None], name: str
    ) -> None:
        """Run the request that was taken in a thread of its own."""
        lib.shmrpc_disown(self._slot)
        threading.Thread(
            target=self._run_elsewhere, args=(mine, done), name=name, daemon=True
        ).start()

    def _run_here(self) -> None:
        before = enter_worker(self)
        self._thread = threading.get_ident()
        self._interruptible = threading.current_thread() is threading.main_thread()
        try:
            self._run_message()
            if self._interruption is not None:
                raise self._interruption
        finally:
            lib.shmrpc_finish(self._slot)
            self._interruption = None
            leave_worker(before)

    def _run_elsewhere(self, mine: list[Worker], done: Callable[[list[Worker]], None]) -> None:
        if not taken(mine):
            return  # who started us was interrupted meanwhile, and has ended this worker
        lib.shmrpc_adopt(self._slot)
        self._run_here()
        done([self])

    def _special(self, status: int) -> None:
        """Whatever is not a plain request."""
        if status == _MESSAGE:
            if self._message.flags == _BLOCKS:
                self._run_beside()
            else:
                self._run_message()
        elif status == _EMSGSIZE:
            self._refuse_result()
        else:
            try:
                self._poller.attend(status)
            except Error as error:
                _log.error("can't wait for requests: %s", error)
                time.sleep(_FAILED_WAIT_PAUSE)

    def _refuse_result(self) -> None:
        text = "the result is longer than the caller accepts (its max_message_bytes)"
        self._reply_error("shmrpc.MessageTooLarge", text, "RESOURCE_EXHAUSTED")

    def _run_message(self) -> None:
        """A request with keywords, a large one, a queued one, a stream, or a notification."""
        message = self._message
        size = message.body_bytes
        body = memoryview(ffi.buffer(message.body, size)) if size else memoryview(b"")
        registry = self._host.registry
        method = registry.methods[message.method]
        function = registry.functions[message.method]
        if message.flags & lib.SHMRPC_FLAG_STREAM or method.streams:
            self._run_stream(method, function, body)
            return
        args = result = _NOT_YET
        try:
            args = self._arguments(body)
            if message.flags & lib.SHMRPC_FLAG_KEYWORDS:
                result = function(*args[0], **args[1])
            else:
                result = function(*args)
            if message.kind != lib.SHMRPC_NOTIFY:
                packed, sources = self._split(result)
                alive = self._attach(sources, "the result")
                # Views of the caller's blocks go back before the reply, not after it: then its
                # next call finds them free, and still in the caches.
                args = result = ()
                sources.clear()
                self._reply(packed)
                del alive
        except BaseException as error:
            self._fail(error, args, result)

    def _run_beside(self) -> None:
        """A request whose arguments have buffers, and nothing else that is special."""
        message, registry = self._message, self._host.registry
        connection = self._poller.connection(message.conn_id)
        index = message.method
        if message.kind != _REQUEST or registry.methods[index].streams or connection is None:
            self._run_message()
            return
        args = result = _NOT_YET
        try:
            args = connection.value(self._slot, message)
            result = registry.functions[index](*args)
            body = self._pack_beside(result)
            if len(body) >= _LARGE and may_hold_large(body):
                raise NotPlain
        except BaseException as error:
            if result is not _NOT_YET and isinstance(error, NOT_PLAIN):
                args = ()
                self._reply_beside(result)
            else:
                self._fail(error, args, result)
            return
        # Views of the caller's blocks go back before the reply, not after it: then its next call
        # finds them free, and still in the caches.
        args = result = ()
        self._reply(body)

    def _arguments(self, body: memoryview) -> Any:
        message = self._message
        if not message.flags & lib.SHMRPC_FLAG_BLOCKS:
            return self._host.codec.decode(body)
        connection = self._poller.connection(message.conn_id)
        if connection is None:
            msg = f"the caller of {self._method_name()!r} is gone"
            raise Cancelled(msg)
        return connection.value(self._slot, message)

    def _attach(self, sources: Sequence[Source], what: str) -> Any:
        """Have the next message carry these buffers; what has to live until it was sent."""
        connection = self._poller.connection(self._message.conn_id) if sources else None
        if connection is None:
            return None
        deadline = self._message.deadline_ns / 1e9 or FOREVER
        what = f"{what} of {self._method_name()!r}"
        return attach(connection, self._slot, sources, deadline, what)

    def _split(self, result: Any) -> tuple[bytes, list[Source]]:
        return pack_split(self._host.codec, self._pack_beside, result, self._pack_lifted)

    def _reply_beside(self, result: Any) -> None:
        """Reply with a result that has buffers."""
        try:
            packed, sources = pack_lifted(self._pack_lifted, result)
            alive = self._attach(sources, "the result")
            self._reply(packed)
            del alive
        except BaseException as error:
            self._fail(error, (), result)

    def _reply(self, body: bytes) -> None:
        if lib.shmrpc_reply(self._slot, 0, body, len(body)) == _EMSGSIZE:
            self._refuse_result()

    # ---- streams ----

    def _run_stream(self, method: Method, function: Any, body: memoryview) -> None:
        """A call that may have messages both ways, or should have."""
        message = self._message
        if not message.flags & lib.SHMRPC_FLAG_STREAM or message.kind == lib.SHMRPC_NOTIFY:
            how = "open()" if method.requests else "stream() or open()"
            text = f"{method.name!r} takes or returns a stream of messages: call it by {how}"
            if message.kind == lib.SHMRPC_NOTIFY:
                _log.error("notification refused: %s", text)
            else:
                self._reply_error("TypeError", text, "INVALID_ARGUMENT")
            return
        claimed = self._claim_stream()
        if claimed is None:
            return
        connection, stream = claimed
        try:
            self._run_handler(method, function, body, connection, stream)
        finally:
            connection.session.requests.pop(message.call_id, None)

    def _claim_stream(self) -> tuple[Connection, Stream] | None:
        """The stream that the request has opened; None if there is nobody to serve any more."""
        message = self._message
        connection = self._poller.connection(message.conn_id)
        stream = None
        if connection is not None:
            stream = connection.session.requests.get(message.call_id)
            if stream is None:  # what announces it waits still
                self._poller.dispatch()
                stream = connection.session.requests.get(message.call_id)
        if connection is None or stream is None:
            return None  # its caller has cancelled it, or is gone
        if stream.started:
            return None  # by an earlier request of the same id, to which all that comes belongs
        stream.started = True
        return connection, stream

    def _run_handler(
        self,
        method: Method,
        function: Any,
        body: memoryview,
        connection: Connection,
        stream: Stream,
    ) -> None:
        message = self._message
        deadline = message.deadline_ns / 1e9 or FOREVER
        args = result = _NOT_YET
        try:
            args, kwargs = self._arguments(body), {}
            if message.flags & lib.SHMRPC_FLAG_KEYWORDS:
                args, kwargs = args
            if method.requests:
                args = [Requests(connection, stream, message.call_id, deadline), *args]
            outcome = function(*args, **kwargs)
            if method.generator or isinstance(outcome, Iterator):
                self._send_items(outcome, connection, stream, deadline)
                self._reply(b"")
            else:
                result = outcome
                packed, sources = self._split(result)
                alive = self._attach(sources, "the result")
                self._reply(packed)
                del alive
        except BaseException as error:
            # To a caller that has cancelled there is nothing to report.
            if not (stream.cancelled and isinstance(error, Cancelled)):
                self._fail(error, args, result)

    def _send_items(
        self, items: Iterator[Any], connection: Connection, stream: Stream, deadline: float
    ) -> None:
        """Send what a generator yields; ``Cancelled`` when the caller wants no more."""
        slot, call_id = self._slot, self._message.call_id
        pack, send = self._pack, lib.shmrpc_send_item
        expires = deadline != FOREVER
        plain = type(self._host.codec) is MsgpackCodec
        beside = False  # the last item had buffers, and so may this one
        try:
            for item in items:
                alive: Any = None  # until it was sent
                try:
                    body = self._pack_lifted(item) if beside else pack(item)
                    if len(body) >= _LARGE and plain and not beside and may_hold_large(body):
                        raise NotPlain
                except NOT_PLAIN:
                    body, alive = self._pack_item(item)
                    beside = True
                except Exception as error:
                    raise unsendable_item(self._method_name(), item, error) from error
                size = len(body)
                late = expires and time.monotonic() >= deadline
                if late or stream.cancelled or not stream.may_send():
                    self._wait_for_credit(connection, stream, deadline)
                if beside:
                    weight = lib.shmrpc_attached_weight(slot)
                    beside = weight != 0
                    size += weight
                stream.sent(size)
                status = send(slot, 0, call_id, body, len(body))
                del alive
                if status < 0:
                    self._refuse_item(connection, status, self._size_of(item))
                if beside:
                    del item  # or what it is made of is not given back
        finally:
            # GeneratorExit in the handler, unless it has ended by itself.
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _pack_item(self, item: Any) -> tuple[bytes, Any]:
        """Pack an item with buffers; waits for room for them."""
        try:
            body, sources = self._split_item(item)
        except Exception as error:
            raise unsendable_item(self._method_name(), item, error) from error
        return body, self._attach(sources, "an item")

    def _split_item(self, item: Any) -> tuple[bytes, Sequence[Source]]:
        return pack_lifted(self._pack_lifted, item)

    @staticmethod
    def _size_of(item: Any) -> int:
        body, sources = encode(item)
        return len(body) + sum(source.nbytes for source in sources)

    def _wait_for_credit(self, connection: Connection, stream: Stream, deadline: float) -> None:
        def ready() -> bool:
            return stream.cancelled or stream.may_send()

        waiters = cast("Waiters", stream.waiters)
        late = time.monotonic() >= deadline
        if late or not self._poller.wait_until(connection, waiters, ready, deadline):
            stream.cancelled = True
        if stream.cancelled:
            msg = f"{connection.peer} does not wait for {self._method_name()!r} any more"
            raise Cancelled(msg)

    def _refuse_item(self, connection: Connection, status: int, size: int) -> None:
        if status == _EMSGSIZE:
            text = f"an item of {size} bytes is longer than the caller accepts"
            text += " (its max_message_bytes)"
            raise RemoteError(text, type="shmrpc.MessageTooLarge", code="RESOURCE_EXHAUSTED")
        if status == -errno.ENOMEM:
            raise MemoryError
        self._message.cancelled = 1  # before the core has seen the end
        msg = f"lost {connection.peer} while streaming to it"
        raise Cancelled(msg)

    # ---- errors ----

    def _fail(self, error: BaseException, args: Any, result: Any) -> None:
        """Reply with what the handler raised, or what kept it from running or replying."""
        message = self._message
        self._new_packers()  # the old ones may hold half a message
        if self._interruptible and not isinstance(error, Exception):
            self._interruption = error
        if message.kind == lib.SHMRPC_NOTIFY:
            _log.error("notification %r failed", self._method_name(), exc_info=error)
            return
        try:
            self._report(error, args, result)
        except Exception:
            # An exception that can't even be described; its caller waits all the same.
            _log.exception("an error of %r resists reporting", self._method_name())
            text = f"{self._method_name()!r} raised an error that can't be described"
            self._reply_error(type(error).__name__, text, "INTERNAL")

    def _report(self, error: BaseException, args: Any, result: Any) -> None:
        connection = self._poller.connection(self._message.conn_id)
        shows = connection is not None and self._host.shows_tracebacks(connection)
        stage: Stage = "arguments" if args is _NOT_YET else "handler"
        if result is not _NOT_YET:
            stage = "result"
        self._send_failure(Failure.of(error, stage, self._method_name(), shows))

    def _method_name(self) -> str:
        message = self._message
        if not message.method_bytes:
            return ""
        return bytes(ffi.buffer(message.head, message.method_bytes)).decode("utf-8", "replace")

    def _reply_error(self, kind: str, text: str, code: str) -> None:
        self._send_failure(Failure(kind, text, code))

    def _send_failure(self, failure: Failure) -> None:
        body = failure.pack()
        if lib.shmrpc_reply(self._slot, failure.number, body, len(body)) == _EMSGSIZE:
            body = failure.pack_short()
            lib.shmrpc_reply(self._slot, failure.number, body, len(body))

    # ---- for current_call() ----

    def context(self) -> CallContext | None:
        """The call that runs now; None after an interruption that came before ``leave_worker``."""
        message = self.__dict__.get("_message")
        if message is None:
            return None
        context = self._context
        if context is None or not self._is_current(context):
            self._forget_context()
            connection = self._poller.connection(message.conn_id)
            context = CallContext(
                self,
                connection,
                message.call_id,
                self._method_name(),
                connection.credentials if connection is not None else Credentials(),
                message.deadline_ns / 1e9 if message.deadline_ns else None,
                unpack_metadata(self._request_metadata()),
            )
            context.conn_id = message.conn_id
            context.one_way = message.kind == lib.SHMRPC_NOTIFY
            self._context = context
        return context

    def _forget_context(self) -> None:
        """The call it belonged to is over; whoever keeps it must not keep the connection."""
        if self._context is not None:
            self._context.connection = None

    def _request_metadata(self) -> bytes:
        message = self._message
        size = message.metadata_bytes
        return bytes(ffi.buffer(message.head + message.method_bytes, size)) if size else b""

    def _is_current(self, context: CallContext) -> bool:
        message = self.__dict__.get("_message")  # none after the end
        if message is None:
            return False
        return (message.conn_id, message.call_id) == (context.conn_id, context.call_id)

    def _check_current(self, context: CallContext) -> None:
        if not self._is_current(context):
            msg = f"the call of {context.method!r} is over"
            raise RuntimeError(msg)

    def _check_handler(self, context: CallContext) -> None:
        self._check_current(context)
        if threading.get_ident() != self._thread:
            msg = f"the metadata of {context.method!r} is sent by the thread that runs its handler"
            raise RuntimeError(msg)

    def cancelled(self, context: CallContext) -> bool:
        """Whether the caller of this call has given up, or is gone."""
        if not self._is_current(context):
            return False
        gone = lib.shmrpc_conn_status(self._poller.c, context.conn_id) != 0
        return gone or bool(self._message.cancelled)

    def caller(self, context: CallContext) -> Any:
        """What calls the caller of this call."""
        self._check_current(context)
        if context.connection is None:
            msg = f"the caller of {context.method!r} is gone"
            raise ConnectionLost(msg, "not_sent")
        return self._host.caller_of(context.connection)

    def empty(self, context: CallContext, shape: Any, dtype: Any) -> Any:
        """An array in memory shared with the caller."""
        return loans.empty(self._lender(context), shape, dtype, context.deadline or FOREVER)

    def loan(self, context: CallContext, nbytes: int) -> memoryview:
        """Such memory as it is."""
        return loans.borrow(self._lender(context), nbytes, context.deadline or FOREVER)

    def _lender(self, context: CallContext) -> Connection:
        self._check_handler(context)
        if context.connection is None or context.connection.closed:
            msg = f"the caller of {context.method!r} is gone"
            raise ConnectionLost(msg, "not_sent")
        return context.connection

    def set_metadata(self, context: CallContext) -> None:
        """Send the reply with the context's metadata."""
        self._check_handler(context)
        streams = self._message.flags & lib.SHMRPC_FLAG_STREAM
        initial = {} if streams else context.initial_metadata or {}
        packed = pack_reply_metadata(context.trailing_metadata, initial)
        if lib.shmrpc_reply_metadata(self._slot, packed, len(packed)) < 0:
            raise MemoryError

    def send_initial(self, context: CallContext) -> None:
        """Send the context's initial metadata: at once to a caller that has a stream."""
        self._check_handler(context)
        if not self._message.flags & lib.SHMRPC_FLAG_STREAM:
            self.set_metadata(context)
            return
        packed = pack_metadata(context.initial_metadata)
        position = ffi.new("uint64_t *")
        lib.shmrpc_send(
            self._slot,
            lib.SHMRPC_INITIAL,
            0,
            context.call_id,
            ffi.NULL,
            0,
            packed,
            len(packed),
            b"",
            0,
            0,
            position,
        )


def taken(mine: list[Worker]) -> list[Worker]:
    """What nobody else has taken out before: at once, whatever other threads do."""
    try:
        return [mine.pop()]
    except IndexError:
        return []


class InlineWorkers:
    """Workers for threads that wait on a client's poller and serve requests meanwhile."""

    def __init__(self, host: Host, poller: Poller) -> None:
        self._host = host
        self._poller = weakref.ref(poller)  # which keeps us, and its descriptors stay as long as it
        self._free: list[Worker] = []
        self._lock = threading.Lock()
        self._ended = False

    def serve(self) -> None:
        """Run what is queued in this thread."""
        with self._lock:
            worker = self._free.pop() if self._free else None
        if worker is None:
            poller = self._poller()
            if poller is None:
                return
            worker = self._new(poller)
        # An interruption (Ctrl-C) may come when the worker is another thread's already, or free
        # again. So it belongs to whoever takes it out of this list, and nobody else touches it.
        mine = [worker]
        try:
            worker.serve_queued(mine, self._take_back)
        except BaseException:
            for worker in taken(mine):
                worker.end()
            raise

    def _new(self, poller: Poller) -> Worker:
        return Worker(self._host, poller)

    def _take_back(self, mine: list[Worker]) -> None:
        with self._lock:
            if not self._ended:
                self._free += taken(mine)
                return
        for worker in taken(mine):
            worker.end()

    def end(self) -> None:
        """The connection has ended: there will be nothing to run."""
        with self._lock:
            self._ended = True
            free, self._free = self._free, []
        for worker in free:
            worker.end()
