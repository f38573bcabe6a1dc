"""The processes of a benchmark, seen from inside: `python -m shmrpc.bench.peers ROLE HOME ...`.

`serve` starts the contender's server, says where it listens, and how many calls it has answered.
`drive` is the client: it takes commands, one JSON object a line, and answers each with one line.
`disturb` keeps a CPU busy. harness.py is the other end. All end with the process that started them,
however that ends, and leave no files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from contextlib import closing
from dataclasses import asdict
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

from .contenders import (
    AsyncContender,
    Contender,
    FlowConnection,
    OwnServer,
    UnsupportedError,
    load,
    remove_files,
)
from .figures import Order
from .lifetime import end_with_parent
from .measure import measure, measure_async, measure_flow
from .work import PAYLOAD, answered

if TYPE_CHECKING:
    from collections.abc import Callable

    from .contenders import AsyncConnection, Connection

    Say = Callable[[dict[str, Any]], None]
    Answer = dict[str, Any]


class _Driver:
    """The client process: connects, measures and hangs up as it is told."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._connections: list[Connection] = []

    def connect(self, address: str, count: int) -> Answer:
        for _ in range(count):
            self._connections.append(self._contender.connect(address))
        first = self._connections[0]
        return {"server_pid": first.server_pid if isinstance(first, OwnServer) else None}

    def greet(self) -> None:
        for connection in self._connections:
            connection.echo(PAYLOAD)

    def measure(self, **order: Any) -> Answer:
        thread_safe = self._contender.thread_safe
        return asdict(measure(self._connections[0], Order(**order), thread_safe=thread_safe))

    def move(self, direction: str, flow: str, **how: int) -> Answer:
        connection = self._connections[0]
        if not isinstance(connection, FlowConnection):
            raise UnsupportedError("it moves no items")
        return asdict(measure_flow(connection.flow(direction, flow), **how))

    def answered(self) -> Answer:
        first = self._connections[0]
        return {"answered": first.answered() if isinstance(first, OwnServer) else None}

    def hold_gil(self) -> None:
        _hold_gil()

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        while self._connections:
            self._connections.pop().close()


class _AsyncDriver:
    """The same for a contender whose calls are awaited: its loop runs while it has an order."""

    def __init__(self, contender: AsyncContender) -> None:
        self._contender = contender
        self._loop = contender.new_loop()
        self._connections: list[AsyncConnection] = []

    def connect(self, address: str, count: int) -> Answer:
        for _ in range(count):
            connecting = self._contender.connect_async(address)
            self._connections.append(self._loop.run_until_complete(connecting))
        return {"server_pid": None}

    def greet(self) -> None:
        for connection in self._connections:
            self._loop.run_until_complete(connection.echo(PAYLOAD))

    def measure(self, **order: Any) -> Answer:
        echoes = [connection.echo for connection in self._connections]
        measuring = measure_async(echoes, Order(**order))
        return asdict(self._loop.run_until_complete(measuring))

    def move(self, **_: Any) -> Answer:
        raise UnsupportedError("it moves no items")

    def answered(self) -> Answer:
        return {"answered": None}

    def hold_gil(self) -> None:
        _hold_gil()

    def rest(self, seconds: float) -> None:
        self._loop.run_until_complete(asyncio.sleep(seconds))

    def close(self) -> None:
        while self._connections:
            self._loop.run_until_complete(self._connections.pop().close())


def _start_thread(target: Callable[[], None]) -> None:
    Thread(target=target, daemon=True).start()


@cache
def _hold_gil() -> None:
    """Let another thread compute from now on; once is enough."""
    _start_thread(_burn)


def _burn() -> NoReturn:
    while True:
        sum(range(1000))


def _failure(error: Exception) -> Answer:
    missing = isinstance(error, (UnsupportedError, ImportError))
    kind = "unsupported" if missing else "error"
    text = str(error) if kind == "unsupported" else f"{type(error).__name__}: {error}"
    return {kind: text}


def _obey(driver: _Driver | _AsyncDriver, say: Say) -> None:
    commands: dict[str, Callable[..., Answer | None]] = {
        "connect": driver.connect,
        "greet": driver.greet,
        "measure": driver.measure,
        "move": driver.move,
        "answered": driver.answered,
        "hold_gil": driver.hold_gil,
        "rest": driver.rest,
        "close": driver.close,
    }
    say({})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            say(commands[command.pop("do")](**command) or {})
        except Exception as error:  # whatever a contender raises is its result
            say(_failure(error))


def _drive(contender: Contender | AsyncContender, say: Say) -> None:
    if isinstance(contender, AsyncContender):
        driver: _Driver | _AsyncDriver = _AsyncDriver(contender)
    else:
        driver = _Driver(contender)
    with closing(driver):
        _obey(driver, say)


def _serve(contender: Contender | AsyncContender, directory: str, clients: int, say: Say) -> None:
    def count() -> None:
        for _ in sys.stdin:
            say({"answered": answered()})

    with closing(contender.start(directory, clients)) as service:
        say({"address": service.address})
        _start_thread(count)
        service.serve()


def _keep_stdout() -> Say:
    """Answer on what is stdout now; what a contender prints by itself goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return say


def _allow_many_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Be the process that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("serve", "drive", "disturb"))
    parser.add_argument("home", nargs="?", help="of the contender: MODULE:OBJECT")
    parser.add_argument("--cpus", type=int, nargs="+", help="run on these only")
    parser.add_argument("--directory", help="for sockets; removed at the end")
    parser.add_argument("--clients", type=int, help="how many will be connected at a time")
    parser.add_argument("--parent", type=int, required=True, help="end when it does")
    options = parser.parse_args()
    say = _keep_stdout()
    try:
        end_with_parent(options.parent)
        if options.cpus:
            os.sched_setaffinity(0, options.cpus)
        if options.role == "disturb":
            say({})
            _burn()
        _allow_many_descriptors()
        # Only now: a contender may look at once how many CPUs it has.
        contender = load(options.home)
        if options.role == "serve":
            _serve(contender, options.directory, options.clients, say)
        else:
            _drive(contender, say)
    except Exception as error:
        say(_failure(error))
        raise
    finally:
        if options.role == "serve":
            remove_files(options.directory)


if __name__ == "__main__":
    main()
