"""Who listens in the rendezvous directory: the sockets of services that have a name."""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass

import shmrpc
from shmrpc import address as addresses

from .errors import Failure

__all__ = ["Place", "find_places", "live_addresses", "lock_is_held", "locked_by"]

_SUFFIX = ".sock"


@dataclass
class Place:
    """One socket file, and what the server behind it may be called."""

    name: str
    path: str
    uid: int

    @property
    def addresses(self) -> list[str]:
        """By its name if it can be, or by its path; it has one of these transports."""
        try:
            shm = str(addresses.parse(f"shm://{self.name}"))
        except shmrpc.ConnectError:
            shm = f"shm://{self.path}"
        return [shm, f"unix://{self.path}"]

    @property
    def is_locked(self) -> bool:
        """Whether a server holds the lock of its socket, which the kernel drops when it dies."""
        return lock_is_held(f"{self.path}.lock")


def find_places(directory: str) -> list[Place]:
    """The sockets in this directory, by name; ``Failure`` if it can't be read."""
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        msg = f"can't read the rendezvous directory {directory}: {error.strerror}"
        raise Failure(msg) from error
    found = []
    for entry in sorted(entry for entry in entries if entry.endswith(_SUFFIX)):
        path = os.path.join(directory, entry)
        try:
            status = os.lstat(path)
        except OSError:  # it has just gone
            continue
        if stat.S_ISSOCK(status.st_mode):
            found.append(Place(entry.removesuffix(_SUFFIX), path, status.st_uid))
    return found


def live_addresses() -> list[tuple[str, int]]:
    """The addresses in the rendezvous directory that have a live server, each with its uid."""
    places = find_places(addresses.rendezvous_directory())
    return [(place.addresses[0], place.uid) for place in places if place.is_locked]


def lock_is_held(path: str) -> bool:
    """Whether anybody holds this lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def locked_by(path: str) -> int | None:
    """The pid that a server wrote into its lock."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None
