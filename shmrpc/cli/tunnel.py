"""``shmrpc tunnel``: bytes between shared memory and sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import TYPE_CHECKING

import click

from shmrpc.errors import Error
from shmrpc.sidecar.tunnel import Tunnel

from .errors import Failure, explain
from .options import check_address, check_interval

if TYPE_CHECKING:
    from typing import Any

__all__ = ["tunnel"]


@click.command(name="tunnel")
@click.option(
    "--listen",
    required=True,
    callback=check_address,
    metavar="ADDRESS",
    help="Accept connections here.",
)
@click.option(
    "--to", required=True, callback=check_address, metavar="ADDRESS", help="Connect each to there."
)
@click.option("--allow-uid", multiple=True, type=int, metavar="UID", help="Who else may connect.")
@click.option("--allow-remote", is_flag=True, help="Let tcp listen at other than loopback.")
@click.option(
    "--grace",
    type=float,
    callback=check_interval,
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="Seconds that connections get to end when it stops.",
)
def tunnel(**options: Any) -> None:
    """Carry bytes between shared memory and sockets, until SIGTERM or Ctrl-C.

    shm:// is a byte stream over shared memory, as shmrpc.aio.open_connection and servers with an
    installed loop speak it; tcp:// and unix:// are plain sockets, for programs that know nothing
    else.

    \b
    Examples:
      shmrpc tunnel --listen tcp://127.0.0.1:8080 --to shm://web    a browser to a server on shm
      shmrpc tunnel --listen shm://db --to tcp://127.0.0.1:5432     a client on shm to a database
    """  # noqa: D301 - click wants the character \b itself
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        asyncio.run(_run(**options))
    except Error as error:
        raise Failure(explain(error)) from error


async def _run(
    *, listen: str, to: str, allow_uid: tuple[int, ...], allow_remote: bool, grace: float
) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    service = Tunnel(listen, to, allow_uids=allow_uid, allow_remote=allow_remote)
    try:
        await service.start()
        click.echo(f"tunnel at {service.address} to {to} (pid {os.getpid()})", err=True)
        await ended.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one ends it at once
            loop.remove_signal_handler(number)
        await service.stop(grace)
