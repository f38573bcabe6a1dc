"""Listening sockets and finding them: the directory, stale sockets, one server to a name.

A socket file outlives its server. What says that a server lives is an exclusive lock on the file
``<socket>.lock``, which the kernel gives up with the process, however it ends. Both may come from
elsewhere: see handover.py.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import handover
from .address import Address, rendezvous_directory
from .errors import ConnectError

if TYPE_CHECKING:
    from .sharing import Sharing

__all__ = ["Credentials", "Listener", "open_socket", "peer_credentials"]

_BACKLOG = 1024


@dataclass(frozen=True)
class Credentials:
    """Who is at the other end of a Unix socket, as the kernel says; -1 on tcp."""

    pid: int = -1
    uid: int = -1
    gid: int = -1


def peer_credentials(sock: socket.socket) -> Credentials:
    """SO_PEERCRED of a connected Unix socket; unknown for any other."""
    if sock.family != socket.AF_UNIX:
        return Credentials()
    size = struct.calcsize("3i")
    return Credentials(
        *struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    )


def prepare_directory(path: str) -> None:
    """Make the rendezvous directory, or check that it is ours and closed to others."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        msg = f"can't make the rendezvous directory {path}: {error.strerror}; set SHMRPC_DIR"
        raise ConnectError(msg) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        msg = (
            f"rendezvous directory {path} is not a directory of uid {os.geteuid()}; set SHMRPC_DIR"
        )
        raise ConnectError(msg)
    explicit = os.environ.get("SHMRPC_DIR")
    if not explicit and stat.S_IMODE(status.st_mode) & 0o077:
        os.chmod(path, 0o700)


def _lock(path: str, address: Address) -> int:
    """Take the lock of a socket, or raise with the pid that has it."""
    tries = 5
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            if error.errno != errno.EWOULDBLOCK:
                raise
            tries -= 1
            if tries:  # `shmrpc ls` takes a lock for an instant to see whether anybody has it
                time.sleep(0.002)
                continue
            msg = f"address {address} is in use by a live server, pid {owner}"
            raise ConnectError(msg) from error
        with contextlib.suppress(FileNotFoundError):
            # A server that stopped may have removed the file between our open and lock.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                _write_pid(fd)
                return fd
        os.close(fd)


def _write_pid(lock_fd: int) -> None:
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, b"%d\n" % os.getpid(), 0)


