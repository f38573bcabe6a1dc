"""Listening sockets that come from elsewhere: from systemd, or from the server that we succeed.

Both speak systemd's protocols. Sockets are descriptors 3, 4, ...; ``LISTEN_FDS`` says how many they
are, ``LISTEN_PID`` whose (sd_listen_fds(3)). Who serves sends ``READY=1`` to ``NOTIFY_SOCKET``
(sd_notify(3)). A predecessor says in ``LISTEN_FDNAMES`` what each descriptor is:

    shmrpc-own    a socket whose file the last server that has it removes
    shmrpc-lent   one that belongs to a supervisor, which looks after its file
    shmrpc-shared (within this process) one that other workers of the same supervisor accept from,
                  too: the supervisor has its file and lock. See sharing.py
    shmrpc-lock   the lock of the socket before it. A lock of flock(2) belongs to the open file, so
                  that both processes have it, and it is free when both have ended

Until the predecessor has heard that we serve it may go on without us: nothing of what it handed
over may be removed. Its ``NOTIFY_SOCKET`` exists for exactly so long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConnectError, Error

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .address import Address
    from .sharing import Sharing

__all__ = [
    "LENT",
    "LOCK",
    "OWN",
    "Inherited",
    "check_claimed",
    "claim",
    "give_back",
    "notify",
    "predecessor_waits",
    "share",
    "start_successor",
    "tell_ready",
]

_log = logging.getLogger("shmrpc.handover")

OWN, LENT, LOCK = "shmrpc-own", "shmrpc-lent", "shmrpc-lock"
_SHARED = "shmrpc-shared"
_FIRST_FD = 3
# The supervisor of the predecessor, for the successor to talk to once it serves.
_SUPERVISOR = "SHMRPC_SUPERVISOR"
_LOOK_SECONDS = 0.05

# ---- sockets that we were started with ----


@dataclass
class Inherited:
    """A descriptor that this process was started with, and what its giver called it."""

    fd: int
    name: str = ""
    lock_fd: int = -1
    reported: bool = False  # in the log, that it is nobody's
    sharing: Sharing | None = None  # with whom

    @property
    def handed_over(self) -> bool:
        """Whether a predecessor gave it to us."""
        return self.name in (OWN, LENT)

    @property
    def lent(self) -> bool:
        """Whether somebody else looks after it: it is not ours to remove."""
        return self.name != OWN


_unclaimed: list[Inherited] = []
_predecessor: str | None = None  # its NOTIFY_SOCKET
_lock = threading.Lock()


def _take() -> None:
    """With the lock held: note what the environment says, and remove that from it."""
    global _predecessor  # noqa: PLW0603 - one environment, one predecessor
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return  # nothing, or for another process
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    count = os.environ.get("LISTEN_FDS", "")
    for variable in ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    if not count.isascii() or not count.isdigit():
        _log.warning("LISTEN_FDS is %r, which is no number: no inherited sockets", count)
        return
    for number in range(int(count)):
        fd, name = _FIRST_FD + number, names[number] if number < len(names) else ""
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            _log.warning("LISTEN_FDS is %s, but descriptor %d: %s", count, fd, error.strerror)
            break
        if name == LOCK and _unclaimed:
            _unclaimed[-1].lock_fd = fd
        else:
            _unclaimed.append(Inherited(fd, name))
    if any(inherited.handed_over for inherited in _unclaimed):
        _predecessor = os.environ.get("NOTIFY_SOCKET")


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket | None]:
    """The listening stream socket behind a descriptor, which stays open; None if it is none."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        yield None
        return
    try:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        yield sock if listens and sock.type == socket.SOCK_STREAM else None
    finally:
        sock.detach()


def _listens_at(sock: socket.socket, address: Address) -> bool:
    place = sock.getsockname()
    if address.transport != "tcp":
        if sock.family != socket.AF_UNIX or not isinstance(place, str) or not place:
            return False
        return os.path.realpath(place) == os.path.realpath(address.path)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    wanted = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return any(
        family == sock.family and (host, port or place[1]) == place[:2]
        for family, _, _, _, (host, port, *_) in wanted
    )


def claim(address: Address) -> Inherited | None:
    """The inherited socket that listens at this address, if there is one; it is given out once.

    Port 0 is any port of that host.
    """
    with _lock:
        _take()
        for inherited in _unclaimed:
            with _borrowed(inherited.fd) as sock:
                found = sock is not None and _listens_at(sock, address)
            if found:
                _unclaimed.remove(inherited)
                inherited.reported = True
                return inherited
    return None


def give_back(inherited: Inherited) -> None:
    """Keep a supervisor's socket for the next server of this process."""
    with _lock:
        _unclaimed.append(inherited)


def share(fds: Sequence[int], sharing: Sharing) -> None:
    """Let servers of this process listen at these sockets, which other workers have as well."""
    with _lock:
        _unclaimed.extend(Inherited(fd, _SHARED, sharing=sharing) for fd in fds)


def check_claimed(addresses: Sequence[str]) -> None:
    """See that a server with these addresses has left nobody waiting at an inherited socket.

    A supervisor's may be for another server of this process, or for something else: the log has a
    warning. Of a predecessor's sockets none may be left: ``ConnectError``.
    """
    with _lock:
        for inherited in _unclaimed:
            if inherited.reported:
                continue
            where = f"{_describe(inherited.fd)}, which is none of {', '.join(addresses)}"
            if inherited.handed_over:
                msg = (
                    f"the predecessor handed over {where}: its clients would wait there for ever. "
                    "To give an address up, stop one server and start the other"
                )
                raise ConnectError(msg)
            inherited.reported = True
            _log.warning(
                "inherited descriptor %d is %s: it stays open, and clients wait there until "
                "something else in this process serves them",
                inherited.fd,
                where,
            )


