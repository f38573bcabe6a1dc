"""Several worker processes at one listening socket: which of them takes the next connection.

Whoever calls ``accept`` first gets it, which is the one that happens to be awake. So each worker
says in memory that all of them share how many connections it has, and one that has more than
another gives way: it looks again every ``PAUSE_SECONDS``, and takes the connection in the end if
the others, which may be stopped or stuck, have left it for ``PATIENCE_SECONDS``.

    supervisor                               worker
                <- {"addresses": [...]}      what its server listens at
    {"listen": place}, sockets, the table ->
                <- {"ready": true}           it serves
                <- {"inspect": pid, ...}, s  somebody who asks about another worker
    {"inspect": ...}, s ->                   passed on to that worker

in msgpack, one message a packet of a socket that both have (supervisor.py).
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
from typing import TYPE_CHECKING, Any

import msgpack

from .errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PATIENCE_SECONDS", "PAUSE_SECONDS", "LoadTable", "Sharing", "receive", "send"]

PAUSE_SECONDS = 0.002
PATIENCE_SECONDS = 0.02
_PLACES = 4096
_PACKET_BYTES_MAX = 1 << 16
_FDS_MAX = 64


def send(control: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one message with copies of these descriptors. Raises ``OSError``."""
    ancillary = []
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    control.sendmsg([msgpack.packb(message)], ancillary, socket.MSG_NOSIGNAL)


def receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive a message and its descriptors; None when the other side is gone."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(_FDS_MAX * fds.itemsize)
    data, ancillary, _, _ = control.recvmsg(_PACKET_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return (msgpack.unpackb(data) if data else None), list(fds)


class LoadTable:
    """How many connections each worker has: two words for each, pid and connections.

    A worker writes its own place alone; the supervisor clears that of one that has ended.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Map the table with this descriptor, which stays the caller's; or make one."""
        size = 8 * _PLACES
        self.fd = -1
        if fd is None:
            fd = self.fd = os.memfd_create("shmrpc-workers", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map).cast("I")

    def put(self, place: int, pid: int, connections: int) -> None:
        """Say how many connections the worker at this place has; pid 0: it takes none."""
        self._words[2 * place + 1] = connections
        self._words[2 * place] = pid

    def pids(self) -> list[int]:
        """Those that take connections."""
        return [pid for pid in self._words[0 : 2 * _PLACES : 2].tolist() if pid]

    def least(self) -> int:
        """The fewest connections that any of them has."""
        words = self._words.tolist()
        loads = zip(words[0::2], words[1::2], strict=True)
        return min((connections for pid, connections in loads if pid), default=0)

    def free_place(self, taken: set[int]) -> int:
        """A place that is not among these."""
        return next(place for place in range(_PLACES) if place not in taken)

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Sharing:
    """A worker's end: its place among those that share a listening socket."""

    def __init__(self, control: socket.socket, table: LoadTable, place: int) -> None:
        self._control = control
        self._table = table
        self._place = place
        self._connections = 0
        # What takes a socket over whose owner asks about this process: the acceptor's.
        self.inspect: Callable[[socket.socket, int], None] | None = None

    def publish(self, connections: int) -> None:
        """Take connections from now on, and have so many."""
        self._connections = connections
        self._table.put(self._place, os.getpid(), connections)

    def retire(self) -> None:
        """Take no more connections: nobody gives way to us."""
        self._table.put(self._place, 0, 0)

    @property
    def least_loaded(self) -> bool:
        """Whether no other worker has fewer connections."""
        return self._connections <= self._table.least()

    def pids(self) -> list[int]:
        """The workers that take connections."""
        return self._table.pids()

    def pass_on(self, sock: socket.socket, pid: int, request_bytes: int) -> None:
        """Give the socket of somebody who asks about another worker to that worker.

        ``ConnectError`` if there is none of this pid. The socket stays the caller's to close.
        """
        if pid not in self.pids():
            msg = f"no process {pid} serves this address"
            raise ConnectError(msg)
        message = {"inspect": pid, "bytes": request_bytes}
        with contextlib.suppress(OSError):  # the supervisor is gone, and so are we in a moment
            send(self._control, message, [sock.fileno()])

    def attend(self) -> None:
        """Take what the supervisor passes on, until it is gone. For a thread of its own."""
        while True:
            message, fds = receive(self._control)
            if message is None:
                return
            inspect = self.inspect
            for fd in fds:
                sock = socket.socket(fileno=fd)
                sock.setblocking(False)
                if inspect is None:
                    sock.close()
                else:
                    inspect(sock, int(message["bytes"]))
