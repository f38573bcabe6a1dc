"""``shmrpc top``: what servers do just now, again and again."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

import shmrpc

from .columns import Columns
from .completing import complete_address
from .errors import CallFailed, explain, one_line
from .options import check_addresses, check_seconds
from .output import console, count, duration, seconds_text, size_text
from .places import live_addresses
from .watching import Look, Watcher

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

__all__ = ["top"]

_PARALLEL = 8
_METHODS = 12  # rows of each table that are shown
_SLOWEST = 8


@click.command(name="top")
@click.argument(
    "addresses",
    metavar="[ADDRESS]...",
    nargs=-1,
    callback=check_addresses,
    shell_complete=complete_address,
)
@click.option(
    "-i",
    "--interval",
    type=float,
    callback=check_seconds,
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Look for one interval, print, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array a look, each on a line.")
def top(*, addresses: tuple[str, ...], interval: float, once: bool, as_json: bool) -> None:
    """Show what the servers at ADDRESSES do, or all that have a name; Ctrl-C ends it.

    A thread of its own answers in each server: it does so also when all its handlers are stuck.
    While this runs servers time their handlers, which costs each call about a microsecond.

    \b
    The columns:
      calls/s        calls started in a second
      p50, p99       what half of the handlers, and 99 of 100, took at most
      in flight      calls that have begun and not ended
      queued, delay  calls that wait for a worker, and how long they do
      ring           how full the fullest connection's ring is
      arena          shared memory for large values that it sends: in use, of what there is
      pinned         large values of its callers that it holds: how many, how much
      sleeps/s       waits that ended in sleeping; wakes/s: bells rung for the peers
    Below are the methods called most, and the calls that run longest just now.

    \b
    Examples:
      shmrpc top
      shmrpc top calc -i 5
      shmrpc top calc --once --json | jq '.[].calls_per_second'

    Exit status: 0; 1 with --once if one of the servers can't be asked; 130 after Ctrl-C.
    """  # noqa: D301 - click wants the character \b itself
    looks = _looks(addresses, interval)
    with contextlib.closing(looks):
        if as_json or once or not sys.stdout.isatty():
            _print(looks, as_json=as_json, once=once)
        else:
            _show(looks)


def _print(looks: Iterator[tuple[list[Look], list[str]]], *, as_json: bool, once: bool) -> None:
    """Print look after look, one below the other."""
    next(looks)  # the first has no rates
    for found, problems in looks:
        if as_json:
            click.echo(json.dumps([asdict(look) for look in found]))
            sys.stdout.flush()
        else:
            console().print(_screen(found, problems if not once else []))
        if once:
            if problems:
                raise CallFailed("; ".join(problems))
            return


def _show(looks: Iterator[tuple[list[Look], list[str]]]) -> None:
    """Show the last look in the place of the one before."""
    with Live(console=console(), screen=True, auto_refresh=False) as live:
        for found, problems in looks:
            live.update(_screen(found, problems), refresh=True)


def _looks(wanted: Sequence[str], interval: float) -> Generator[tuple[list[Look], list[str]]]:
    """What there is to see, and why some can't be seen; at once and after each interval."""
    watchers: dict[str, Watcher] = {}
    try:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            while True:
                started = time.monotonic()
                targets = [(address, None) for address in wanted] or live_addresses()
                for address, uid in targets:
                    if address not in watchers:
                        others = [] if uid is None else [uid]
                        watchers[address] = Watcher(address, watch=True, allow_uids=others)
                for address in set(watchers) - {address for address, _ in targets}:
                    watchers.pop(address).close()
                answers = list(pool.map(_look, [watchers[address] for address, _ in targets]))
                found = [look for answer in answers if isinstance(answer, list) for look in answer]
                yield found, [answer for answer in answers if isinstance(answer, str)]
                time.sleep(max(0.0, started + interval - time.monotonic()))
    finally:
        for watcher in watchers.values():
            watcher.close()


def _look(watcher: Watcher) -> list[Look] | str:
    try:
        return watcher.look()
    except shmrpc.Error as error:
        return one_line(explain(error))


# ---- tables ----


def _screen(found: list[Look], problems: list[str]) -> Group:
    parts: list[Columns | Text] = [_servers(found)]
    methods = [(look, method) for look in found for method in look.methods]
    if methods:
        parts.append(_methods(methods))
    slowest = [(look, call) for look in found for call in look.slowest]
    if slowest:
        parts.append(_slowest(slowest))
    return Group(*parts, *(Text(problem) for problem in problems))


def _servers(found: list[Look]) -> Columns:
    cells = [
        [
            *("address", "pid", "up", "conns", "calls/s", "p50", "p99"),
            *("in flight", "queued", "delay", "ring", "arena", "pinned", "sleeps/s", "wakes/s"),
        ]
    ]
    for look in found:
        state = "" if look.status == "serving" else f" ({look.status})"
        cells.append(
            [
                one_line(look.address) + state,
                str(look.pid),
                duration(look.uptime_seconds),
                count(look.connections),
                count(look.calls_per_second),
                seconds_text(look.p50_seconds),
                seconds_text(look.p99_seconds),
                count(look.in_flight),
                count(look.queued),
                seconds_text(look.queue_delay_seconds) if look.queue_delay_seconds else "-",
                f"{look.fullest_ring_percent}%",
                f"{size_text(look.arena_used_bytes)}/{size_text(look.arena_bytes)}"
                if look.arena_bytes
                else "-",
                f"{look.pinned_blocks} ({size_text(look.pinned_bytes)})"
                if look.pinned_blocks
                else "-",
                count(look.sleeps_per_second),
                count(look.wakeups_per_second),
            ]
        )
    return Columns(cells, keys=2)


def _methods(methods: list[tuple[Look, dict[str, object]]]) -> Columns:
    def weight(entry: tuple[Look, dict[str, object]]) -> tuple[float, float]:
        return -_number(entry[1]["calls_per_second"]), -_number(entry[1]["calls"])

    cells = [["method", "pid", "calls", "calls/s", "p50", "p99"]]
    for look, method in sorted(methods, key=weight)[:_METHODS]:
        p50, p99 = method["p50_seconds"], method["p99_seconds"]
        cells.append(
            [
                one_line(str(method["name"])),
                str(look.pid),
                count(_number(method["calls"])),
                count(_number(method["calls_per_second"])),
                seconds_text(None if p50 is None else _number(p50)),
                seconds_text(None if p99 is None else _number(p99)),
            ]
        )
    return Columns(cells, keys=2)


def _slowest(calls: list[tuple[Look, dict[str, object]]]) -> Columns:
    cells = [["running now", "pid", "for", "caller"]]
    for look, call in sorted(calls, key=lambda entry: -_number(entry[1]["seconds"]))[:_SLOWEST]:
        seconds, peer = call["seconds"], _number(call["peer_pid"])
        cells.append(
            [
                one_line(str(call["method"])),
                str(look.pid),
                seconds_text(_number(seconds)),
                f"{peer:.0f}" if peer > 0 else "-",
            ]
        )
    return Columns(cells, keys=2)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
