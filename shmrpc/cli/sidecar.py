"""``shmrpc sidecar``: stand between callers and servers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

import click

from shmrpc.errors import Error
from shmrpc.sidecar import Config, ConfigError, Sidecar, load
from shmrpc.sidecar.config import of_options

from .errors import Failure, explain
from .options import check_interval, check_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = ["sidecar"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_log = logging.getLogger("shmrpc.sidecar")


@click.command(name="sidecar")
@click.argument("config", required=False, metavar="[CONFIG.toml]", type=click.Path())
@click.option("--listen", multiple=True, metavar="ADDRESS", help="Accept calls here. Repeatable.")
@click.option(
    "--upstream", multiple=True, metavar="ADDRESS", help="Pass them on to there. Repeatable."
)
@click.option("--http", metavar="HOST:PORT", help="Health and Prometheus metrics over HTTP.")
@click.option("--allow-uid", multiple=True, type=int, metavar="UID", help="Who else may connect.")
@click.option("--allow-remote", is_flag=True, help="Let tcp listen at other than loopback.")
@click.option(
    "--timeout", type=float, callback=check_seconds, metavar="SECONDS", help="Of each call."
)
@click.option("--retries", type=int, metavar="N", help="Repeat safe calls so often.")
@click.option("--ca", metavar="FILE", help="PEM: who signs the certificates of the other side.")
@click.option("--cert", metavar="FILE", help="PEM: our certificate, for grpcs.")
@click.option("--key", metavar="FILE", help="PEM: its key.")
@click.option("--check", is_flag=True, help="Read the configuration, say what is wrong, and end.")
@click.option(
    "--grace",
    type=float,
    callback=check_interval,
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="Seconds that calls under way get to end when it stops.",
)
def sidecar(*, config: str | None, check: bool, grace: float, **options: object) -> None:
    """Accept calls at some addresses and pass them on to others, until SIGTERM or Ctrl-C.

    Give either CONFIG.toml, which may have several routes, or --listen and --upstream. On SIGHUP
    the file is read again; calls under way go on, and if the new file is wrong the old one stays.
    On SIGTERM it refuses new calls, lets those under way end, and exits with status 0.

    \b
    Examples:
      shmrpc sidecar --listen shm://orders --upstream tcp://127.0.0.1:7000
      shmrpc sidecar --listen tcp://127.0.0.1:7000 --upstream shm://orders
      shmrpc sidecar /etc/shmrpc/sidecar.toml
    """  # noqa: D301 - click wants the character \b itself
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # we say ourselves what it would
    try:
        settings = _settings(config, options)
    except ConfigError as error:
        raise Failure(str(error)) from error
    if check:
        click.echo(f"{config or 'command line'}: right", err=True)
        return
    _run(settings, config, grace)


def _settings(path: str | None, options: dict[str, object]) -> Config:
    given = {key: value for key, value in options.items() if value not in (None, (), False)}
    if path is not None:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"CONFIG.toml says it all: it does not go with {names}")
        return load(path)
    if not given.get("listen") or not given.get("upstream"):
        raise click.UsageError("give a CONFIG.toml, or --listen and --upstream")
    uids = given.pop("allow_uid", ())
    assert isinstance(uids, tuple)  # noqa: S101 - click's
    tls = {name: given.pop(name) for name in ("ca", "cert", "key") if name in given}
    listen, upstream = given.pop("listen"), given.pop("upstream")
    assert isinstance(listen, tuple)  # noqa: S101
    assert isinstance(upstream, tuple)  # noqa: S101
    return of_options(listen, upstream, tls=tls or None, allow_uids=list(uids) or None, **given)


def _run(settings: Config, path: str | None, grace: float) -> None:
    with _signals() as wait:
        try:
            service = Sidecar(settings)
        except Error as error:
            raise Failure(explain(error)) from error
        try:
            try:
                service.start()
            except Error as error:
                raise Failure(explain(error)) from error
            where = ", ".join(service.addresses)
            http = f", http at {service.http_address}" if service.http_address else ""
            click.echo(f"sidecar at {where}{http} (pid {os.getpid()})", err=True)
            while wait() == signal.SIGHUP:
                _reload(service, path)
        finally:
            service.stop(grace)


def _reload(service: Sidecar, path: str | None) -> None:
    if path is None:
        _log.warning("SIGHUP: there is no file to read again")
        return
    try:
        service.reload(load(path))
    except Error as error:
        _log.error("the configuration stays as it was: %s", error)
    else:
        where = ", ".join(service.addresses)
        click.echo(f"reloaded {path}: at {where}", err=True)
        sys.stderr.flush()


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Give a function that waits for the next signal; after one that ends us others interrupt."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ending = False
    pending: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        _ = frame
        if ending and number != signal.SIGHUP:
            raise KeyboardInterrupt(number)

    def wait() -> int:
        nonlocal ending
        while not pending:
            pending.extend(number for number in reader.recv(64) if number in _SIGNALS)
        number = pending.pop(0)
        ending = number != signal.SIGHUP
        return number

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield wait
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
