"""How two processes agree on a connection, over the rendezvous socket.

    client                                     server
    HELLO    transport, version, sizes   ->
             both check the other's uid (SO_PEERCRED) before any descriptor goes out
                                         <-    WELCOME  sizes [+ its segment, its bell]
    ATTACH   sizes [+ its segment, bell] ->             (shm only)
                                         <-    READY    (shm only)
    anything the other can't accept      <->   REFUSE   with a sentence why

    in place of HELLO, to ask about the server without making a connection:
    INSPECT  worker, a request           ->
                                         <-    REPORT   the answer; then perhaps the next INSPECT

Each message is 64 bytes, little-endian (docs/protocol.md), REFUSE, INSPECT and REPORT followed by
their text. Both sides
are generators that yield whenever they need the socket to be readable: whoever runs them decides
how to wait and for how long, so that a silent peer holds up nobody.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import segments
from ._native import ffi, lib
from .errors import ConnectError
from .rendezvous import Credentials, peer_credentials

if TYPE_CHECKING:
    from .address import Address

__all__ = [
    "INSPECT",
    "MESSAGE_BYTES_MAX",
    "REPORT",
    "VERSION",
    "Agreement",
    "Inquiry",
    "ServerSteps",
    "Steps",
    "Terms",
    "client_side",
    "pack_inspection",
    "read",
    "receive",
    "refuse",
    "server_side",
]

VERSION = 1
MESSAGE_BYTES_MAX = 0xFFFF_FFFF
_MAGIC = b"shmrpc\r\n"
_FORMAT = struct.Struct("<8sHBBIIIIQ28x")
_HELLO, _WELCOME, _ATTACH, _READY, _REFUSE, INSPECT, REPORT = range(1, 8)
_TRANSPORTS: dict[str, int] = {"shm": 1, "unix": 2, "tcp": 3}
_TRANSPORT_NAMES = {number: name for name, number in _TRANSPORTS.items()}
_RING_BYTES_MIN = 4096
_RING_BYTES_MAX = 64 << 20
_REASON_BYTES_MAX = 1024
_FDS_MAX = 2

Steps = Generator[None, None, "Agreement"]
ServerSteps = Generator[None, None, "Agreement | Inquiry"]


@dataclass(frozen=True)
class Terms:
    """What this side brings to a handshake."""

    address: Address
    max_message_bytes: int
    ring_bytes: int = 65536
    backing: segments.Backing = "auto"
    max_memory_bytes: int = 0
    allow_uids: frozenset[int] = frozenset()
    trust_uids: frozenset[int] = frozenset()  # whose values are views of their memory
    allow_remote: bool = False  # tcp may be listened at where other hosts can reach it

    def __post_init__(self) -> None:
        uid: Any
        for uid in self.allow_uids:
            if not isinstance(uid, int) or uid < 0:
                msg = f"allow_uids are the numbers of users, as os.getuid() returns, not {uid!r}"
                raise TypeError(msg)


@dataclass
class _Message:
    kind: int
    transport: int
    pid: int = 0
    ring_bytes: int = 0
    max_message_bytes: int = 0
    reason_bytes: int = 0
    version: int = VERSION
    fds: list[int] = field(default_factory=list)
    max_memory_bytes: int = 0

    def pack(self) -> bytes:
        return _FORMAT.pack(
            _MAGIC,
            self.version,
            self.kind,
            self.transport,
            self.pid,
            self.ring_bytes,
            self.max_message_bytes,
            self.reason_bytes,
            self.max_memory_bytes,
        )


class Agreement:
    """What a finished handshake leaves: everything that ``shmrpc_conn_add`` needs.

    Owns its descriptors and mapping until ``add`` hands them to a poller; ``close`` otherwise.
    """

    def __init__(self, sock: socket.socket, terms: Terms) -> None:
        self.socket = sock
        self.terms = terms
        self.credentials: Credentials = peer_credentials(sock)
        self.peer_pid = self.credentials.pid
        self.trusted = self.credentials.uid in (-1, os.geteuid())
        self.peer_max_message_bytes = 0
        self.max_memory_bytes = 0  # of blocks that we send, agreed
        self.own_ring_bytes = 0
        self.peer_ring_bytes = 0
        self.final = b""  # server: tells the client that everything is in place
        self._own_segment = ffi.NULL
        self._own_bell = -1
        self._peer_bell = -1
        self._peer_segment = -1

    def offer(self) -> list[int]:
        """Make our segment and bell; returns the descriptors to send, which the caller closes."""
        self.own_ring_bytes = self.terms.ring_bytes
        segment = segments.create(
            segments.HEADER_BYTES + self.own_ring_bytes, self.terms.backing, trusted=self.trusted
        )
        fds: list[int] = []
        try:
            self._own_segment = lib.shmrpc_segment_map(segment.own_fd, self.own_ring_bytes)
            if self._own_segment == ffi.NULL:
                msg = f"can't map {self.own_ring_bytes} bytes: {os.strerror(ffi.errno)}"
                raise ConnectError(msg)
            segment.seal()
            fds.append(os.dup(segment.peer_fd))
            if self.trusted:
                self._own_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                fds.append(os.dup(self._own_bell))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            msg = f"can't make a connection: {error.strerror} (ulimit -n)"
            raise ConnectError(msg) from error
        finally:
            segment.close()
        return fds

    def accept(self, message: _Message) -> None:
        """Take the peer's segment and bell."""
        expected = 2 if self.trusted else 1
        if len(message.fds) != expected:
            msg = f"the peer sent {len(message.fds)} descriptors instead of {expected}"
            raise ConnectError(msg)
        size = message.ring_bytes
        if not _RING_BYTES_MIN <= size <= _RING_BYTES_MAX or size & (size - 1):
            msg = f"the peer announced an impossible ring of {size} bytes"
            raise ConnectError(msg)
        if self.trusted and os.readlink(f"/proc/self/fd/{message.fds[1]}") != _EVENTFD_LINK:
            msg = "the peer's doorbell is not an eventfd"
            raise ConnectError(msg)
        self.peer_ring_bytes = size
        self.max_memory_bytes = min(self.terms.max_memory_bytes, message.max_memory_bytes)
        self._peer_segment = message.fds[0]
        if self.trusted:
            self._peer_bell = message.fds[1]
        message.fds.clear()

    def add(self, poller: object) -> int:
        """Hand the connection to a poller; returns its id. Raises ``ConnectError``."""
        options = ffi.new("shmrpc_conn_options *")
        options.control_fd = self.socket.fileno()
        options.own_bell_fd = self._own_bell
        options.peer_bell_fd = self._peer_bell
        options.own_segment = self._own_segment
        options.peer_segment_fd = self._peer_segment
        options.own_ring_bytes = self.own_ring_bytes
        options.peer_ring_bytes = self.peer_ring_bytes
        options.max_message_bytes = self.terms.max_message_bytes
        options.peer_max_message_bytes = self.peer_max_message_bytes
        options.arena_max_bytes = self.max_memory_bytes
        options.peer_arena_max_bytes = self.terms.max_memory_bytes
        options.peer_trusted = self.trusted
        options.relative_deadlines = self.terms.address.transport == "tcp"
        conn_id: int = lib.shmrpc_conn_add(poller, options)
        if conn_id < 0:
            msg = f"can't use the peer's memory: {os.strerror(-conn_id)}"
            refuse(self.socket, _TRANSPORTS[self.terms.address.transport], msg)
            raise ConnectError(msg)
        self._own_segment = ffi.NULL
        self._own_bell = self._peer_bell = -1
        self._close_peer_segment()  # before the client goes on: it may count our descriptors
        if self.final:
            with contextlib.suppress(OSError):  # a client that is gone already hangs up as any
                self.socket.send(self.final, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        self.socket.detach()
        return conn_id

    def _close_peer_segment(self) -> None:
        if self._peer_segment >= 0:
            os.close(self._peer_segment)
            self._peer_segment = -1

    def close(self) -> None:
        """Let go of everything that is still ours."""
        for fd in (self._own_bell, self._peer_bell):
            if fd >= 0:
                os.close(fd)
        self._own_bell = self._peer_bell = -1
        self._close_peer_segment()
        if self._own_segment != ffi.NULL:
            lib.shmrpc_segment_unmap(self._own_segment, self.own_ring_bytes)
            self._own_segment = ffi.NULL
        self.socket.close()


@dataclass
class Inquiry:
    """A client that asks about the server. Whoever has it owns its socket."""

    socket: socket.socket
    worker: int  # the pid of the process that is to answer; 0: whichever took it
    request_bytes: int  # that follow


_EVENTFD_LINK = "anon_inode:[eventfd]"


# ---- messages over the socket ----


def _send(sock: socket.socket, message: _Message, fds: list[int] | None = None) -> None:
    """Send a message; a new socket's buffer always has room for the few that there are."""
    ancillary = []
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    data = message.pack()
    try:
        sent = sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except OSError as error:
        msg = f"the peer went away during the handshake: {error.strerror}"
        raise ConnectError(msg) from error
    if sent != len(data):
        msg = "the socket took only part of a handshake message"
        raise ConnectError(msg)


def _send_closing(sock: socket.socket, message: _Message, fds: list[int]) -> None:
    """Send descriptors, which are the peer's from then on."""
    try:
        _send(sock, message, fds)
    finally:
        for fd in fds:
            os.close(fd)


def refuse(sock: socket.socket, transport: int, reason: str) -> None:
    """Tell the peer why there will be no connection, as far as it still listens."""
    text = reason.encode()[:_REASON_BYTES_MAX]
    with contextlib.suppress(OSError, ConnectError):
        _send(sock, _Message(_REFUSE, transport, reason_bytes=len(text)))
        sock.send(text, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def read(sock: socket.socket, count: int, fds: list[int]) -> Generator[None, None, bytes]:
    """Read exactly ``count`` bytes and the descriptors that come with them."""
    data = b""
    space = socket.CMSG_SPACE(struct.calcsize(f"{_FDS_MAX}i"))
    while len(data) < count:
        try:
            part, ancillary, flags, _ = sock.recvmsg(
                count - len(data), space, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            yield
            continue
        except OSError as error:
            msg = f"the peer went away during the handshake: {error.strerror}"
            raise ConnectError(msg) from error
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                fds.extend(received)
        if flags & socket.MSG_CTRUNC:
            msg = "the peer sent more descriptors than allowed, or none are left (ulimit -n)"
            raise ConnectError(msg)
        if not part:
            msg = "the peer closed the connection during the handshake"
            raise ConnectError(msg)
        data += part
    return data


def pack_inspection(kind: int, body: bytes, worker: int = 0) -> bytes:
    """An INSPECT or REPORT; which transport the address has does not matter to them."""
    return _Message(kind, 0, worker, reason_bytes=len(body)).pack() + body


def receive(sock: socket.socket, transport: str, *expected: int) -> Generator[None, None, _Message]:
    """Receive a message of one of these kinds, or raise with what came instead."""
    fds: list[int] = []
    try:
        data = yield from read(sock, _FORMAT.size, fds)
        magic, version, kind, number, pid, ring, max_message, reason_bytes, memory = _FORMAT.unpack(
            data
        )
        if magic != _MAGIC:
            msg = "what is on this socket does not speak shmrpc"
            raise ConnectError(msg)
        if kind == _REFUSE:
            text = yield from read(sock, min(reason_bytes, _REASON_BYTES_MAX), fds)
            msg = f"refused by the peer: {text.decode('utf-8', 'replace')}"
            raise ConnectError(msg)
        if version != VERSION:
            msg = f"the peer speaks protocol version {version}, this side version {VERSION}"
            raise ConnectError(msg)
        if kind not in (INSPECT, REPORT) and number != _TRANSPORTS[transport]:
            other = _TRANSPORT_NAMES.get(number, "unknown")
            msg = f"this address serves {transport}://, not {other}://"
            raise ConnectError(msg)
        if kind not in expected:
            msg = f"the peer sent handshake message {kind} instead of {expected[0]}"
            raise ConnectError(msg)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return _Message(kind, number, pid, ring, max_message, reason_bytes, version, fds, memory)


def _drop(message: _Message) -> None:
    for fd in message.fds:
        os.close(fd)
    message.fds.clear()


def _check_uid(agreement: Agreement) -> None:
    uid = agreement.credentials.uid
    if not agreement.trusted and uid not in agreement.terms.allow_uids:
        msg = f"uid {uid} (pid {agreement.credentials.pid}) is not in allow_uids of uid "
        raise ConnectError(msg + str(os.geteuid()))


def _is_child(pid: int, parent: int) -> bool:
    """Whether the one is a child of the other: a worker of the process that listens for it.

    For messages alone: what is allowed depends on the uid.
    """
    if pid == parent or min(pid, parent) <= 0:
        return False
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1]) == parent
    return False


# ---- the two sides ----


def client_side(sock: socket.socket, terms: Terms) -> Steps:
    """Agree with a server. Owns the socket: it is closed unless an agreement is returned."""
    transport = terms.address.transport
    number = _TRANSPORTS[transport]
    agreement = Agreement(sock, terms)
    try:
        _check_uid(agreement)
        ours = _Message(_HELLO, number, os.getpid(), terms.ring_bytes, terms.max_message_bytes)
        ours.max_memory_bytes = terms.max_memory_bytes
        with contextlib.suppress(ConnectError):
            # A server that refuses us does not wait for this; what it says comes next.
            _send(sock, ours)
        welcome = yield from receive(sock, transport, _WELCOME)
        try:
            agreement.peer_max_message_bytes = welcome.max_message_bytes
            if transport == "tcp" or _is_child(welcome.pid, agreement.peer_pid):
                agreement.peer_pid = welcome.pid
            if transport == "shm":
                agreement.accept(welcome)
                ours.kind = _ATTACH
                _send_closing(sock, ours, agreement.offer())
                ready = yield from receive(sock, transport, _READY)
                _drop(ready)
        finally:
            _drop(welcome)
    except BaseException:
        agreement.close()
        raise
    return agreement


def server_side(sock: socket.socket, terms: Terms) -> ServerSteps:
    """Agree with a client, or tell it why not. Owns the socket like ``client_side``.

    A client that only asks about the server is left to the caller.
    """
    transport = terms.address.transport
    number = _TRANSPORTS[transport]
    agreement = Agreement(sock, terms)
    try:
        try:
            _check_uid(agreement)
            hello = yield from receive(sock, transport, _HELLO, INSPECT)
            _drop(hello)
            if hello.kind == INSPECT:
                return Inquiry(sock, hello.pid, hello.reason_bytes)
            agreement.peer_max_message_bytes = hello.max_message_bytes
            if transport == "tcp":
                agreement.peer_pid = hello.pid
            ours = _Message(
                _WELCOME, number, os.getpid(), terms.ring_bytes, terms.max_message_bytes
            )
            ours.max_memory_bytes = terms.max_memory_bytes
            if transport == "shm":
                _send_closing(sock, ours, agreement.offer())
                attach = yield from receive(sock, transport, _ATTACH)
                try:
                    agreement.accept(attach)
                finally:
                    _drop(attach)
                ours.kind = _READY
        except ConnectError as error:
            refuse(sock, number, str(error))
            raise
    except BaseException:
        agreement.close()
        raise
    agreement.final = ours.pack()
    return agreement