class Listener:
    """One listening socket. Not for use after a fork but to ``let_go``."""

    def __init__(self, address: Address, *, for_others: bool = False) -> None:
        """Listen at ``address``; ``ConnectError`` if it is taken or can't be had.

        That is, at the inherited socket with this address if there is one. ``for_others`` lets
        other users reach a Unix socket, as far as its directory lets them; who is served is then a
        matter of SO_PEERCRED. A supervisor's socket has the mode that the supervisor gave it.
        """
        self.address = address
        self._mode = 0o666 if for_others else 0o600
        self._lock_fd = -1
        self._inherited: handover.Inherited | None = None
        self.sharing: Sharing | None = None  # with workers of the same supervisor
        try:
            self._inherited = handover.claim(address)
            if self._inherited is not None:
                self.socket = socket.socket(fileno=self._inherited.fd)
                self._take_over(self._inherited)
            elif address.transport == "tcp":
                self.socket = self._listen_tcp(address)
            else:
                self.socket = self._listen_unix(address)
        except (OSError, UnicodeError) as error:
            self._unlock()
            msg = f"can't listen at {address}: {getattr(error, 'strerror', None) or error}"
            raise ConnectError(msg) from error
        self.socket.setblocking(False)
        _listeners.add(self)

    def _listen_unix(self, address: Address) -> socket.socket:
        if os.path.dirname(address.path) == rendezvous_directory():
            prepare_directory(os.path.dirname(address.path))
        self._lock_fd = _lock(f"{address.path}.lock", address)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
                raise OSError(errno.EEXIST, f"{address.path} exists and is not a socket")
            os.unlink(address.path)  # left by a server that died: we have its lock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(address.path)
            os.chmod(address.path, self._mode)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    def _listen_tcp(self, address: Address) -> socket.socket:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        self.address = replace(address, port=sock.getsockname()[1])
        return sock

    def _take_over(self, inherited: handover.Inherited) -> None:
        self._lock_fd, inherited.lock_fd = inherited.lock_fd, -1
        self.sharing = inherited.sharing
        try:
            if self.address.transport == "tcp":
                self.address = replace(self.address, port=self.socket.getsockname()[1])
            elif self.sharing is None:
                self._take_over_lock(f"{self.address.path}.lock", lent=inherited.lent)
                self.announce()
        except BaseException:
            self._close_socket()
            raise

    def _take_over_lock(self, path: str, *, lent: bool) -> None:
        """See that we have the lock: the predecessor's, which is ours too, or a new one."""
        if self._lock_fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock_fd), os.stat(path)):
                    return
            self._unlock()  # somebody has removed the file
        try:
            self._lock_fd = _lock(path, self.address)
        except OSError:
            # In a directory that only the supervisor may write to, as /run, nobody else of our
            # user could take the address either.
            if not lent:
                raise

    def announce(self) -> None:
        """Make known that this process serves here, also after a successor that failed has done so.

        In the lock; by the socket's mode; and by SO_PEERCRED, which shows clients who called listen
        last, of those who came later.
        """
        if self.address.transport == "tcp":
            return
        if self._inherited is None or not self._inherited.lent:
            os.chmod(self.address.path, self._mode)
        if self._lock_fd >= 0:
            _write_pid(self._lock_fd)
        self.socket.listen(_BACKLOG)

    def descriptors(self) -> list[tuple[str, int]]:
        """What a successor needs, each with its name: see handover.py."""
        lent = self._inherited is not None and self._inherited.lent
        found = [(handover.LENT if lent else handover.OWN, self.socket.fileno())]
        if self._lock_fd >= 0:
            found.append((handover.LOCK, self._lock_fd))
        return found

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _close_socket(self) -> None:
        if self._inherited is not None and self._inherited.lent:
            self._inherited.fd = self.socket.detach()
            handover.give_back(self._inherited)
        else:
            self.socket.close()

    def close(self) -> None:
        """Stop listening and remove what is ours: the socket, unless it was lent, and its lock."""
        _listeners.discard(self)
        inherited = self._inherited
        waits = inherited is not None and inherited.handed_over and handover.predecessor_waits()
        if self._lock_fd >= 0 and not waits:
            lent = inherited is not None and inherited.lent
            for path in ([] if lent else [self.address.path]) + [f"{self.address.path}.lock"]:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._close_socket()
        self._unlock()

    def let_go(self) -> None:
        """Stop listening, and leave all to who has it too: a successor, or the parent of a fork."""
        _listeners.discard(self)
        self.socket.close()
        self._unlock()


_listeners: set[Listener] = set()


@atexit.register
def _close_listeners() -> None:
    """Remove the sockets of servers that nobody stopped before the interpreter ends."""
    for listener in list(_listeners):
        listener.close()


def open_socket(address: Address, timeout: float) -> socket.socket:
    """Connect a socket to a listener; ``ConnectError`` says why not and what to do."""
    try:
        if address.transport == "tcp":
            sock = socket.create_connection((address.host, address.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout)
                sock.connect(address.path)
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        msg = f"can't connect to {address}: no answer within {timeout:g} s"
        raise ConnectError(msg) from error
    except UnicodeError as error:
        msg = f"can't connect to {address}: {address.host!r} is no host name"
        raise ConnectError(msg) from error
    except OSError as error:
        hint = {
            errno.ENOENT: f"no server has made {address.path}; start it, or check the name",
            errno.ECONNREFUSED: "nobody listens there; start the server",
            errno.EACCES: "permission denied; the server's directory is for its own user",
            errno.EMFILE: "no descriptors are left (ulimit -n)",
            errno.EAGAIN: "the server's queue of new connections is full",
        }.get(error.errno or 0, error.strerror or str(error))
        msg = f"can't connect to {address}: {hint}"
        raise ConnectError(msg) from error
    sock.setblocking(False)
    return sock
