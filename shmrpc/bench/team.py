"""The processes of one contender: started, pinned, connected and measured together."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .contenders import UnsupportedError, home_of, remove_files
from .figures import Movement, Order, Window, combine
from .pace import now_ns
from .usage import cpu_ns, memory_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figures import Figures

__all__ = ["Crowd", "Effort", "Load", "Peer", "PeerError", "Placement", "Team"]

_PATIENCE_S = 20.0
_START_PATIENCE_S = 60.0  # 64 clients begin at once on two CPUs
_FAREWELL_S = 3.0
_LAST_WORDS_S = 0.5
_COUNT_SECONDS = 0.1


class PeerError(Exception):
    """A contender's process failed, ended, lied or does not answer."""


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
    """How many servers there are, client processes for each, threads and connections for each."""

    pairs: int = 1
    threads: int = 1
    clients: int = 1
    connections: int = 1


@dataclass(frozen=True)
class Load:
    """What a client calls: payloads of `size` bytes, `depth` under way, `rate` a second.

    A rate of 0 is as fast as replies come. With `gil` another thread of the client computes. With
    several `connections` the calls under way are spread over them.
    """

    size: int = 64
    depth: int = 1
    rate: float = 0
    gil: bool = False
    connections: int = 1


class Peer:
    """One process that runs peers.py: a question in, an answer out."""

    def __init__(
        self,
        role: str,
        contender: str | None = None,
        directory: str | None = None,
        cpus: tuple[int, ...] | None = None,
        clients: int = 1,
    ) -> None:
        """Start it; its first answer comes when it is ready."""
        command = [sys.executable, "-m", "shmrpc.bench.peers", role]
        command += [home_of(contender)] if contender else []
        command += ["--directory", directory] if directory else []
        command += ["--parent", str(os.getpid()), "--clients", str(clients)]
        command += ["--cpus", *map(str, cpus)] if cpus else []
        self._what = f"{contender} ({role})"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what went wrong comes as an answer
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
        self.pid = self._process.pid

    def tell(self, do: str, **arguments: object) -> None:
        """Ask for something whose answer is fetched later."""
        stdin = self._process.stdin
        if stdin is None:
            raise PeerError(self._what)
        try:
            print(json.dumps({"do": do, **arguments}), file=stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(f"{self._what} has ended") from None

    def answer(self, patience_s: float = _PATIENCE_S) -> dict[str, Any]:
        """Fetch the next answer; raises PeerError or UnsupportedError if it is one of these."""
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], patience_s)[0]:
            raise PeerError(f"{self._what} hangs: no answer within {patience_s:.0f} s")
        line = stdout.readline()
        if not line:
            raise PeerError(f"{self._what} ended with status {self._process.wait(_FAREWELL_S)}")
        answer: dict[str, Any] = json.loads(line)
        if "unsupported" in answer:
            raise UnsupportedError(answer["unsupported"])
        if "error" in answer:
            raise PeerError(f"{self._what}: {answer['error']}")
        return answer

    def has_spoken(self) -> bool:
        """Whether there is something to read, or the end of all that it will ever say."""
        stdout = self._process.stdout
        return stdout is not None and bool(select.select([stdout], [], [], _LAST_WORDS_S)[0])

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Ask and fetch the answer."""
        self.tell(do, **arguments)
        return self.answer()

    def end(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def reap(self) -> None:
        """Wait until it has ended, and insist after a while."""
        try:
            self._process.communicate(timeout=_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Team:
    """The servers of one contender and their clients: measured together, ended together."""

    def __init__(self, contender: str, placement: Placement, crowd: Crowd) -> None:
        """Start all processes and wait until they are ready."""
        self._crowd = crowd
        self._directories: list[str] = []
        self._servers: list[Peer] = []
        self._drivers: list[Peer] = []
        self._addresses: list[str] = []
        self._server_pids: list[int] = []
        self._cpu_before_ns = 0
        clients = crowd.clients * crowd.connections
        try:
            for _ in range(crowd.pairs):
                directory = tempfile.mkdtemp(
                    prefix="rpc-bench-", dir="/tmp"
                )  # a socket's path is short
                self._directories.append(directory)
                self._servers.append(Peer("serve", contender, directory, placement.server, clients))
                self._drivers += [
                    Peer("drive", contender, directory, placement.client)
                    for _ in range(crowd.clients)
                ]
            self._addresses += [
                server.answer(_START_PATIENCE_S)["address"] for server in self._servers
            ]
            for driver in self._drivers:
                driver.answer(_START_PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def run(self, effort: Effort, load: Load | None = None) -> Figures:
        """Connect, warm up, measure one window and hang up."""
        load = load or Load()
        self.connect(load.connections)
        if load.gil:
            for driver in self._drivers:
                driver.ask("hold_gil")
        figures = self.measure(effort, load)
        self.hang_up()
        return figures

    def run_flows(self, effort: Effort, direction: str, flows: Sequence[str]) -> list[Figures]:
        """Connect one client, move items by each of the flows, and hang up."""
        (driver,), (server,) = self._drivers, self._servers
        self.connect()
        figures = []
        for flow in flows:
            driver.tell(
                "move",
                direction=direction,
                flow=flow,
                warm_up_ns=int(effort.warm_up_seconds * 1e9),
                window_ns=int(effort.seconds * 1e9),
                server_pid=server.pid,
            )
            figures.append(Movement(**driver.answer(effort.patience_s)).figures())
        self.hang_up()
        return figures

    def connect(self, connections: int | None = None) -> None:
        """Connect each client to its server, by as many connections as the crowd has by default."""
        self._server_pids = [server.pid for server in self._servers]
        for number, driver in enumerate(self._drivers):
            pair = number // self._crowd.clients
            answer = driver.ask(
                "connect",
                address=self._addresses[pair],
                count=connections or self._crowd.connections,
            )
            self._server_pids[pair] = answer["server_pid"] or self._server_pids[pair]

    def greet(self) -> None:
        """Make one call on each connection."""
        for driver in self._drivers:
            driver.ask("greet")

    def hang_up(self) -> None:
        """End all connections."""
        for driver in self._drivers:
            driver.ask("close")

    def measure(self, effort: Effort, load: Load, *, system_calls: bool = False) -> Figures:
        """Measure the same window in all clients; raises PeerError if a contender lies."""
        before = self._answered()
        start_ns, stop_ns = effort.window()
        for number, driver in enumerate(self._drivers):
            pair, rest = divmod(number, self._crowd.clients)
            order = Order(
                size=load.size,
                depth=load.depth,
                threads=self._crowd.threads,
                rate=load.rate,
                start_ns=start_ns,
                stop_ns=stop_ns,
                server_pid=None if rest else self._server_pids[pair],
                system_calls=system_calls,
            )
            driver.tell("measure", **asdict(order))
        windows = []
        unsupported = None
        for driver in self._drivers:  # each has an answer, also after one that can't
            try:
                windows.append(Window(**driver.answer(effort.patience_s)))
            except UnsupportedError as error:
                unsupported = error
        if unsupported is not None:
            raise unsupported
        made, answered = sum(window.made for window in windows), self._answered() - before
        if made != answered:
            raise PeerError(f"its clients got {made} replies, its servers gave {answered}")
        return combine(windows)

    def count_system_calls(self, load: Load) -> float:
        """Count system calls per call, in a short run of its own; nan where that is impossible."""
        self.connect()
        effort = Effort(seconds=_COUNT_SECONDS, warm_up_seconds=0.05)
        figures = self.measure(effort, load, system_calls=True)
        self.hang_up()
        return figures["system_calls"]

    def begin_rest(self, seconds: float) -> None:
        """Stay connected and quiet for so long."""
        for driver in self._drivers:
            driver.tell("rest", seconds=seconds)
        self._cpu_before_ns = self._cpu_ns()

    def end_rest(self, seconds: float) -> int:
        """Wait for the end of that; returns the CPU time that all processes used meanwhile, ns."""
        for driver in self._drivers:
            driver.answer(seconds + _PATIENCE_S)
        return self._cpu_ns() - self._cpu_before_ns

    def memory_bytes(self) -> int:
        """Say how much memory all processes use that is nobody else's."""
        return memory_bytes(self._pids())

    def _cpu_ns(self) -> int:
        return sum(map(cpu_ns, self._pids()))

    def _pids(self) -> set[int]:
        own = {peer.pid for peer in (*self._servers, *self._drivers)}
        return own.union(self._server_pids)

    def _answered(self) -> int:
        total = 0
        for number, server in enumerate(self._servers):
            driver = self._drivers[number * self._crowd.clients]
            own = driver.ask("answered")["answered"]
            total += server.ask("answered")["answered"] if own is None else own
        return total

    def explain(self, error: Exception) -> str:
        """Say what went wrong, also at the server if it is that which has ended."""
        reasons = [str(error)]
        for server in self._servers:
            if server.has_spoken():
                try:
                    server.answer()
                except (PeerError, UnsupportedError) as reason:
                    reasons.append(str(reason))
        return "; ".join(dict.fromkeys(reasons))

    def close(self) -> None:
        """End all processes and remove their files."""
        peers = (*self._drivers, *self._servers)
        for peer in peers:
            peer.end()
        for peer in peers:
            peer.reap()
        for directory in self._directories:
            remove_files(directory)
        self._drivers, self._servers, self._directories = [], [], []
