"""``shmrpc serve``: run a server that a module defines, in this process or in several."""

from __future__ import annotations

import os
import sys

import click

import shmrpc
from shmrpc.supervisor import Supervisor

from .errors import failure_of
from .options import check_interval
from .running import run_server
from .targets import find_server

__all__ = ["serve"]


@click.command(name="serve")
@click.argument("target", metavar="MODULE[:SERVER]")
@click.option(
    "--grace",
    type=float,
    callback=check_interval,
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="Seconds that calls under way get to end when the server stops.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Serve in N worker processes, which this one looks after.",
)
@click.option("--allow-remote", is_flag=True, help="Let its tcp addresses be other than loopback.")
def serve(*, target: str, grace: float, processes: int | None, allow_remote: bool) -> int:
    """Run the server that MODULE defines, until SIGTERM or Ctrl-C.

    SERVER is the name of a shmrpc.Server or shmrpc.aio.Server in the module, or of a function
    without arguments that makes one; by default it is "server". The current directory is searched
    for the module first.

    On SIGTERM or Ctrl-C it refuses new calls, lets those under way end, and exits with status 0;
    a second one ends it at once.

    With --processes each of N workers imports the module, and all accept from the same sockets: a
    new connection goes to the worker that has the fewest. A worker that dies is replaced, after a
    pause if that happens again and again. SIGHUP reloads: new workers import the module anew, and
    when all serve, the old ones end as above. No worker outlives this process.

    \b
    Examples:
      shmrpc serve calc                the object "server" of calc.py
      shmrpc serve app.services:make   what make() of app/services.py returns
      shmrpc serve calc --processes 4  the same in four processes
    """  # noqa: D301 - click wants the character \b itself
    if processes is not None:
        return _supervise(target, grace, processes, allow_remote=allow_remote)
    server = find_server(target)
    if allow_remote:
        server.allow_remote()
    try:
        run_server(server, grace, lambda where: _tell(target, where, f"pid {os.getpid()}"))
    except shmrpc.Error as error:
        raise failure_of(error) from error
    return 0


def _supervise(target: str, grace: float, processes: int, *, allow_remote: bool) -> int:
    reach = "remote" if allow_remote else "local"
    command = [sys.executable, "-m", "shmrpc.cli.worker", target, repr(grace), reach]
    plural = "process" if processes == 1 else "processes"
    note = f"pid {os.getpid()}, {processes} {plural}"
    supervisor = Supervisor(command, processes, grace, lambda where: _tell(target, where, note))
    try:
        return supervisor.run()
    except shmrpc.Error as error:
        raise failure_of(error) from error


def _tell(target: str, where: list[str], who: str) -> None:
    click.echo(f"serving {target} at {', '.join(where)} ({who})", err=True)