def _describe(fd: int) -> str:
    with _borrowed(fd) as sock:
        if sock is None:
            return os.readlink(f"/proc/self/fd/{fd}")
        place = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            return f"unix://{place}"
        return f"tcp://{place[0]}:{place[1]}"


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - a thread that the child does not have may hold the old one
    _lock = threading.Lock()
    _unclaimed.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- telling others how far we are ----


def _notify_address(name: str) -> str:
    return f"\0{name[1:]}" if name.startswith("@") else name


def notify(state: str) -> None:
    """Tell who started this process, if it wants to know: sd_notify(3)."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), _notify_address(name))
        except OSError as error:
            _log.warning("can't tell %s at $NOTIFY_SOCKET (%s): %s", state, name, error.strerror)


def tell_ready() -> None:
    """Tell that this process serves; from now on the predecessor's supervisor is ours."""
    notify("READY=1")
    if _predecessor is not None and os.environ.get("NOTIFY_SOCKET") == _predecessor:
        del os.environ["NOTIFY_SOCKET"]
        if _SUPERVISOR in os.environ:
            os.environ["NOTIFY_SOCKET"] = os.environ.pop(_SUPERVISOR)


def predecessor_waits() -> bool:
    """Whether a predecessor lives that may still decide to go on without us."""
    if _predecessor is None:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_notify_address(_predecessor))
        except OSError:
            return False
        return True


# ---- the successor ----

# LISTEN_PID is known in the new process only, and its descriptors have to be 3, 4, ...: this runs
# there, and becomes the command. It first moves what it has out of the way of where it has to go.
_LAUNCH = """\
import fcntl, os, sys
given, command = [int(fd) for fd in sys.argv[1].split(",")], sys.argv[2:]
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + len(given)) for fd in given]
for fd in given:
    os.close(fd)
for place, fd in enumerate(moved, 3):
    os.dup2(fd, place)
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"can't run {command[0]}: {error.strerror}")
"""


def start_successor(
    command: Sequence[str],
    descriptors: Sequence[tuple[str, int]],
    env: Mapping[str, str] | None,
    timeout: float,
    still_wanted: Callable[[], bool],
) -> subprocess.Popen[bytes]:
    """Start a process with these named descriptors, and return it when it says that it serves.

    It is killed, and ``ConnectError`` says why, if it ends before or is not ready in ``timeout``
    seconds; the same with ``Error`` when it is not ``still_wanted``.
    """
    import subprocess  # for the few who hand over: `import shmrpc` is light

    fds = [fd for _, fd in descriptors]
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, ",".join(map(str, fds)), *command]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        # An abstract name: no file is left, whoever is killed. Who else writes there is found out.
        name = f"@shmrpc-{os.getpid()}-{secrets.token_hex(8)}"
        sock.bind(_notify_address(name))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.setblocking(False)
        environment = dict(os.environ if env is None else env)
        for variable in ("LISTEN_PIDFDID", _SUPERVISOR):
            environment.pop(variable, None)
        if "NOTIFY_SOCKET" in os.environ:
            environment[_SUPERVISOR] = os.environ["NOTIFY_SOCKET"]
        environment["NOTIFY_SOCKET"] = name
        environment["LISTEN_FDS"] = str(len(fds))
        environment["LISTEN_FDNAMES"] = ":".join(role for role, _ in descriptors)
        try:
            process = subprocess.Popen(launch, env=environment, pass_fds=fds)  # noqa: S603
        except OSError as error:
            msg = f"can't start a successor, {command[0]!r}: {error.strerror}"
            raise ConnectError(msg) from error
        try:
            _wait_ready(process, command, sock, timeout, still_wanted)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process


def _wait_ready(
    process: subprocess.Popen[bytes],
    command: Sequence[str],
    sock: socket.socket,
    timeout: float,
    still_wanted: Callable[[], bool],
) -> None:
    who = f"the successor {command[0]!r} (pid {process.pid})"
    deadline = time.monotonic() + timeout
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        ready = _is_ready(sock, process.pid)
        status = process.poll()
        if status is not None:
            msg = f"{who} ended with status {status} instead of serving; this server goes on"
            raise ConnectError(msg)
        if not still_wanted():
            msg = f"this server was stopped while {who} was starting, which was killed"
            raise Error(msg)
        if ready:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            msg = (
                f"{who} was not ready within {timeout:g} s and was killed; this server goes on. "
                "Ready is who sends READY=1 to $NOTIFY_SOCKET, as Server.start does"
            )
            raise ConnectError(msg)
        # Its end and a stop of ours are looked for: neither comes by a descriptor.
        poll.poll(min(left, _LOOK_SECONDS) * 1000)


def _is_ready(sock: socket.socket, pid: int) -> bool:
    """Whether this process has sent ``READY=1``; anybody could write to an abstract name."""
    size = struct.calcsize("3i")
    while True:
        try:
            data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(size))
        except BlockingIOError:
            return False
        for level, kind, content in ancillary:
            if (level, kind) != (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) or len(content) < size:
                continue
            sender = struct.unpack("3i", content[:size])[0]
            if sender == pid and b"READY=1" in data.split(b"\n"):
                return True
