"""What the examples of several processes share: starting and killing them, and their databases."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import shmrpc

PATIENCE = 30.0  # seconds for what takes milliseconds: a busy machine changes no story
KILLS = 10


def tell(line: str) -> None:
    """Print a line whole, whoever else prints to the same pipe."""
    os.write(1, f"{line}\n".encode())


def serve(name: str, server: shmrpc.Server, ending: Callable[[], None] = lambda: None) -> None:
    """Serve until standard input ends, at the latest with the process that started this one."""
    with server:
        tell(f"{name} serves")
        sys.stdin.read()
        ending()


@contextlib.contextmanager
def transaction(path: str) -> Iterator[sqlite3.Connection]:
    """One transaction on a database of its own connection: any thread, committed or not at all."""
    with contextlib.closing(sqlite3.connect(path, PATIENCE, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("COMMIT")  # closing without it, after an error, rolls back


class Processes:
    """Processes with names; the lines that they tell are events to wait for.

    ``commands`` says for each name which module of the package it runs, and with which options
    after the directory and the name.
    """

    def __init__(self, package: str, directory: str, commands: dict[str, list[str]]) -> None:
        self._package = package
        self._directory = directory
        self._commands = commands
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.quiet = False  # whether lines are only waited for, not printed
        reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._read, args=(reader,))
        self._thread.start()

    def _read(self, reader: int) -> None:
        with os.fdopen(reader) as pipe:
            for line in pipe:
                if not self.quiet:
                    print(line, end="", flush=True)
                self._lines.put(line)

    def tell(self, line: str) -> None:
        """Print a line after those that were told so far."""
        os.write(self._writer, f"{line}\n".encode())

    def next_line(self) -> str:
        """Wait for the next line that any of them tells."""
        try:
            return self._lines.get(timeout=PATIENCE)
        except queue.Empty:
            msg = f"no process has told anything for {PATIENCE:g} s"
            raise TimeoutError(msg) from None

    def until(self, text: str) -> None:
        """Wait for a line that has this text in it."""
        while text not in self.next_line():
            pass

    def start(self, name: str, *options: str) -> None:
        """Run it, instead of the one that runs, with more options; returns when it serves."""
        if name in self._running:
            self.stop(name)
        module, *usual = self._commands[name]
        command = [f"{self._package}.{module}", self._directory, name, *usual, *options]
        self._running[name] = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=self._writer,
            start_new_session=True,  # Ctrl-C is for us, and ends them too
        )
        self.until(f"{name} serves")

    def pause(self, name: str) -> None:
        """SIGSTOP; returns when it has stopped."""
        process = self._running[name]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)

    def kill(self, name: str) -> None:
        """SIGKILL; returns when it is dead."""
        self._running[name].kill()
        self.stop(name)
        self.tell(f"kill -9 {name}")

    def restart(self, name: str) -> None:
        """SIGKILL, and start it again."""
        self.kill(name)
        self.start(name)

    def stop(self, name: str) -> None:
        """Let it end by itself, and wait for that."""
        process = self._running.pop(name)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in reversed(list(self._running)):
            if error is not None:
                self._running[name].kill()
            self.stop(name)
        os.close(self._writer)
        self._thread.join()


class Story(Protocol):
    """What an example tells, and checks; made with its ``Processes``."""

    def scenes(self) -> None:
        """What the example is about, one thing after the other."""

    def once(self, name: str, amount: int) -> None:
        """What customers do again and again, each time under another name; in any thread."""

    def close(self) -> None:
        """Wait for what is still going on, and leave the processes."""

    def check_sums(self, directory: str) -> str:
        """Compare the databases with what customers know, and say so; SystemExit if they differ."""


def run(
    package: str, commands: dict[str, list[str]], story_of: Callable[[Processes], Story]
) -> None:
    """Tell a story, with the seed that was given on the command line or another one."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(1 << 32)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["SHMRPC_DIR"] = directory
        with Processes(package, directory, commands) as processes:
            for name in commands:
                processes.start(name)
            story = story_of(processes)
            story.scenes()
            processes.tell(f"-- {KILLS} times anybody is killed at any moment, seed {seed}.")
            processes.until(f"seed {seed}")
            processes.quiet = True
            _storm(processes, list(commands), story.once, seed)
            story.close()
        print(story.check_sums(directory))


def _storm(
    processes: Processes, names: list[str], once: Callable[[str, int], None], seed: int
) -> None:
    """Four customers go on and on, while any process is killed at any moment and started again."""
    over = threading.Event()

    def go_on(customer: str) -> None:
        chosen = random.Random(f"{seed} {customer}")
        for number in itertools.count():
            if over.is_set():
                return
            once(f"{customer}-{number}", chosen.randint(1, 50))

    chosen = random.Random(seed)
    with ThreadPoolExecutor(4) as pool:
        customers = [pool.submit(go_on, name) for name in "abcd"]
        try:
            for _ in range(KILLS):
                for _ in range(chosen.randint(1, 20)):
                    processes.next_line()
                processes.restart(chosen.choice(names))
        finally:
            over.set()
        for customer in customers:
            customer.result(PATIENCE)
