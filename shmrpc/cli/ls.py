"""``shmrpc ls``: the servers in the rendezvous directory."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import click

import shmrpc
from shmrpc import address as addresses

from .columns import Columns
from .errors import one_line
from .output import console, count, duration, microseconds
from .places import Place, find_places, locked_by
from .watching import Look, Watcher

__all__ = ["ls"]

_PATIENCE_SECONDS = 1.0
_PINGS = 5  # the first wakes the server up; the best says what a round trip costs
_PARALLEL = 8  # servers that do not answer are waited for at the same time
_RATE_SECONDS = 0.25  # over which calls are counted


@dataclass
class _Found:
    """One process that serves, or a socket. What could not be found out is None."""

    name: str
    alive: bool
    pid: int | None
    uid: int
    address: str
    status: str | None = None
    uptime_seconds: float | None = None
    connections: int | None = None
    calls_per_second: float | None = None
    ping_seconds: float | None = None
    problem: str | None = None


@click.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
@click.option("--all", "-a", "show_all", is_flag=True, help="Also show sockets of dead servers.")
def ls(*, as_json: bool, show_all: bool) -> None:
    """Show which servers are alive in the rendezvous directory.

    That is $SHMRPC_DIR, else $XDG_RUNTIME_DIR/shmrpc, else /tmp/shmrpc-UID: where services with a
    name listen. Servers at other paths and at tcp:// addresses are not there to be seen. Of a
    server with several processes each is shown.

    \b
    Examples:
      shmrpc ls
      shmrpc ls --json | jq '.[].address'

    With --json each process is an object with name, alive, pid, uid, address, status ("serving" or
    "draining"), uptime_seconds, connections (ours among them), calls_per_second, ping_seconds
    (null without an answer) and problem (why there was none, or null).
    """  # noqa: D301 - click wants the character \b itself
    directory = addresses.rendezvous_directory()
    with ThreadPoolExecutor(_PARALLEL) as pool:
        looks = pool.map(_look, find_places(directory))
        found = [entry for entries in looks for entry in entries if entry.alive or show_all]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=2))
    elif found:
        console().print(_table(found))
    else:
        click.echo(f"no live servers in {one_line(directory)}", err=True)


def _look(place: Place) -> list[_Found]:
    """Find out about one socket: the processes behind it."""
    found = _Found(place.name, alive=False, pid=None, uid=place.uid, address=place.addresses[0])
    looks = _processes(place, found)
    if not looks:
        # Asking for the lock comes last: holding it, even for an instant, could get in the way
        # of a server that is just starting.
        found.alive = found.ping_seconds is not None or place.is_locked
        if found.alive:
            found.pid = locked_by(f"{place.path}.lock")
        return [found]
    return [
        replace(
            found,
            alive=True,
            pid=look.pid,
            uid=look.uid,
            status=look.status,
            uptime_seconds=look.uptime_seconds,
            connections=look.connections,
            calls_per_second=look.calls_per_second,
        )
        for look in looks
    ]


def _processes(place: Place, found: _Found) -> list[Look]:
    """Look twice, to see how many calls there are in a second, and ping it in between."""
    # Looking is harmless, whoever's server it is; whether we may is for that server to say.
    watcher = Watcher(
        place.addresses[0], watch=False, timeout=_PATIENCE_SECONDS, allow_uids=[place.uid]
    )
    started = time.monotonic()
    try:
        watcher.look()
    except shmrpc.Error as error:
        found.problem = one_line(str(error))
        # One that refuses to tell of itself may serve all the same; one that is silent does not.
        if time.monotonic() - started < _PATIENCE_SECONDS:
            found.problem = None
            _ping_any(found, place)
        return []
    try:
        _ping_any(found, place)
        time.sleep(max(0.0, started + _RATE_SECONDS - time.monotonic()))
        return watcher.look()
    except shmrpc.Error as error:
        found.problem = found.problem or one_line(str(error))
        return []
    finally:
        watcher.close()


def _ping_any(found: _Found, place: Place) -> None:
    """Ping it by the transport that it has."""
    for address in place.addresses:
        if _ping(found, address):
            break


def _ping(found: _Found, address: str) -> bool:
    """Note how long a round trip to this address takes, or the first reason why there is none."""
    try:
        with shmrpc.connect(address, timeout=_PATIENCE_SECONDS, allow_uids=[found.uid]) as client:
            found.ping_seconds = min(client.ping(_PATIENCE_SECONDS) for _ in range(_PINGS))
    except shmrpc.Error as error:
        found.problem = found.problem or one_line(str(error))
        return False
    found.address = address
    found.problem = None
    return True


def _table(found: list[_Found]) -> Columns:
    cells = [["name", "pid", "uid", "uptime", "connections", "calls/s", "address", "ping"]]
    cells += [
        [
            one_line(entry.name),
            count(entry.pid, grouped=False),
            str(entry.uid),
            duration(entry.uptime_seconds),
            count(entry.connections),
            count(entry.calls_per_second),
            one_line(entry.address),
            _ping_text(entry),
        ]
        for entry in found
    ]
    return Columns(cells, left=["address"])


def _ping_text(entry: _Found) -> str:
    if not entry.alive:
        return "dead"
    if entry.ping_seconds is None:
        return "no answer"
    return f"{microseconds(entry.ping_seconds)} us"
