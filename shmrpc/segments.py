"""The memory that this process writes and its peer reads: creating it, naming it, reserving it.

``create`` gives a descriptor to map and a descriptor for the peer, which can only read. POSIX
shared memory is unlinked before anybody else can see the descriptor, so a SIGKILL leaves nothing
behind; names orphaned in the instant between creating and unlinking are swept by pid.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from dataclasses import dataclass
from typing import Literal

import posix_ipc

from .errors import ConnectError

__all__ = ["HEADER_BYTES", "Backing", "Segment", "create", "sweep"]

Backing = Literal["auto", "shm", "memfd"]

HEADER_BYTES = 4096
_DIRECTORY = "/dev/shm"  # noqa: S108 - where POSIX shared memory lives on Linux
_SEALS = (
    fcntl.F_SEAL_SHRINK
    | fcntl.F_SEAL_GROW
    | 0x0010  # F_SEAL_FUTURE_WRITE, in fcntl from Python 3.13 on
    | fcntl.F_SEAL_SEAL
)


@dataclass
class Segment:
    """Descriptors of one new segment; both are the owner's to close."""

    own_fd: int
    peer_fd: int
    sealed: bool

    def seal(self) -> None:
        """Let nobody resize it or map it writable any more; our own mapping must exist by now."""
        if self.sealed:
            fcntl.fcntl(self.own_fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Close both descriptors; mappings stay."""
        os.close(self.own_fd)
        if self.peer_fd != self.own_fd:
            os.close(self.peer_fd)


def _namespace() -> str:
    """Pids mean something in their own pid namespace only."""
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _create_shm(nbytes: int) -> Segment:
    name = f"/shmrpc-{_namespace()}-{os.getpid()}-{secrets.token_hex(8)}"
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    own_fd = memory.fd
    peer_fd = -1
    try:
        try:
            peer_fd = posix_ipc.SharedMemory(name, read_only=True).fd
        finally:
            memory.unlink()
        os.ftruncate(own_fd, nbytes)
        os.posix_fallocate(own_fd, 0, nbytes)
    except BaseException:
        os.close(own_fd)
        if peer_fd >= 0:
            os.close(peer_fd)
        raise
    return Segment(own_fd, peer_fd, sealed=False)


def _create_memfd(nbytes: int) -> Segment:
    fd = os.memfd_create("shmrpc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return Segment(fd, fd, sealed=True)


def create(nbytes: int, backing: Backing, *, trusted: bool) -> Segment:
    """Make a segment of this size whose memory is reserved now, so that using it never fails later.

    ``trusted`` is whether the peer has our uid; any other gets sealed memory. With ``"auto"``,
    a missing or full /dev/shm also means sealed memory. Raises ``ConnectError``.
    """
    tried = []
    if backing == "shm" and not trusted:
        msg = "backing='shm' can't be sealed, and the peer has another uid; use 'auto' or 'memfd'"
        raise ConnectError(msg)
    if backing in ("auto", "shm") and trusted:
        try:
            return _create_shm(nbytes)
        except (OSError, posix_ipc.Error) as error:
            if getattr(error, "errno", None) == errno.EMFILE:
                tried.append("no descriptors are left (ulimit -n)")
            else:
                tried.append(f"{_DIRECTORY}: {error}")
    if backing in ("auto", "memfd"):
        try:
            return _create_memfd(nbytes)
        except OSError as error:
            tried.append(f"memfd: {error}")
    msg = f"can't reserve {nbytes} bytes of shared memory: {'; '.join(tried)}"
    raise ConnectError(msg)


def sweep() -> list[str]:
    """Remove names whose creator died between creating and unlinking them; returns them."""
    pattern = re.compile(rf"shmrpc-{_namespace()}-(\d+)-[0-9a-f]+")
    removed = []
    try:
        names = os.listdir(_DIRECTORY)
    except OSError:
        return []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or os.path.exists(f"/proc/{match[1]}"):
            continue
        try:
            posix_ipc.unlink_shared_memory(f"/{name}")
        except (OSError, posix_ipc.Error):
            continue  # somebody else's, or swept by another process meanwhile
        removed.append(name)
    return removed
