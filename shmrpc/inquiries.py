"""Answering those who ask about the server: in the acceptor's thread, which waits for no handler.

So a server answers while all its workers are busy or stuck, or its event loop is blocked; only C
code that keeps the interpreter's lock keeps this thread from running, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from . import handshake
from .errors import ConnectError, Error

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["Answerer", "Inquiries"]

T = TypeVar("T")

_log = logging.getLogger("shmrpc.acceptor")

_REQUEST_BYTES_MAX = 1 << 16
_INQUIRIES_MAX = 64  # at a time; more are refused
_SILENCE_SECONDS = 60.0  # after which one is hung up on; who has more to ask connects again


class Answerer(Protocol):
    """What knows the answers."""

    def answer(self, request: bytes, watcher: object) -> bytes:
        """The answer to one request; ``Error`` if there is none. ``watcher`` is who asks."""

    def leave(self, watcher: object) -> None:
        """It asks no more."""


class Inquiries:
    """The sockets of those who ask. One thread uses it, with a selector that it shares."""

    def __init__(self, selector: selectors.BaseSelector, answerer: Answerer | None) -> None:
        self._selector = selector
        self._answerer = answerer
        self._steps: dict[int, Generator[int, None, None]] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._until: dict[int, float] = {}

    def __contains__(self, fd: int) -> bool:
        return fd in self._steps

    def add(self, inquiry: handshake.Inquiry) -> None:
        """Answer this one, or refuse it."""
        sock = inquiry.socket
        if self._answerer is None or len(self._steps) >= _INQUIRIES_MAX:
            nobody = "nobody answers questions here"
            many = f"{_INQUIRIES_MAX} others ask about this server already"
            handshake.refuse(sock, 0, nobody if self._answerer is None else many)
            sock.close()
            return
        fd = sock.fileno()
        self._steps[fd] = self._converse(sock, self._answerer, inquiry.request_bytes)
        self._sockets[fd] = sock
        self._selector.register(sock, selectors.EVENT_READ)
        self.advance(fd)

    def advance(self, fd: int) -> None:
        """Go on with the one whose socket is ready."""
        sock = self._sockets[fd]
        try:
            events = next(self._steps[fd])
        except StopIteration:
            self._hang_up(fd)
        except ConnectError as error:
            handshake.refuse(sock, 0, str(error))
            self._hang_up(fd)
        except OSError as error:
            _log.debug("lost who asked about this server: %s", error)
            self._hang_up(fd)
        else:
            self._until[fd] = time.monotonic() + _SILENCE_SECONDS
            if self._selector.get_key(sock).events != events:
                self._selector.modify(sock, events)

    @property
    def deadline(self) -> float | None:
        """When ``expire`` has something to do: ``time.monotonic()`` seconds, or None."""
        return min(self._until.values(), default=None)

    def expire(self) -> None:
        """Hang up on those who have been silent for long."""
        now = time.monotonic()
        for fd, until in list(self._until.items()):
            if now >= until:
                self._hang_up(fd)

    def close(self) -> None:
        """Hang up on all."""
        for fd in list(self._steps):
            self._hang_up(fd)

    def close_inherited(self) -> None:
        """In a forked child, whose selector is the parent's: close the sockets."""
        for sock in self._sockets.values():
            sock.close()

    def _hang_up(self, fd: int) -> None:
        if self._answerer is not None:
            self._answerer.leave(self._sockets[fd])
        del self._steps[fd]
        self._until.pop(fd, None)
        sock = self._sockets.pop(fd)
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._selector.unregister(sock)
        sock.close()

    @staticmethod
    def _converse(sock: socket.socket, answerer: Answerer, size: int) -> Generator[int, None, None]:
        """Answer request after request, until the other end hangs up."""
        fds: list[int] = []
        try:
            while True:
                if not 0 < size <= _REQUEST_BYTES_MAX:
                    msg = f"a request has 1 to {_REQUEST_BYTES_MAX} bytes, not {size}"
                    raise ConnectError(msg)
                request = yield from _reading(handshake.read(sock, size, fds))
                try:
                    answer = answerer.answer(request, sock)
                except Error as error:
                    raise ConnectError(str(error)) from error
                data = memoryview(handshake.pack_inspection(handshake.REPORT, answer))
                while data:
                    try:
                        sent = sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        yield selectors.EVENT_WRITE
                    else:
                        data = data[sent:]
                if not (yield from _more(sock)):
                    return
                header = yield from _reading(handshake.receive(sock, "shm", handshake.INSPECT))
                fds += header.fds
                size = header.reason_bytes
        finally:
            for fd in fds:
                os.close(fd)


def _more(sock: socket.socket) -> Generator[int, None, bool]:
    """Wait for what comes next; False if nothing does."""
    while True:
        try:
            return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            yield selectors.EVENT_READ


def _reading(steps: Generator[None, None, T]) -> Generator[int, None, T]:
    """Steps that only ever wait for something to read."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        yield selectors.EVENT_READ
