"""``shmrpc ls``: the servers in the rendezvous directory."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table
from rich.text import Text

import shmrpc
from shmrpc import address as addresses

from .errors import Failure, one_line
from .output import console, microseconds

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ls"]

_SUFFIX = ".sock"
_PATIENCE_SECONDS = 1.0
_PINGS = 5  # the first wakes the server up; the best says what a round trip costs
_PARALLEL = 8  # servers that do not answer are waited for at the same time


@dataclass
class _Found:
    """One socket and who is behind it. What could not be found out is None."""

    name: str
    alive: bool
    pid: int | None
    uid: int
    address: str
    ping_seconds: float | None = None
    problem: str | None = None


@click.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
@click.option("--all", "-a", "show_all", is_flag=True, help="Also show sockets of dead servers.")
def ls(*, as_json: bool, show_all: bool) -> None:
    """Show which servers are alive in the rendezvous directory.

    That is $SHMRPC_DIR, else $XDG_RUNTIME_DIR/shmrpc, else /tmp/shmrpc-UID: where services with a
    name listen. Servers at other paths and at tcp:// addresses are not there to be seen.

    \b
    Examples:
      shmrpc ls
      shmrpc ls --json | jq '.[].address'

    With --json each server is an object with name, alive, pid, uid, address, ping_seconds (null
    without an answer) and problem (why there was none, or null).
    """  # noqa: D301 - click wants the character \b itself
    directory = addresses.rendezvous_directory()
    names = _socket_names(directory)
    with ThreadPoolExecutor(_PARALLEL) as pool:
        found = [
            entry
            for entry in pool.map(lambda name: _look(directory, name), names)
            if entry is not None and (entry.alive or show_all)
        ]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=2))
    elif found:
        console().print(_table(found))
    else:
        click.echo(f"no live servers in {one_line(directory)}", err=True)


def _socket_names(directory: str) -> list[str]:
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        msg = f"can't read the rendezvous directory {directory}: {error.strerror}"
        raise Failure(msg) from error
    return sorted(entry for entry in entries if entry.endswith(_SUFFIX))


def _look(directory: str, entry: str) -> _Found | None:
    """Find out about one socket; None if there is none any more."""
    path = os.path.join(directory, entry)
    try:
        status = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISSOCK(status.st_mode):
        return None
    name = entry.removesuffix(_SUFFIX)
    candidates = _addresses(path, entry)
    found = _Found(name, alive=False, pid=None, uid=status.st_uid, address=candidates[0])
    for address in candidates:
        if _ping(found, address):
            break
    # Who answers lives. Asking for the lock of one that did not comes last: holding it, even for
    # an instant, could get in the way of a server that is just starting.
    found.alive = found.ping_seconds is not None or _lock_is_held(f"{path}.lock")
    if found.alive:
        found.pid = _pid(f"{path}.lock")
    return found


def _addresses(path: str, entry: str) -> list[str]:
    """What the server behind a socket may be called: by its name if it can be, or by its path."""
    name = entry.removesuffix(_SUFFIX)
    try:
        shm = str(addresses.parse(f"shm://{name}"))
    except shmrpc.ConnectError:
        shm = f"shm://{path}"
    return [shm, f"unix://{path}"]


def _ping(found: _Found, address: str) -> bool:
    """Note how long a round trip to this address takes, or the first reason why there is none."""
    try:
        # Looking is harmless, whoever's server it is; whether we may is for that server to say.
        with shmrpc.connect(address, timeout=_PATIENCE_SECONDS, allow_uids=[found.uid]) as client:
            found.ping_seconds = min(client.ping(_PATIENCE_SECONDS) for _ in range(_PINGS))
    except shmrpc.Error as error:
        found.problem = found.problem or one_line(str(error))
        return False
    found.address = address
    found.problem = None
    return True


def _lock_is_held(path: str) -> bool:
    """Whether a server holds the lock of its socket, which the kernel drops when it dies."""
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


def _pid(path: str) -> int | None:
    """Return the pid that a server wrote into its lock."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None


def _table(found: list[_Found]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("name", "pid", "uid", "address", "ping"):
        right = title in ("pid", "uid", "ping")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for entry in found:
        cells: list[RenderableType] = [
            Text(one_line(entry.name)),
            Text("-" if entry.pid is None else str(entry.pid)),
            Text(str(entry.uid)),
            Text(one_line(entry.address)),
            Text(_ping_text(entry)),
        ]
        table.add_row(*cells)
    return table


def _ping_text(entry: _Found) -> str:
    if not entry.alive:
        return "dead"
    if entry.ping_seconds is None:
        return "no answer"
    return f"{microseconds(entry.ping_seconds)} us"
