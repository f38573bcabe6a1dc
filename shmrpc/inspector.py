"""Asking a server about itself, without being its client: ``shmrpc.inspect``.

A thread of the server's own answers, which waits for none of its handlers. See inquiries.py.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from . import address as addresses
from . import handshake, rendezvous
from .errors import ConnectError, ProtocolError
from .poller import check_timeout

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from types import TracebackType

__all__ = ["Inspector", "inspect"]

T = TypeVar("T")

_REPORT_BYTES_MAX = 64 << 20


def inspect(
    address: str, *, timeout: float = 5.0, allow_uids: Iterable[int] = (), worker: int = 0
) -> Inspector:
    """Get ready to ask the server at an address about itself.

    ``timeout`` in seconds is for each question. ``allow_uids`` are the other users' servers that
    may be asked. ``worker`` is the pid of the process that shall answer, where several serve the
    address; 0 is any, and then always the same as long as it lives.

    Raises ``ConnectError`` for what is no address; everything else when something is asked.
    """
    return Inspector(address, timeout=timeout, allow_uids=allow_uids, worker=worker)


class Inspector:
    """Asks one server, which answers also when all its handlers are busy or stuck.

    It can't while C code that one of them has called keeps the interpreter's lock. Every question
    raises ``ConnectError`` if nobody is there, or answers in time. For any number of threads; a
    forked child has to make its own. Use it as a context manager, or ``close`` it.
    """

    def __init__(
        self, address: str, *, timeout: float = 5.0, allow_uids: Iterable[int] = (), worker: int = 0
    ) -> None:
        """See ``inspect``."""
        self._address = addresses.parse(address)
        self._timeout = check_timeout(timeout)
        self._allowed = frozenset({os.geteuid(), -1, *allow_uids})
        self._worker = worker
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    # ---- questions ----

    def describe(self, method: str | None = None) -> Any:
        """What a method is: None if there is none of this name; a list of all without a name.

        Each is a dict: name, kind ("unary", "server_streaming", "client_streaming" or
        "bidirectional"), signature, doc, requests, streams, idempotent.
        """
        return self._ask("shmrpc.describe", *([] if method is None else [method]))

    def health(self) -> str:
        """``"serving"``, or ``"draining"`` if it is about to stop."""
        answer = self._ask("shmrpc.health")
        return str(answer["status"]) if isinstance(answer, dict) else "unknown"

    def stats(self, *, watch: bool = False) -> dict[str, Any]:
        """What it does: pid, uid, uptime, counters, methods, the calls that run longest.

        With ``watch`` the server times its handlers from now on, until this inspector is closed or
        asks nothing for a minute: each method then has p50 and p99 in seconds, and the buckets that
        ``shmrpc.timing.percentile`` takes. That costs each call about a microsecond.
        """
        answer = self._ask("shmrpc.stats", watch)
        if not isinstance(answer, dict):
            msg = f"{self._address} answered with something else than its stats"
            raise ProtocolError(msg)
        return answer

    def close(self) -> None:
        """Hang up. Safe to repeat."""
        with self._lock:
            self._hang_up()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- asking ----

    def _ask(self, *request: Any) -> Any:
        body = msgpack.packb(request)
        deadline = time.monotonic() + self._timeout
        with self._lock:
            try:
                if self._socket is None or not self._is_open(self._socket):
                    self._hang_up()
                    self._socket = self._connect()
                return self._exchange(self._socket, body, deadline)
            except ConnectError as error:
                self._hang_up()
                if str(self._address) in str(error):
                    raise
                msg = f"can't ask {self._address}: {error}"
                raise ConnectError(msg) from error
            except BaseException:
                self._hang_up()  # half an answer may be left in it
                raise

    def _connect(self) -> socket.socket:
        sock = rendezvous.open_socket(self._address, self._timeout)
        uid = rendezvous.peer_credentials(sock).uid
        if uid not in self._allowed:
            sock.close()
            msg = f"{self._address} is a server of uid {uid}, which is not in allow_uids"
            raise ConnectError(msg)
        return sock

    @staticmethod
    def _is_open(sock: socket.socket) -> bool:
        """Whether the server has not hung up since the last answer."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return not poll.poll(0)

    def _exchange(self, sock: socket.socket, body: bytes, deadline: float) -> Any:
        fds: list[int] = []
        try:
            data = memoryview(handshake.pack_inspection(handshake.INSPECT, body, self._worker))
            while data:
                data = data[self._send_some(sock, data, deadline) :]
            steps = handshake.receive(sock, "shm", handshake.REPORT)
            header = self._run(steps, sock, deadline)
            fds += header.fds
            size = header.reason_bytes
            if size > _REPORT_BYTES_MAX:
                msg = f"{self._address} announced a report of {size} bytes"
                raise ProtocolError(msg)
            report = self._run(handshake.read(sock, size, fds), sock, deadline)
        finally:
            for fd in fds:
                os.close(fd)
        try:
            return msgpack.unpackb(report, strict_map_key=False)
        except (ValueError, TypeError) as error:
            msg = f"{self._address} sent a report that is none: {error}"
            raise ProtocolError(msg) from error

    def _send_some(self, sock: socket.socket, data: memoryview, deadline: float) -> int:
        while True:
            try:
                return sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(sock, select.POLLOUT, deadline)
            except OSError as error:
                msg = f"{self._address} went away: {error.strerror}"
                raise ConnectError(msg) from error

    def _run(self, steps: Generator[None, None, T], sock: socket.socket, deadline: float) -> T:
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                result: T = stop.value
                return result
            self._wait(sock, select.POLLIN, deadline)

    def _wait(self, sock: socket.socket, events: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(sock, events)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(min(left * 1000, 1e9)):
            msg = f"{self._address} did not answer within {self._timeout:g} s"
            raise ConnectError(msg)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __repr__(self) -> str:
        return f"<shmrpc.Inspector {self._address}>"
