"""The processes of a benchmark, seen from inside: `python -m benchmarks.peers ROLE CONTENDER ...`.

`serve` starts the contender's server and says where it listens. `drive` is the client: it takes
commands, one JSON object a line, and answers each with one line. harness.py is the other end.
Both end with the process that started them, however that ends, and leave no files.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.contenders import FlowConnection, load
from benchmarks.measure import measure, measure_flow

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.contenders import Connection, Contender

    Say = Callable[[dict[str, Any]], None]

_PR_SET_PDEATHSIG = 1


class _Driver:
    """The client process: connects, measures and hangs up as it is told."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._connection: Connection | None = None

    def connect(self, address: str) -> None:
        self._connection = self._contender.connect(address)

    def measure(self, **how: int) -> dict[str, Any]:
        if self._connection is None:
            raise ConnectionError
        echo = self._connection.echo
        return asdict(measure(echo, thread_safe=self._contender.thread_safe, **how))

    def move(self, direction: str, flow: str, **when: int) -> dict[str, Any]:
        if not isinstance(self._connection, FlowConnection):
            raise TypeError("it moves no items")
        return asdict(measure_flow(self._connection.flow(direction, flow), **when))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"}


def _drive(contender: Contender, say: Say) -> None:
    with closing(_Driver(contender)) as driver:
        commands: dict[str, Callable[..., dict[str, Any] | None]] = {
            "connect": driver.connect,
            "measure": driver.measure,
            "move": driver.move,
            "close": driver.close,
        }
        say({})
        for line in sys.stdin:
            command = json.loads(line)
            try:
                say(commands[command.pop("do")](**command) or {})
            except Exception as error:  # whatever a contender raises is its result
                say(_failure(error))


def _serve(contender: Contender, directory: str, say: Say) -> None:
    with closing(contender.start(directory)) as service:
        say({"address": service.address})
        service.serve()


def _end_with_parent(parent: int) -> None:
    """Turn the death of the parent into SIGTERM and that into SystemExit; leave Ctrl-C to it."""

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that a second one spoils no cleaning up
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit


def _keep_stdout() -> Say:
    """Answer on what is stdout now; what a contender prints by itself goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return say


def main() -> None:
    """Be the process that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("serve", "drive"))
    parser.add_argument("contender")
    parser.add_argument("--cpus", type=int, nargs="+", help="run on these only")
    parser.add_argument("--directory", required=True, help="for sockets; removed at the end")
    parser.add_argument("--parent", type=int, required=True, help="end when it does")
    options = parser.parse_args()
    say = _keep_stdout()
    try:
        _end_with_parent(options.parent)
        if options.cpus:
            os.sched_setaffinity(0, options.cpus)
        # Only now: a contender may look at once how many CPUs it has.
        contender = load(options.contender)
        if options.role == "serve":
            _serve(contender, options.directory, say)
        else:
            _drive(contender, say)
    except Exception as error:
        say(_failure(error))
        raise
    finally:
        if options.role == "serve":
            shutil.rmtree(options.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
