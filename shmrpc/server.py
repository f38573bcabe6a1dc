"""The synchronous server: methods, worker threads, listening, draining.

Workers take requests from the core one at a time: one C call sends the last reply and waits for
the next request. Which thread reads while another runs a long handler is the core's business
(csrc/workers.c); this module starts threads when the core asks for them. One more thread, the
acceptor, makes new connections; a client that is slow at it holds up nobody.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import selectors
import signal
import socket
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

from msgpack import unpackb

from . import address as addresses
from . import handshake, segments
from ._native import ffi, lib
from .codec import Codec, MsgpackCodec
from .context import CallContext, enter_worker
from .errors import STATUS_NUMBERS, ConnectError, Error, ForkedError, RemoteError
from .link import Wait, check_options, forget_descriptors, make_name, new_poller
from .metadata import unpack_metadata
from .proxy import public_methods
from .rendezvous import Credentials, Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType, TracebackType

    from .segments import Backing

__all__ = ["Server"]

F = TypeVar("F", bound="Callable[..., Any]")

_log = logging.getLogger("shmrpc.server")

_HANDSHAKE_SECONDS = 5.0
_HANDSHAKES_MAX = 1024
_ACCEPT_PAUSE = 0.05
_EMSGSIZE = -errno.EMSGSIZE
_TRACEBACK_MAX = 32768

_next = lib.shmrpc_next
_reply_next = lib.shmrpc_reply_next


class Server:
    """Serves methods at one or several addresses.

    ``workers`` handlers run at a time, on as many threads. ``max_concurrency`` calls may run or
    wait for a worker; the next is refused with ``Overloaded``. ``show_tracebacks`` is whether
    callers see a handler's traceback: by default those of our own uid do.

    Methods may be added from any thread at any time. A server made before a fork raises
    ``ForkedError`` in the child.
    """

    def __init__(
        self,
        *address: str,
        workers: int = 16,
        max_concurrency: int = 1024,
        max_message_bytes: int = 64 << 20,
        backing: Backing = "auto",
        allow_uids: Iterable[int] = (),
        show_tracebacks: bool | None = None,
        wait: Wait = "auto",
        spin_budget: float | None = None,
        codec: Codec | None = None,
    ) -> None:
        """Make a server that listens from ``start`` on; ``ConnectError`` for a bad address."""
        check_options(max_message_bytes, backing, wait, spin_budget)
        if not address:
            msg = "Server() needs at least one address, such as Server('calc')"
            raise ValueError(msg)
        if workers < 1 or max_concurrency < 1:
            msg = "workers and max_concurrency must be at least 1"
            raise ValueError(msg)
        uids = frozenset(allow_uids)
        self._terms = [
            handshake.Terms(
                addresses.parse(text), max_message_bytes, backing=backing, allow_uids=uids
            )
            for text in address
        ]
        self._workers = workers
        self._max_concurrency = max_concurrency
        self._show_tracebacks = show_tracebacks
        self._wait: Wait = wait
        self._spin_budget = spin_budget
        self.codec: Codec = codec if codec is not None else MsgpackCodec()
        self._lock = threading.Lock()
        self.functions: list[Callable[..., Any]] = []
        self._indexes: dict[str, int] = {}
        self._forked = False
        self._poller: Any = None
        self._acceptor: _Acceptor | None = None
        self._threads: list[threading.Thread] = []
        self.peers: dict[int, Credentials] = {}
        _servers.add(self)

    # ---- methods ----

    @overload
    def method(self, function: F, /) -> F: ...
    @overload
    def method(self, /, *, name: str | None = None) -> Callable[[F], F]: ...
    def method(self, function: Any = None, /, *, name: str | None = None) -> Any:
        """Offer a function to callers, under its own name or ``name``. Use it as a decorator.

        Registering a name again replaces the method.
        """
        if function is None:
            return lambda wrapped: self._add(wrapped, name)
        return self._add(function, name)

    def _add(self, function: Any, name: str | None) -> Any:
        if not callable(function):
            msg = f"a method must be callable, not {function!r}"
            raise TypeError(msg)
        name = function.__name__ if name is None else name
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            msg = f"method {name!r} is async; a synchronous Server can't run it"
            raise TypeError(msg)
        make_name(name)
        with self._lock:
            index = len(self.functions)
            self.functions.append(function)
            self._indexes[name] = index
            if self._poller is not None:
                self._add_to_core(name, index)
        return function

    def _add_to_core(self, name: str, index: int) -> None:
        text = name.encode()
        if lib.shmrpc_method_add(self._poller, text, len(text), index, 1) < 0:
            raise MemoryError

    def add_service(self, service: object, prefix: str = "") -> None:
        """Offer every public method of an object, with ``prefix`` before its name."""
        names = public_methods(service)
        if not names:
            msg = f"{service!r} has no public methods"
            raise ValueError(msg)
        for name in names:
            self._add(getattr(service, name), prefix + name)

    # ---- running ----

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports that the system chose. Empty when it does not."""
        return self._acceptor.addresses if self._acceptor is not None else []

    def start(self) -> None:
        """Listen and serve in threads of its own; ``ConnectError`` if an address is taken."""
        self._check_usable()
        with self._lock:
            if self._poller is not None:
                msg = "the server is running already"
                raise Error(msg)
            segments.sweep()
            acceptor = _Acceptor(self, self._terms)
            try:
                self._poller = new_poller(
                    self._workers, self._max_concurrency, self._wait, self._spin_budget
                )
                for name, index in self._indexes.items():
                    self._add_to_core(name, index)
            except BaseException:
                acceptor.close()
                self._poller = None
                raise
            self._acceptor = acceptor
        for _ in range(2):  # one to lead, one to stand by
            self.spawn_worker(self._poller)
        acceptor.start()

    def spawn_worker(self, poller: Any) -> None:
        """Start another worker thread; the core asks for it, up to one more than ``workers``."""
        if poller is not self._poller:
            return  # it is stopping
        worker = _Worker(self, poller)
        thread = threading.Thread(
            target=worker.run, name=f"shmrpc-worker-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def stop(self, grace: float = 5.0) -> None:
        """Stop: refuse new calls, let those under way end within ``grace`` seconds, hang up.

        Safe to call twice and from any thread but a handler's.
        """
        self._check_usable()
        with self._lock:
            poller, acceptor = self._poller, self._acceptor
            if poller is None or acceptor is None:
                return
            self._poller = self._acceptor = None
        acceptor.close()
        lib.shmrpc_poller_drain(poller)
        deadline = time.monotonic() + grace
        while _busy(poller) and time.monotonic() < deadline:
            time.sleep(0.002)
        lib.shmrpc_poller_stop(poller)
        patience = time.monotonic() + 1.0
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, patience - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            _log.warning("handlers still run after the grace of %g s: %s", grace, stuck)
        self._threads = []
        for conn_id in list(self.peers):
            lib.shmrpc_conn_shutdown(poller, conn_id)
        self.peers.clear()

    def serve_forever(self) -> None:
        """Start, and serve until SIGTERM or SIGINT; then stop with the usual grace.

        In a thread other than the main one it serves until somebody calls ``stop``.
        """
        in_main = threading.current_thread() is threading.main_thread()
        with _StopSignals() if in_main else contextlib.nullcontext() as signals:
            try:
                if self._poller is None:
                    self.start()
                if signals is not None:
                    signals.wait()
                for thread in list(self._threads) if signals is None else ():
                    thread.join()
            finally:
                self.stop()

    def __enter__(self) -> Server:
        if self._poller is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stats(self) -> dict[str, int]:
        """Counters of the server: calls, connections, spins, sleeps, wake-ups sent."""
        self._check_usable()
        poller = self._poller
        if poller is None:
            return {}
        counters = ffi.new("shmrpc_stats *")
        lib.shmrpc_poller_stats(poller, counters)
        return {name: int(getattr(counters, name)) for name in dir(counters)}

    # ---- what workers and the acceptor need ----

    def add_connection(self, agreement: handshake.Agreement) -> None:
        """Serve a new connection from now on."""
        poller = self._poller
        if poller is None:
            agreement.close()
            return
        credentials = agreement.credentials
        if credentials.pid < 0:
            credentials = Credentials(agreement.peer_pid)
        self.peers[agreement.add(poller)] = credentials

    def shows_tracebacks(self, conn_id: int) -> bool:
        """Whether this peer sees tracebacks."""
        if self._show_tracebacks is not None:
            return self._show_tracebacks
        peer = self.peers.get(conn_id)
        return peer is not None and peer.uid == os.geteuid()

    def _check_usable(self) -> None:
        if self._forked:
            msg = "this server was made before the fork and belongs to the parent; make a new one"
            raise ForkedError(msg)

    def _forget(self) -> None:
        """In a forked child: let go of what the parent serves."""
        self._forked = True
        if self._acceptor is not None:
            self._acceptor.close_inherited()
        if self._poller is not None:
            forget_descriptors(self._poller)


def _busy(poller: Any) -> bool:
    counters = ffi.new("shmrpc_stats *")
    lib.shmrpc_poller_stats(poller, counters)
    return bool(counters.running or counters.queued or counters.outbox_bytes)


class _StopSignals:
    """SIGTERM and SIGINT as something to wait for, without a moment in which one is missed."""

    def __enter__(self) -> _StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Do nothing: the wakeup descriptor has the number."""

    def wait(self) -> None:
        """Sleep until one of them comes, or has come since we entered."""
        while not set(self._reader.recv(64)) & set(self._before):
            pass

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()


# ---- workers ----

_NOT_YET: Any = object()  # what a request has not come to when it fails


class _Worker:
    """One thread that runs handlers."""

    def __init__(self, server: Server, poller: Any) -> None:
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
                    self._server.peers.pop(self._message.conn_id, None)
        elif status == _EMSGSIZE:
            text = "the result is longer than the caller accepts (its max_message_bytes)"
            self._reply_error("shmrpc.MessageTooLarge", text, "RESOURCE_EXHAUSTED")
        else:
            _log.error("waiting for requests failed: %s", os.strerror(-status))
            time.sleep(_ACCEPT_PAUSE)
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
            peer = self._server.peers.get(message.conn_id, Credentials())
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


# ---- accepting ----


class _Acceptor:
    """The thread that makes new connections, any number at a time."""

    def __init__(self, server: Server, terms: list[handshake.Terms]) -> None:
        self._server = server
        self._listeners: list[Listener] = []
        self._terms: dict[int, handshake.Terms] = {}
        self._pending: dict[int, tuple[handshake.Steps, socket.socket, float]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="shmrpc-acceptor", daemon=True)
        self._closing = False
        self._selector.register(self._wake_receive, selectors.EVENT_READ)
        try:
            for term in terms:
                listener = Listener(term.address, for_others=bool(term.allow_uids))
                self._listeners.append(listener)
                self._terms[listener.socket.fileno()] = term
                self._selector.register(listener.socket, selectors.EVENT_READ)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        return [str(listener.address) for listener in self._listeners]

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and give up handshakes under way."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake_send.send(b"x")
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for steps, _, _ in self._pending.values():
            steps.close()
        self._pending.clear()
        for listener in self._listeners:
            listener.close()
        self._close_own()

    def close_inherited(self) -> None:
        """In a forked child: close without taking the addresses from the parent."""
        for listener in self._listeners:
            listener.close_inherited()
        for _, sock, _ in self._pending.values():
            sock.close()
        self._close_own()

    def _close_own(self) -> None:
        self._selector.close()
        self._wake_receive.close()
        self._wake_send.close()

    def _run(self) -> None:
        while not self._closing:
            deadline = min((entry[2] for entry in self._pending.values()), default=None)
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            for key, _ in self._selector.select(timeout):
                fd = key.fd
                if fd in self._terms:
                    self._accept(key.fileobj, self._terms[fd])  # type: ignore[arg-type]
                elif fd in self._pending:
                    self._advance(fd)
            self._give_up_late()

    def _accept(self, listener: socket.socket, terms: handshake.Terms) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # No descriptors left, mostly: the client waits in the queue until there are some.
            _log.warning("can't accept at %s: %s", terms.address, error.strerror)
            time.sleep(_ACCEPT_PAUSE)
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self._pending) >= _HANDSHAKES_MAX:
            sock.close()
            return
        fd = sock.fileno()
        until = time.monotonic() + _HANDSHAKE_SECONDS
        self._pending[fd] = (handshake.server_side(sock, terms), sock, until)
        self._selector.register(sock, selectors.EVENT_READ)
        self._advance(fd)

    def _advance(self, fd: int) -> None:
        steps, sock, _ = self._pending[fd]
        try:
            next(steps)
        except StopIteration as stop:
            self._forget(fd)
            try:
                self._server.add_connection(stop.value)
            except ConnectError as error:
                stop.value.close()
                _log.warning("connection refused: %s", error)
        except ConnectError as error:
            self._forget(fd, closed=sock.fileno() < 0)
            _log.info("handshake failed: %s", error)
        except OSError as error:
            self._forget(fd, closed=sock.fileno() < 0)
            _log.warning("handshake failed: %s", error)

    def _forget(self, fd: int, *, closed: bool = False) -> None:
        """Stop watching a handshake's socket; a closed one has left epoll by itself."""
        del self._pending[fd]
        key = self._selector.get_map().get(fd)
        if key is not None:
            with contextlib.suppress(OSError, ValueError):
                self._selector.unregister(fd if closed else key.fileobj)

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for fd, (steps, sock, until) in list(self._pending.items()):
            if now >= until:
                self._forget(fd)
                steps.close()  # closes the socket
                _log.info("a client connected and did not finish its handshake in time")
                _ = sock


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
