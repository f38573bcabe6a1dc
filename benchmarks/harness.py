"""Starts the processes of each contender, pins them, and measures all of them in turn.

Every contender has its processes from the start to the end of a comparison, and every run has a
connection of its own: between its turns a server waits for the next one, and disturbs nobody.
Runs are interleaved (A, B, C, A, B, C ...), because a machine is not the same a second later.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import why_absent
from benchmarks.figures import Comparison, Movement, Window, combine
from benchmarks.measure import cpu_ns, now_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.figures import Figures

_ROOT = Path(__file__).resolve().parent.parent
_PATIENCE_S = 20.0
_FAREWELL_S = 3.0


class PeerError(Exception):
    """A contender's process failed, ended or does not answer."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: runs of each contender, and seconds of each run."""

    runs: int = 5
    seconds: float = 0.5
    warm_up_seconds: float = 0.2

    def window(self) -> tuple[int, int]:
        """Begin now, and give the instants at which the warm-up and the run end."""
        start_ns = now_ns() + int(self.warm_up_seconds * 1e9)
        return start_ns, start_ns + int(self.seconds * 1e9)

    @property
    def patience_s(self) -> float:
        """Say how long a run may take."""
        return self.warm_up_seconds + self.seconds + _PATIENCE_S


@dataclass(frozen=True)
class Placement:
    """The CPUs that each side may use; None leaves it to the kernel."""

    client: tuple[int, ...] | None = None
    server: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Crowd:
    """How many client/server pairs run at once, and how many threads share each client."""

    pairs: int = 1
    threads: int = 1


class _Peer:
    """One process that runs benchmarks.peers: a question in, an answer out."""

    def __init__(
        self, role: str, contender: str, directory: str, cpus: tuple[int, ...] | None
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.peers", role, contender]
        command += ["--directory", directory, "--parent", str(os.getpid())]
        command += ["--cpus", *map(str, cpus)] if cpus else []
        self._what = f"{contender} ({role})"
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def tell(self, do: str, **arguments: object) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise PeerError(self._what)
        try:
            print(json.dumps({"do": do, **arguments}), file=stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(f"{self._what} has ended") from None

    def answer(self, patience_s: float = _PATIENCE_S) -> dict[str, Any]:
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], patience_s)[0]:
            raise PeerError(f"{self._what} hangs: no answer within {patience_s:.0f} s")
        line = stdout.readline()
        if not line:
            raise PeerError(f"{self._what} ended with status {self._process.wait(_FAREWELL_S)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self._what}: {answer['error']}")
        return answer

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.answer()

    def end(self) -> None:
        self._process.terminate()

    def reap(self) -> None:
        try:
            self._process.communicate(timeout=_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Team:
    """The pairs of one contender: started together, measured together, ended together."""

    def __init__(self, contender: str, placement: Placement, crowd: Crowd) -> None:
        self._threads = crowd.threads
        self._directories: list[str] = []
        self._servers: list[_Peer] = []
        self._drivers: list[_Peer] = []
        self._addresses: list[str] = []
        try:
            for _ in range(crowd.pairs):
                directory = tempfile.mkdtemp(prefix="shmrpc-bench-")
                self._directories.append(directory)
                self._servers.append(_Peer("serve", contender, directory, placement.server))
                self._drivers.append(_Peer("drive", contender, directory, placement.client))
            self._addresses += [server.answer()["address"] for server in self._servers]
            for driver in self._drivers:
                driver.answer()
        except BaseException:
            self.close()
            raise

    def run(self, effort: Effort) -> Figures:
        """Connect, warm up, measure one window and hang up."""
        self.connect()
        figures = self.measure(effort)
        for driver in self._drivers:
            driver.ask("close")
        return figures

    def run_flows(self, effort: Effort, direction: str, flows: Sequence[str]) -> list[Figures]:
        """Connect one client, move items by each of the flows, and hang up."""
        (driver,), (server,) = self._drivers, self._servers
        self.connect()
        figures = []
        for flow in flows:
            start_ns, stop_ns = effort.window()
            when = {"start_ns": start_ns, "stop_ns": stop_ns, "server_pid": server.pid}
            driver.tell("move", direction=direction, flow=flow, **when)
            figures.append(Movement(**driver.answer(effort.patience_s)).figures())
        driver.ask("close")
        return figures

    def connect(self) -> None:
        """Connect each client to its server."""
        for driver, address in zip(self._drivers, self._addresses, strict=True):
            driver.ask("connect", address=address)

    def measure(self, effort: Effort) -> Figures:
        """Measure the same window in all clients."""
        start_ns, stop_ns = effort.window()
        for driver, server in zip(self._drivers, self._servers, strict=True):
            driver.tell(
                "measure",
                threads=self._threads,
                start_ns=start_ns,
                stop_ns=stop_ns,
                server_pid=server.pid,
            )
        answers = [driver.answer(effort.patience_s) for driver in self._drivers]
        return combine([Window(**answer) for answer in answers])

    def cpu_ns(self) -> int:
        """Read the CPU time that all processes of the team have used so far."""
        return sum(cpu_ns(peer.pid) for peer in (*self._servers, *self._drivers))

    def close(self) -> None:
        """End all processes and remove their files."""
        peers = (*self._drivers, *self._servers)
        for peer in peers:
            peer.end()
        for peer in peers:
            peer.reap()
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)
        self._drivers, self._servers, self._directories = [], [], []


