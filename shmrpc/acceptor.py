"""Making new connections: one thread that runs any number of handshakes at a time."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from typing import Protocol

from . import handover, handshake
from .errors import ConnectError
from .rendezvous import Listener

__all__ = ["Acceptor"]

_log = logging.getLogger("shmrpc.server")

_HANDSHAKE_SECONDS = 5.0
_HANDSHAKES_MAX = 1024
_ACCEPT_PAUSE = 0.05


class Host(Protocol):
    """The server, as far as its acceptor needs it."""

    def add_connection(self, agreement: handshake.Agreement) -> None: ...


class Acceptor:
    """The thread that makes new connections, any number at a time."""

    def __init__(self, server: Host, terms: list[handshake.Terms]) -> None:
        self._server = server
        self._listeners: list[Listener] = []
        self._terms: dict[int, handshake.Terms] = {}
        self._pending: dict[int, tuple[handshake.Steps, socket.socket, float]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="shmrpc-acceptor", daemon=True)
        self._closing = self._retiring = False
        self.succeeded = False  # the addresses are a successor's
        self._retired = threading.Event()
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
        self._thread.start()

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
        self._close_listeners()
        self._close_own()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_send.send(b"x")

    def _close_listeners(self) -> None:
        while self._listeners:
            listener = self._listeners.pop()
            fd = listener.socket.fileno()
            if self._terms.pop(fd, None) is not None:
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
            deadline = min((entry[2] for entry in self._pending.values()), default=None)
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            for key, _ in self._selector.select(timeout):
                fd = key.fd
                if fd in self._terms:
                    self._accept(key.fileobj, self._terms[fd])  # type: ignore[arg-type]
                elif fd in self._pending:
                    self._advance(fd)
                elif key.fileobj is self._wake_receive:
                    self._wake_receive.recv(64)
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
