"""``shmrpc ping``: round trips to a server's core, like ping(8)."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import click

import shmrpc
from shmrpc import address as addresses

from .completing import complete_address
from .errors import CallFailed, explain, one_line
from .options import check_address, check_interval, check_seconds
from .output import microseconds

__all__ = ["ping"]


@dataclass
class _Statistics:
    """What the summary says."""

    sent: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.sent - len(self.seconds)


@click.command(name="ping")
@click.argument("address", callback=check_address, shell_complete=complete_address)
@click.option("-c", "--count", type=click.IntRange(min=1), help="Stop after so many pings.")
@click.option(
    "-i",
    "--interval",
    type=float,
    callback=check_interval,
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Seconds between two pings.",
)
@click.option(
    "--timeout",
    type=float,
    callback=check_seconds,
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="Seconds to wait for a connection or an answer.",
)
def ping(*, address: str, count: int | None, interval: float, timeout: float) -> int:
    """Measure round trips to the server at ADDRESS.

    The server's core answers, no handler does: a server that is busy, but alive, answers too.
    Without --count it goes on until Ctrl-C.

    \b
    Examples:
      shmrpc ping calc
      shmrpc ping calc -c 100 -i 0.01

    Exit status: 0 when every ping was answered, 1 when the server can't be reached or one was not,
    130 after Ctrl-C.
    """  # noqa: D301 - click wants the character \b itself
    name = str(addresses.parse(address))
    statistics = _Statistics()
    try:
        client = shmrpc.connect(address, timeout=timeout)
    except shmrpc.Error as error:
        raise CallFailed(explain(error)) from error
    with client:
        click.echo(f"PING {name}")
        try:
            _ping_all(client, name, statistics, count, interval, timeout)
        finally:
            _summarize(name, statistics)
    return CallFailed.exit_code if statistics.lost else 0


def _ping_all(
    client: shmrpc.Client,
    name: str,
    statistics: _Statistics,
    count: int | None,
    interval: float,
    timeout: float,
) -> None:
    for number in itertools.count(1):
        statistics.sent += 1
        try:
            seconds = client.ping(timeout)
        except shmrpc.Error as error:
            click.echo(f"no answer from {name}: seq={number} {one_line(explain(error))}")
        except KeyboardInterrupt:
            statistics.sent -= 1  # it was not lost, nobody waited for it any more
            raise
        else:
            statistics.seconds.append(seconds)
            click.echo(f"answer from {name}: seq={number} time={microseconds(seconds)} us")
        if number == count:
            return
        time.sleep(interval)


def _summarize(name: str, statistics: _Statistics) -> None:
    seconds = statistics.seconds
    lost = 100 * statistics.lost / max(1, statistics.sent)
    click.echo(f"\n--- {name} ping statistics ---")
    click.echo(f"{statistics.sent} sent, {len(seconds)} answered, {lost:.0f} % lost")
    if seconds:
        average = sum(seconds) / len(seconds)
        values = "/".join(map(microseconds, (min(seconds), average, max(seconds))))
        click.echo(f"round trip min/avg/max = {values} us")
