"""Running handlers in an event loop: each call a task, plain functions on threads or inline."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import inspect
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from shmrpc._native import lib
from shmrpc.bytestream import refuse
from shmrpc.codec import PACKING_ERRORS, MsgpackCodec, pack_split
from shmrpc.context import enter_task, leave_task
from shmrpc.errors import (
    STATUS_NUMBERS,
    Cancelled,
    MessageTooLarge,
    RemoteError,
)
from shmrpc.failures import Failure, call_checked, unsendable_item
from shmrpc.parcels import Parcel
from shmrpc.poller import FOREVER, Connection, Running, metadata_of
from shmrpc.session import Stream
from shmrpc.values import LARGE, NOT_PLAIN, NotPlain, may_hold_large

from .calls import send_item
from .eager import start_task, starter_of
from .incoming import Host, Incoming
from .lending import meet_all, meet_now
from .loop import LoopPoller, LoopWaiters, decoder_of, poller_of
from .pending import NO_VALUE
from .replies import Replies
from .requests import AsyncRequests, ThreadRequests, wait_for_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from shmrpc.codec import Codec
    from shmrpc.failures import Stage
    from shmrpc.lending import Steps
    from shmrpc.registry import Method, Registry

__all__ = ["Handlers"]

_log = logging.getLogger("shmrpc.server")

_THREADS = 16
_CANCEL_SECONDS = 1.0  # that cancelled handlers get to end
_NO_KEYWORDS: dict[str, Any] = {}
# After a coroutine function had to wait, so many calls of it get a task without trying.
_WAITS = 32
_EMSGSIZE = -errno.EMSGSIZE
_send_reply = lib.shmrpc_send_reply
_NOTIFY = lib.SHMRPC_NOTIFY
_STREAM, _KEYWORDS = lib.SHMRPC_FLAG_STREAM, lib.SHMRPC_FLAG_KEYWORDS
_OVERLOADED = STATUS_NUMBERS["RESOURCE_EXHAUSTED"]
_UNIMPLEMENTED = STATUS_NUMBERS["UNIMPLEMENTED"]
_CANCELLED = STATUS_NUMBERS["CANCELLED"]


class Handlers(Replies):
    """The methods of one side, and their calls under way."""

    def __init__(
        self,
        host: Host,
        registry: Registry,
        max_concurrency: int,
        codec: Codec,
        chain: Callable[[Method, Any], Any] | None = None,
        *,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
    ) -> None:
        """``chain`` runs a method through interceptors: ``await chain(method, final)(a, kw)``.

        Handlers begin in copies of ``context``, not in what is set where somebody woke the poller.
        """
        super().__init__(host, codec)
        self.registry = registry
        self._max = max_concurrency
        self._chain = chain
        self._running: dict[tuple[int, int], Incoming] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._loop = loop
        self._thread = threading.get_ident()
        self._decode = decoder_of(codec)
        self._methods = registry.methods
        self._context = context
        self._starter = starter_of(self._loop, self._context)
        self._waits: dict[int, int] = {}  # by method: calls that get a task at once

    def serve(self, poller: LoopPoller) -> None:
        """Take the requests that come on this poller."""
        self._poller = poller
        self.registry.bind(poller)
        poller.serve_requests(self._take, self._take_plain, self.cancel, self.close)

    def serve_one(self, connection: Connection) -> None:
        """Be ready for requests on this connection, whose poller has others beside it."""
        self._poller = poller_of(connection)
        self.registry.bind(self._poller)

    def leave(self, poller: LoopPoller | None) -> None:
        """Take none of this one any more, which is about to be closed."""
        if self._poller is poller:
            self._poller = None
            self.registry.bind(None)

    @property
    def running(self) -> int:
        """How many calls are under way."""
        return len(self._running)

    def under_way(self) -> list[Running]:
        """The calls that have not ended. For any thread, also while the loop is blocked."""
        calls = list(self._running.values())
        inside = self._inside()
        if inside is not None and inside not in calls:
            calls.append(inside)
        return [
            Running(
                call.method.name if call.method is not None else "",
                call.started_at,
                call.connection.peer_pid,
                (call.connection.conn_id, call.call_id),
            )
            for call in calls
        ]

    def _inside(self) -> Incoming | None:
        """The call that has no task, whose handler the loop's thread is in just now.

        Found on that thread's stack, so that calls need take no note of it.
        """
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            if frame.f_code in _DIRECT:
                call: Incoming | None = frame.f_locals.get("call")
                return call
            frame = frame.f_back
        return None

    async def stop(self, grace: float) -> None:
        """Let what runs end within ``grace`` seconds, then cancel it.

        Cancelling this ends the grace and leaves no handler behind.
        """
        current = asyncio.current_task()
        calls = [call for call in self._running.values() if call.task is not current]
        tasks = [call.task for call in calls if call.task is not None]
        try:
            if tasks and grace > 0:
                await asyncio.wait(tasks, timeout=grace)
        finally:
            try:
                await self._cancel_all(calls, tasks)
            finally:
                self._let_go()
        await asyncio.sleep(0)  # what was kept ready ends

    async def _cancel_all(self, calls: list[Incoming], tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        for call in calls:
            if call.stream is not None:
                call.stream.cancel()  # a thread may wait for the caller's next message
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
        stuck = sum(not task.done() for task in tasks)
        if stuck:
            _log.warning("%d handlers go on, although they were cancelled", stuck)

    def _let_go(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        self.leave(self._poller)
        if self._starter is not None:
            self._starter.close()
            self._starter = None

    def meet(self, call: Incoming, steps: Steps[Any]) -> Any:
        """Do what the handler of this call needs: awaitable if that is asynchronous."""
        if asyncio._get_running_loop() is not self._loop:  # it runs on a thread
            return wait_for_loop(self._loop, lambda: meet_all(call.connection, steps))
        if call.method is not None and call.method.inline and not call.method.is_async:
            return meet_now(call.connection, steps)
        return meet_all(call.connection, steps)

    # ---- what comes ----

    def _take(
        self, connection: Connection, message: Any, body: bytes | Parcel
    ) -> Callable[[], None]:
        """A request is there (the poller's lock is held)."""
        index = message.method
        return self._admit(connection, message, body, self._methods[index] if index >= 0 else None)

    def take(
        self, connection: Connection, message: Any, body: bytes | Parcel, name: str
    ) -> Callable[[], None]:
        """The same for the method of this name."""
        return self._admit(connection, message, body, self.registry.find(name))

    def _admit(
        self,
        connection: Connection,
        message: Any,
        body: bytes | Parcel,
        method: Method | None,
    ) -> Callable[[], None]:
        call = Incoming(self, connection, message.call_id, method)
        call.kind, call.flags, call.deadline_ns = message.kind, message.flags, message.deadline_ns
        call.packed_metadata = metadata_of(message)
        call.body = body
        if call.flags & _STREAM:
            ended = bool(call.flags & lib.SHMRPC_FLAG_ENDED)
            call.stream = Stream(LoopWaiters(self._loop), ended=ended)
            connection.session.opened(call.call_id, call.stream)
            call.stream.started = True
        return lambda: self._start(call)

    def take_plain(
        self,
        connection: Connection,
        call_id: int,
        deadline_ns: int,
        name: str,
        flags: int,
        value: Any,
        body: bytes | None,
    ) -> None:
        """A request for the method of this name is there, which has nothing but arguments."""
        index = self.registry.number(name)
        if index is None:
            refuse(connection, call_id)
        else:
            self._take_plain(connection, call_id, deadline_ns, index, flags, value, body)

    def _take_plain(
        self,
        connection: Connection,
        call_id: int,
        deadline_ns: int,
        index: int,
        flags: int,
        value: Any,
        body: bytes | None,
    ) -> None:
        """A request is there that has nothing but arguments: a value, or a body that is none."""
        method = self._methods[index]
        call = Incoming(self, connection, call_id, method)
        if flags:
            call.flags = flags
        if deadline_ns:
            call.deadline_ns = deadline_ns
        if not method.direct or self._chain is not None or len(self._running) >= self._max:
            call.value, call.body = value, body or b""
            self._start(call)
            return
        if body is not None or not method.is_async:
            call.value, call.body = value, body or b""
            self._run_inline(call, method)
            return
        starter = self._starter
        if starter is None or self._waits.get(index):
            if starter is not None:
                self._waits[index] -= 1
            call.value = value
            call.started_at = time.monotonic()
            self._running[connection.conn_id, call_id] = call
            # The task calls the function: if it is cancelled before that, no coroutine is left.
            call.task = start_task(self._loop, self._context, self._run(call, method))
            return
        stage: Stage = "arguments"
        try:
            args, kwargs = value if flags else (value, _NO_KEYWORDS)
            stage = "handler"
            coroutine = method.function(*args, **kwargs)
        except Exception as error:
            self._fail(call, error, stage)
            return
        awaited = starter.step(call, coroutine)
        work = starter.work
        if awaited is not work:
            self._waits[index] = _WAITS
            call.started = True
            call.started_at = time.monotonic()
            self._running[connection.conn_id, call_id] = call
            call.task = starter.adopt(lambda rest: self._run(call, method, rest), awaited)
            return
        work.source = None
        if work.error is not None:
            raised, work.error = work.error, None
            if isinstance(raised, asyncio.CancelledError):
                self._end(call, _CANCELLED)
            else:
                self._fail(call, raised, "handler")
            return
        # As _reply, for a short result of a call that nothing unusual happened to.
        result, work.result = work.result, None
        try:
            reply = self._pack(result)
        except Exception:
            self._reply(call, result)  # again, and does what is to be done then
            return
        slots = connection.slots
        usual = not (call.reply_metadata or call.cancelled_by_caller or connection.closed)
        if usual and len(reply) < LARGE and slots:
            call.replied = True
            if _send_reply(slots[-1].c, call_id, reply, len(reply)) == _EMSGSIZE:
                self._refuse_result(call)
        else:
            self._reply(call, result)

    def cancel(self, connection: Connection, call_id: int) -> None:
        """The caller has given up."""
        call = self._running.get((connection.conn_id, call_id))
        if call is not None:
            self._abort(call)

    def close(self, connection: Connection) -> None:
        """The callers of this connection have gone."""
        for call in list(self._running.values()):
            if call.connection is connection:
                self._abort(call)

    def _abort(self, call: Incoming) -> None:
        call.cancelled_by_caller = True
        if call.stream is not None:
            call.stream.cancel()
        if call.task is not None:
            call.task.cancel()
            if not call.started:
                self._forget(call)  # a task that is cancelled before its first step never runs

    # ---- running ----

    def _start(self, call: Incoming) -> None:
        method = call.method
        if method is None:
            self._end(call, _UNIMPLEMENTED)
        elif len(self._running) >= self._max:
            self._end(call, _OVERLOADED)
        elif method.streams and (call.stream is None or call.kind == _NOTIFY):
            how = "open()" if method.requests else "stream() or open()"
            text = f"{method.name!r} takes or returns a stream of messages: call it by {how}"
            self._fail_with(call, Failure("TypeError", text, "INVALID_ARGUMENT"))
        elif method.inline and self._chain is None and not method.streams:
            self._run_inline(call, method)
        else:
            call.started_at = time.monotonic()
            self._running[call.connection.conn_id, call.call_id] = call
            call.task = start_task(self._loop, self._context, self._run(call, method))

    def _run_inline(self, call: Incoming, method: Method) -> None:
        self._context.copy().run(self._run_here, call, method)

    def _run_here(self, call: Incoming, method: Method) -> None:
        token = enter_task(call)
        stage: Stage = "arguments"
        try:
            args, kwargs = self._arguments(call)
            stage = "handler"
            result = method.function(*args, **kwargs)
        except Exception as error:
            self._fail(call, error, stage)
        else:
            self._reply(call, result)
        finally:
            leave_task(token)

    def _reply(self, call: Incoming, result: Any) -> None:
        """Send the result of a call that no task runs."""
        connection = call.connection
        try:
            body = self._pack(result)
            large = len(body) >= LARGE and may_hold_large(body)
        except NOT_PLAIN:
            body, large = b"", True
        except Exception as error:
            self._fail(call, error, "result")
            return
        if large and type(self._codec) is MsgpackCodec:
            self._running[connection.conn_id, call.call_id] = call
            call.task = start_task(self._loop, self._context, self._finish(call, result))
            return
        unusual = call.reply_metadata or call.replied or call.cancelled_by_caller
        if unusual or connection.closed or call.kind == _NOTIFY:
            self._end(call, 0, body)
            return
        call.replied = True
        slot = connection.slot()
        sent = _send_reply(slot.c, call.call_id, body, len(body))
        connection.slots.append(slot)
        if sent == _EMSGSIZE:
            self._refuse_result(call)

    async def _finish(self, call: Incoming, result: Any) -> None:
        """Send a result with buffers of a call that no task runs: it may have to wait for room."""
        call.started = True
        try:
            held = [result]
            del result
            await self._end_beside(call, held)
        except asyncio.CancelledError:
            self._end(call, _CANCELLED)
            if not call.cancelled_by_caller:
                raise
        except Exception as error:
            self._fail(call, error, "result")
        finally:
            self._forget(call)

    async def _run(
        self, call: Incoming, method: Method, called: Awaitable[Any] | None = None
    ) -> None:
        """``called``: the method was called with its arguments, this is what it returned."""
        call.started = True
        enter_task(call)
        stage: Stage = "arguments"
        try:
            if called is None:
                args, kwargs = self._arguments(call)
                stage = "handler"
                if method.requests and call.stream is not None:
                    args = [self._requests(call, call.stream, method), *args]
                if self._chain is not None and not method.name.startswith("shmrpc."):
                    called = self._chain(method, self._invoke)(args, kwargs)
                elif method.is_async and not method.generator:
                    called = method.function(*args, **kwargs)
                else:
                    called = self._invoke(method, args, kwargs)
            stage = "handler"
            result = await called
            if method.generator and call.stream is not None:
                await self._send_items(result, call, call.stream)
                self._end(call, 0, b"")
            else:
                stage = "result"
                try:
                    body = self._pack(result)
                    plain = type(self._codec) is MsgpackCodec
                    if len(body) >= LARGE and plain and may_hold_large(body):
                        raise NotPlain
                except NOT_PLAIN:
                    held = [result]
                    args, kwargs, result, called = (), {}, None, None
                    await self._end_beside(call, held)
                else:
                    self._end(call, 0, body)
        except asyncio.CancelledError:
            # By the caller, who waits no more, or because we are stopping.
            self._end(call, _CANCELLED)
            if not call.cancelled_by_caller:
                raise
        except Exception as error:
            if not (call.cancelled_by_caller and isinstance(error, Cancelled)):
                self._fail(call, error, stage)
        finally:
            self._forget(call)

    def _arguments(self, call: Incoming) -> tuple[Any, dict[str, Any]]:
        body, call.body = call.body, b""
        if call.value is not NO_VALUE:
            args, call.value = call.value, NO_VALUE
        elif isinstance(body, Parcel):
            args = call.connection.decode(body)
        else:
            args = self._decode(body)
        if call.flags & _KEYWORDS:
            return args[0], args[1]
        return args, {}

    async def _invoke(self, method: Method, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the function, where it belongs; a generator function gives its generator."""
        if method.generator or (method.inline and not method.is_async):
            return call_checked(method.function, args, kwargs)
        if method.is_async:
            return await call_checked(method.function, args, kwargs)
        try:
            inspect.signature(method.function).bind(*args, **kwargs)
        except TypeError as error:
            text, code = str(error), "INVALID_ARGUMENT"
            raise RemoteError(text, type="TypeError", code=code) from None
        except ValueError:
            pass  # a builtin without a signature
        return await self._in_thread(method.function, *args, **kwargs)

    async def _in_thread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="shmrpc-handler")
        context = contextvars.copy_context()
        return await self._loop.run_in_executor(
            self._executor, lambda: context.run(function, *args, **kwargs)
        )

    # ---- streams ----

    def _requests(self, call: Incoming, stream: Stream, method: Method) -> Any:
        requests = AsyncRequests(call, stream)
        return requests if method.is_async else ThreadRequests(requests, self._loop)

    async def _send_items(self, items: Any, call: Incoming, stream: Stream) -> None:
        source = items if hasattr(items, "__aiter__") else self._from_thread(items)
        deadline = call.deadline if call.deadline is not None else FOREVER

        def may_send() -> bool:
            return stream.may_send() or stream.cancelled

        try:
            async for item in source:
                try:
                    status = await send_item(
                        call.connection, stream, call.call_id, 0, item, may_send, deadline
                    )
                except PACKING_ERRORS as error:
                    name = call.method.name if call.method is not None else ""
                    raise unsendable_item(name, item, error) from error
                if status == _EMSGSIZE:
                    peer = call.connection.peer
                    body, sources = pack_split(self._codec, self._pack, item)
                    size = len(body) + sum(source.nbytes for source in sources)
                    msg = f"an item of {size} bytes is longer than {peer} accepts"
                    raise MessageTooLarge(msg)
                if status < 0 or stream.cancelled:
                    call.cancelled_by_caller = True
                    msg = f"{call.connection.peer} does not wait for this call any more"
                    raise Cancelled(msg)
        finally:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()

    async def _from_thread(self, items: Iterator[Any]) -> AsyncIterator[Any]:
        """A plain generator, each step of it on a thread."""
        end = object()
        try:
            while True:
                item = await self._in_thread(next, items, end)
                if item is end:
                    return
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await self._in_thread(close)

    # ---- the end of a call ----

    def _forget(self, call: Incoming) -> None:
        self._running.pop((call.connection.conn_id, call.call_id), None)
        if call.stream is not None:
            call.connection.session.requests.pop(call.call_id, None)
        call.task = None


# Where the loop's thread is in a handler that has no task; each has the call as a local.
_DIRECT = frozenset({Handlers._take_plain.__code__, Handlers._run_here.__code__})
