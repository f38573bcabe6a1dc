"""``shmrpc demo``: shared memory, Unix sockets and TCP beside each other, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import shmrpc
from shmrpc.bench.machine import describe_machine

from .columns import Columns
from .errors import CallFailed, Ended, explain
from .measure import PAYLOAD_BYTES, Figures, measure
from .options import check_seconds
from .output import console, microseconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from rich.console import Console

__all__ = ["demo"]

_ROUNDS = 5
_TEMPORARY_MAX = 64  # a socket's path has 107 bytes
_STOP_SECONDS = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command(name="demo")
@click.option(
    "--seconds",
    type=click.FloatRange(0.3, 300.0),
    callback=check_seconds,
    default=7.5,
    show_default=True,
    help="How long to measure, all transports together.",
)
def demo(*, seconds: float) -> None:
    """Compare shared memory with Unix sockets and TCP, on this machine.

    Starts a server in a process of its own and calls it over shm, unix and tcp in turns: the same
    method, through the same API, one call at a time. Takes about ten seconds and leaves nothing
    behind.

    \b
    The table's columns:
      p50, p99     microseconds that half of the calls, and 99 of 100, took at most
      calls/s      calls in a second, one at a time
      CPU          microseconds of CPU time that a call cost client and server together
      p50 vs shm   how many times as long as over shared memory
    """  # noqa: D301 - click wants the character \b itself
    out = console()
    figures = {transport: Figures() for transport in ("shm", "unix", "tcp")}
    out.print(describe_machine(), soft_wrap=True)
    try:
        _run(out, figures, seconds)
    except shmrpc.Error as error:
        raise CallFailed(f"the demo failed: {explain(error)}") from error
    out.print(_table(figures))
    out.print(_conclusion(figures), soft_wrap=True)


def _run(out: Console, figures: Mapping[str, Figures], seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_signals())
        directory = _make_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        process = _start_server(directory)
        stack.callback(_stop_server, process)
        clients = {
            transport: stack.enter_context(shmrpc.connect(address))
            for transport, address in zip(figures, _addresses_of(process), strict=True)
        }
        turns = _ROUNDS * len(clients)
        steps = measure(clients, process.pid, figures, rounds=_ROUNDS, turn_seconds=seconds / turns)
        _show_progress(out, steps, turns)


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Turn the first signal that asks us to end into an exception, so that we clean up.

    Those that follow are ignored: cleaning up takes no longer than a few seconds.
    """

    def end(number: int, frame: FrameType | None) -> None:
        _ = frame
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    # One that is ignored stays so: nohup(1) did that.
    before = {
        number: signal.getsignal(number)
        for number in _SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_directory() -> str:
    """Make a directory for the sockets: the usual place may be too long for a socket's path."""
    usual = tempfile.gettempdir()
    where = usual if len(os.fsencode(usual)) <= _TEMPORARY_MAX else "/tmp"  # noqa: S108
    return tempfile.mkdtemp(prefix="shmrpc-demo-", dir=where)


# ---- the server's process ----


def _start_server(directory: str) -> subprocess.Popen[str]:
    addresses = [
        f"shm://{directory}/shm.sock",
        f"unix://{directory}/unix.sock",
        "tcp://127.0.0.1:0",
    ]
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "shmrpc.cli.demo_server", directory, *addresses],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the demo, which then stops its server
    )


def _addresses_of(process: subprocess.Popen[str]) -> list[str]:
    """Wait until the server listens; returns where."""
    assert process.stdout is not None  # noqa: S101
    line = process.stdout.readline()
    answer = json.loads(line) if line else {"error": "its process ended"}
    if "error" in answer:
        raise CallFailed(f"the demo's server did not start: {answer['error']}")
    return list(answer["addresses"])


def _stop_server(process: subprocess.Popen[str]) -> None:
    """End the server's input, which ends the server."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- what is printed ----


def _show_progress(out: Console, steps: Iterator[None], turns: int) -> None:
    """Run the steps, under a bar if somebody is watching."""
    if not sys.stdout.isatty():
        for _ in steps:
            pass
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    # It is drawn between turns only: a thread that draws would take time from what is measured.
    with Progress(*columns, console=out, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("calling over shm, unix and tcp in turns", total=turns)
        for _ in steps:
            progress.update(task, advance=1, refresh=True)


def _table(figures: Mapping[str, Figures]) -> Columns:
    base = figures["shm"].percentile(0.5)
    cells = [["transport", "p50 us", "p99 us", "calls/s", "CPU us/call", "p50 vs shm"]]
    cells += [
        [
            transport,
            microseconds(row.percentile(0.5)),
            microseconds(row.percentile(0.99)),
            f"{row.calls_per_second:,.0f}",
            microseconds(row.cpu_per_call),
            _times(row.percentile(0.5), base),
        ]
        for transport, row in figures.items()
    ]
    title = f"Echo of {PAYLOAD_BYTES} bytes, one call at a time, in {_ROUNDS} rounds"
    return Columns(cells, title=title)


def _times(value: float, base: float) -> str:
    return f"{value / base:.1f}x"


def _conclusion(figures: Mapping[str, Figures]) -> str:
    """Say in one sentence what came out, also when shared memory lost."""
    shm = figures["shm"]
    p50, p99, cpu = shm.percentile(0.5), shm.percentile(0.99), shm.cpu_per_call
    parts = [
        f"{_times(row.percentile(0.5), p50)} as long over {transport} "
        f"(99th percentile {_times(row.percentile(0.99), p99)}, "
        f"CPU {_times(row.cpu_per_call, cpu)})"
        for transport, row in figures.items()
        if transport != "shm"
    ]
    others = [row.percentile(0.5) for transport, row in figures.items() if transport != "shm"]
    verdict = "" if p50 <= min(others) else ", so shared memory was not the fastest here"
    return (
        f"A call over shared memory took {microseconds(p50)} us at the median; the same call took "
        f"{' and '.join(parts)}{verdict}."
    )
