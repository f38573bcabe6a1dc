"""Making new connections: one thread that runs any number of handshakes at a time.

It also answers those who ask about the server (inquiries.py). Where several processes accept from
one socket, the one with the fewest connections does (sharing.py).
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import selectors
import socket
import threading
import time
from typing import Protocol

from . import handover, handshake, sharing
from .errors import ConnectError
from .inquiries import Answerer, Inquiries
from .rendezvous import Listener

__all__ = ["Acceptor"]

_log = logging.getLogger("shmrpc.acceptor")

_HANDSHAKE_SECONDS = 5.0
_HANDSHAKES_MAX = 1024
_ACCEPT_PAUSE = 0.05


class Host(Protocol):
    """The server, as far as its acceptor needs it."""

    def add_connection(self, agreement: handshake.Agreement) -> None: ...


class Acceptor:
    """The thread that makes new connections, any number at a time."""

    def __init__(
        self, server: Host, terms: list[handshake.Terms], answerer: Answerer | None = None
    ) -> None:
        """``answerer`` is who is asked about the server; without one nobody is."""
        self._server = server
        self._listeners: list[Listener] = []
        self._terms: dict[int, handshake.Terms] = {}
        self._pending: dict[int, tuple[handshake.ServerSteps, socket.socket, float]] = {}
        self._selector = selectors.DefaultSelector()
        self._inquiries = Inquiries(self._selector, answerer)
        self._wake_receive, self._wake_send = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="shmrpc-acceptor", daemon=True)
        self._closing = self._retiring = False
        self.succeeded = False  # the addresses are a successor's
        self._retired = threading.Event()
        self._sharing: sharing.Sharing | None = None
        self._made = self._ended = 0  # connections
        self._turn: float | None = None  # when we accept, though others have fewer
        self._paused_until: float | None = None  # not looking at the listening sockets
        self._handed: collections.deque[handshake.Inquiry] = collections.deque()
        self._selector.register(self._wake_receive, selectors.EVENT_READ)
        try:
            for term in terms:
                listener = Listener(term.address, for_others=bool(term.allow_uids))
                self._listeners.append(listener)
                self._terms[listener.socket.fileno()] = term
                self._selector.register(listener.socket, selectors.EVENT_READ)
            handover.check_claimed(self.addresses)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return [str(listener.address) for listener in self._listeners]

    def start(self) -> None:
        """Accept from now on."""
        shared = [listener.sharing for listener in self._listeners if listener.sharing is not None]
        if shared:
            self._sharing = shared[0]
            self._sharing.inspect = self._hand
            self._publish()
        self._thread.start()

    def workers(self) -> list[int]:
        """The pids of all processes that accept from these sockets; none if we are the only one."""
        return self._sharing.pids() if self._sharing is not None else []

    def connection_ended(self) -> None:
        """One that was made has ended. Never called twice at a time."""
        self._ended += 1
        self._publish()

    def _publish(self) -> None:
        if self._sharing is not None and not self._retiring:
            self._sharing.publish(self._made - self._ended + len(self._pending))

    def _hand(self, sock: socket.socket, request_bytes: int) -> None:
        """From another worker's acceptor, and another thread: somebody who asks about this one."""
        self._handed.append(handshake.Inquiry(sock, 0, request_bytes))
        self._wake()

    def descriptors(self) -> list[tuple[str, int]]:
        """What a successor has to inherit."""
        return [pair for listener in self._listeners for pair in listener.descriptors()]

    def announce(self) -> None:
        """Make known that it is this process that serves: a successor has failed."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.announce()

    def retire(self, patience: float, *, succeeded: bool = False) -> None:
        """Listen no more, and give handshakes under way ``patience`` seconds to end.

        Also who was accepted in the last moment is served so. Those that take longer go on until
        ``close``. The addresses are removed, or left to a successor.
        """
        self.succeeded = self.succeeded or succeeded
        self._retiring = True
        if self._sharing is not None:
            self._sharing.retire()
        self._wake()
        self._retired.wait(patience)

    def close(self) -> None:
        """Stop accepting, and give up handshakes under way."""
        self._closing = True
        self._wake()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for steps, _, _ in self._pending.values():
            steps.close()
        self._pending.clear()
        self._inquiries.close()
        self._close_listeners()
        self._close_own()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_send.send(b"x")

    def _close_listeners(self) -> None:
        while self._listeners:
            listener = self._listeners.pop()
            fd = listener.socket.fileno()
            if self._terms.pop(fd, None) is not None and self._paused_until is None:
                self._selector.unregister(fd)  # closing is not enough: a successor has it too
            if self.succeeded:
                listener.let_go()
            else:
                listener.close()

    def close_inherited(self) -> None:
        """In a forked child: close without taking the addresses from the parent."""
        for listener in self._listeners:
            listener.let_go()
        for _, sock, _ in self._pending.values():
            sock.close()
        self._inquiries.close_inherited()
        self._close_own()

    def _close_own(self) -> None:
        self._selector.close()
        self._wake_receive.close()
        self._wake_send.close()

    def _run(self) -> None:
        while not self._closing:
            if self._retiring:
                self._close_listeners()
                if not self._pending:
                    self._retired.set()
            self._resume()
            for key, _ in self._selector.select(self._patience()):
                fd = key.fd
                if fd in self._terms:
                    self._accept(key.fileobj, self._terms[fd])  # type: ignore[arg-type]
                elif fd in self._pending:
                    self._advance(fd)
                elif fd in self._inquiries:
                    self._inquiries.advance(fd)
                elif key.fileobj is self._wake_receive:
                    self._wake_receive.recv(64)
            while self._handed:
                self._inquiries.add(self._handed.popleft())
            self._give_up_late()
            self._inquiries.expire()

    def _patience(self) -> float | None:
        """Seconds until somebody has taken too long; None if nobody can."""
        deadlines = [entry[2] for entry in self._pending.values()]
        if self._inquiries.deadline is not None:
            deadlines.append(self._inquiries.deadline)
        if self._paused_until is not None:
            deadlines.append(self._paused_until)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _accept(self, listener: socket.socket, terms: handshake.Terms) -> None:
        if self._sharing is not None and not self._may_accept(self._sharing):
            return
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
        self._publish()
        self._advance(fd)

    # ---- sharing the sockets with other processes ----

    def _may_accept(self, shared: sharing.Sharing) -> bool:
        """Whether it is our turn; if not, do not look at the listening sockets for a moment."""
        now = time.monotonic()
        if shared.least_loaded or (self._turn is not None and now >= self._turn):
            self._turn = None
            return True
        if self._turn is None:
            self._turn = now + sharing.PATIENCE_SECONDS
        if self._paused_until is None:
            self._paused_until = now + sharing.PAUSE_SECONDS
            for listener in self._listeners:
                self._selector.unregister(listener.socket)
        return False

    def _resume(self) -> None:
        """Look again after a pause. Whoever waited may have been taken by another process."""
        if self._paused_until is None or time.monotonic() < self._paused_until:
            return
        self._paused_until = None
        poll = select.poll()
        for listener in self._listeners:
            self._selector.register(listener.socket, selectors.EVENT_READ)
            poll.register(listener.socket, select.POLLIN)
        if not poll.poll(0):
            self._turn = None

    # ---- handshakes ----

    def _inquire(self, inquiry: handshake.Inquiry) -> None:
        """Somebody asks about this process, or about another one that accepts here."""
        self._publish()
        shared = self._sharing
        if inquiry.worker in (0, os.getpid()):
            self._inquiries.add(inquiry)
            return
        try:
            if shared is None:
                msg = f"no process {inquiry.worker} serves this address"
                raise ConnectError(msg)
            shared.pass_on(inquiry.socket, inquiry.worker, inquiry.request_bytes)
        except ConnectError as error:
            handshake.refuse(inquiry.socket, 0, str(error))
        inquiry.socket.close()

    def _advance(self, fd: int) -> None:
        steps, sock, _ = self._pending[fd]
        try:
            next(steps)
        except StopIteration as stop:
            self._forget(fd)
            if isinstance(stop.value, handshake.Inquiry):
                self._inquire(stop.value)
                return
            self._made += 1
            peer = stop.value.credentials
            _log.debug("connected: pid %d, uid %d", stop.value.peer_pid, peer.uid)
            try:
                self._server.add_connection(stop.value)
            except ConnectError as error:
                self._made -= 1
                stop.value.close()
                _log.warning("connection refused: %s", error)
            self._publish()
        except ConnectError as error:
            self._forget(fd, closed=sock.fileno() < 0)
            _log.info("handshake failed: %s", error)
        except OSError as error:
            self._forget(fd, closed=sock.fileno() < 0)
            _log.warning("handshake failed: %s", error)

    def _forget(self, fd: int, *, closed: bool = False) -> None:
        """Stop watching a handshake's socket; a closed one has left epoll by itself."""
        del self._pending[fd]
        self._publish()
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