class _Teams:
    """The contenders of a comparison that are still in it, and the rows that each one fills."""

    def __init__(self, comparison: Comparison, rows: Mapping[str, Sequence[str]]) -> None:
        self._comparison = comparison
        self._rows = rows
        self._stack = ExitStack()
        self._teams: dict[str, Team] = {}

    def __enter__(self) -> _Teams:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, placement: Placement, crowd: Crowd) -> None:
        for name, rows in self._rows.items():
            reason = why_absent(name)
            if reason is not None:
                self._comparison.absent.update(dict.fromkeys(rows, reason))
                continue
            try:
                self._teams[name] = Team(name, placement, crowd)
            except PeerError as error:
                self._comparison.failed.update(dict.fromkeys(rows, str(error)))
            else:
                self._stack.callback(self._teams[name].close)

    def each(self, action: Callable[[str, Team], None]) -> None:
        """Do it with every team in turn; who fails is out, and ended before the next one's turn."""
        for name, team in list(self._teams.items()):
            try:
                action(name, team)
            except (PeerError, OSError) as error:
                del self._teams[name]
                for row in self._rows[name]:
                    self._comparison.failed[row] = str(error)
                    self._comparison.runs.pop(row, None)
                team.close()


def compare(
    comparison: Comparison,
    contenders: Sequence[str],
    effort: Effort,
    placement: Placement,
    crowd: Crowd,
) -> Comparison:
    """Measure the contenders run by run into `comparison`."""

    def run(name: str, team: Team) -> None:
        comparison.runs.setdefault(name, []).append(team.run(effort))

    with _Teams(comparison, {name: (name,) for name in contenders}) as teams:
        teams.start(placement, crowd)
        for _ in range(effort.runs):
            teams.each(run)
    return comparison


def compare_flows(
    comparison: Comparison,
    direction: str,
    flows: Mapping[str, Sequence[str]],
    effort: Effort,
    placement: Placement,
) -> Comparison:
    """As `compare`, with several flows of each contender, in each run over one connection."""
    rows = {name: [f"{name} {flow}" for flow in chosen] for name, chosen in flows.items()}

    def run(name: str, team: Team) -> None:
        measured = team.run_flows(effort, direction, flows[name])
        for row, figures in zip(rows[name], measured, strict=True):
            comparison.runs.setdefault(row, []).append(figures)

    with _Teams(comparison, rows) as teams:
        teams.start(placement, Crowd())
        for _ in range(effort.runs):
            teams.each(run)
    return comparison


def compare_quiet(
    comparison: Comparison, contenders: Sequence[str], quiet_seconds: float
) -> Comparison:
    """Measure what connected pairs burn while nobody calls, all contenders in the same seconds."""
    before: dict[str, int] = {}

    def warm_up(name: str, team: Team) -> None:
        team.connect()
        team.measure(Effort(seconds=0.2))
        comparison.runs[name] = []

    def read_before(name: str, team: Team) -> None:
        before[name] = team.cpu_ns()

    def read_after(name: str, team: Team) -> None:
        comparison.runs[name].append({"cpu_ms": (team.cpu_ns() - before[name]) / 1e6})

    with _Teams(comparison, {name: (name,) for name in contenders}) as teams:
        teams.start(Placement(), Crowd())
        teams.each(warm_up)
        teams.each(read_before)
        time.sleep(quiet_seconds)
        teams.each(read_after)
    return comparison
