"""Several worker processes behind one set of listening sockets, and who looks after them.

The supervisor starts a program once for each worker, makes the sockets that the first of them asks
for, and passes them on. It imports nothing of what is served: a reload starts workers that have
never seen the old code. It accepts nothing itself: which worker does is between them (sharing.py).

    a worker ends        another is started; after a pause, if that happens at once again and again
    reload               new workers first; when all serve, the old ones end
    stop                 the sockets go, then all workers end; who does not in time is killed
    the supervisor dies  the kernel kills its workers (PR_SET_PDEATHSIG)
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from . import address as addresses
from . import handover, sharing
from .errors import ConnectError
from .rendezvous import Listener
from .sharing import LoadTable, Sharing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .handshake import Terms

__all__ = ["GROUP_SIGNALS", "Supervisor", "die_with_parent", "join_supervisor"]

_log = logging.getLogger("shmrpc.supervisor")

GROUP_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""What a terminal sends to all processes. The supervisor decides what it means."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_YOUNG_SECONDS = 10.0  # who ends before has failed: the next one waits longer
_PAUSE_FIRST, _PAUSE_MAX = 0.1, 10.0
_LATE_SECONDS = 3.0  # that a worker gets to end beyond its grace
_PR_SET_PDEATHSIG = 1


class _Server(Protocol):
    """A server of either kind, as far as its supervisor needs it."""

    _terms: list[Terms]


@dataclass(eq=False)
class _Worker:
    """One process."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    place: int
    generation: int
    started: float
    ready: bool = False
    ending: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass
class Supervisor:
    """Runs ``processes`` workers until SIGTERM or SIGINT; SIGHUP reloads.

    ``command`` is the program of a worker, which gets a descriptor and our pid as its last two
    arguments and calls ``join_supervisor`` with them. ``on_ready`` is called when all serve for
    the first time, with where. ``grace`` is what workers allow calls under way, in seconds.
    """

    command: Sequence[str]
    processes: int
    grace: float
    on_ready: Callable[[list[str]], None]
    _workers: dict[int, _Worker] = field(default_factory=dict)  # by pid
    _listeners: list[Listener] = field(default_factory=list)
    _wanted: list[list[Any]] | None = None  # what the first worker asked to listen at
    _table: LoadTable = field(default_factory=LoadTable)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _generation: int = 0
    _serving: bool = False  # all of a generation have been ready once
    _reloading: bool = False
    _failures: int = 0  # workers in a row that ended young
    _next_start: float = 0.0
    _kill_at: float | None = None  # stopping
    _status: int = 0

    def run(self) -> int:
        """Serve until told to stop; returns an exit status.

        That of the worker that could not start, if none ever served. Raises ``ConnectError`` if an
        address can't be had. For the main thread: it handles signals.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        reader.setblocking(False)
        before = {number: signal.signal(number, _note) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._selector.register(reader, selectors.EVENT_READ)
        try:
            self._start_worker()
            while self._kill_at is None or self._workers:
                for key, _ in self._selector.select(self._patience()):
                    if key.fileobj is reader:
                        self._take_signals(reader)
                    elif key.data.pid in self._workers:  # else it was reaped just before
                        self._attend(key.data)
                self._top_up()
                self._kill_late()
            return self._status
        finally:
            self._end()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            reader.close()
            writer.close()

    def _patience(self) -> float | None:
        now = time.monotonic()
        if self._kill_at is not None:
            return max(0.0, self._kill_at - now)
        if self._missing() > 0:
            return max(0.0, self._next_start - now)
        return None

    def _end(self) -> None:
        """Leave nothing behind, however we got here."""
        for worker in list(self._workers.values()):
            worker.process.kill()
            worker.process.wait()
            self._forget(worker)
        self._close_listeners()
        self._table.close()

    # ---- signals ----

    def _take_signals(self, reader: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = set(reader.recv(4096))
            if signal.SIGCHLD in numbers:
                self._reap()
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                self._stop()
            elif signal.SIGHUP in numbers and self._serving and self._kill_at is None:
                self._reload()

    def _stop(self) -> None:
        """Listen no more and let the workers end; the second time at once."""
        if self._kill_at is not None:
            self._kill_at = time.monotonic()
            return
        handover.notify("STOPPING=1")
        self._kill_at = time.monotonic() + self.grace + _LATE_SECONDS
        self._close_listeners()
        for worker in self._workers.values():
            self._retire(worker)

    def _kill_late(self) -> None:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            for worker in self._workers.values():
                _log.warning("worker %d did not end in time and is killed", worker.pid)
                worker.process.kill()
            self._kill_at = time.monotonic() + _LATE_SECONDS

    def _reload(self) -> None:
        """Start new workers; those of a reload that has not come to its end are given up."""
        if self._reloading:
            self._give_up_reload("another reload was asked for")
        now_us = time.monotonic_ns() // 1000
        handover.notify(f"RELOADING=1\nMONOTONIC_USEC={now_us}")
        _log.info("reloading: %d new workers are started", self.processes)
        self._generation += 1
        self._reloading = True
        self._next_start = 0.0

    def _give_up_reload(self, why: str) -> None:
        _log.error("reload given up: %s; the workers from before go on", why)
        for worker in self._current():
            self._retire(worker)
        self._reloading = False
        # Those from before are the current ones again.
        old = [worker for worker in self._workers.values() if not worker.ending]
        self._generation += 1
        for worker in old:
            worker.generation = self._generation
        handover.notify("READY=1")

    # ---- workers ----

    def _current(self) -> list[_Worker]:
        return [
            worker
            for worker in self._workers.values()
            if worker.generation == self._generation and not worker.ending
        ]

    def _missing(self) -> int:
        """How many workers are to be started now. The first finds out whether it works at all."""
        if self._kill_at is not None or (not self._serving and self._wanted is None):
            return 0
        return self.processes - len(self._current())

    def _top_up(self) -> None:
        while self._missing() > 0 and time.monotonic() >= self._next_start:
            self._start_worker()

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
        }
        with theirs, _deaf():
            try:
                process = subprocess.Popen(  # noqa: S603
                    [*self.command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                )
            except OSError as error:
                ours.close()
                _log.error("can't start a worker: %s", error)
                self._fail()
                return
        taken = {worker.place for worker in self._workers.values()}
        place = self._table.free_place(taken)
        worker = _Worker(process, ours, place, self._generation, time.monotonic())
        self._workers[worker.pid] = worker
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _fail(self) -> None:
        """The next start waits, each time longer."""
        pause = min(_PAUSE_FIRST * 2**self._failures, _PAUSE_MAX)
        self._failures += 1
        self._next_start = time.monotonic() + pause

    def _retire(self, worker: _Worker) -> None:
        worker.ending = True
        worker.process.terminate()

    def _reap(self) -> None:
        for worker in list(self._workers.values()):
            status = worker.process.poll()
            if status is not None:
                with contextlib.suppress(OSError):  # what it said last
                    worker.control.setblocking(False)
                    self._attend(worker)
                self._forget(worker)
                if not worker.ending:
                    self._lost(worker, status)

    def _forget(self, worker: _Worker) -> None:
        self._workers.pop(worker.pid, None)
        self._table.put(worker.place, 0, 0)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.control)
        worker.control.close()

    def _lost(self, worker: _Worker, status: int) -> None:
        """A worker has ended that nobody told to."""
        how = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with {status}"
        if not self._serving:
            if self._status == 0:
                self._status = status if status > 0 else 1
            if status < 0:  # else it has complained itself
                _log.error("worker %d %s before it served", worker.pid, how)
            self._stop()
        elif self._reloading and worker.generation == self._generation:
            self._give_up_reload(f"a new worker {how}")
        else:
            young = time.monotonic() - worker.started < _YOUNG_SECONDS
            if young:
                self._fail()
            else:
                self._failures = 0
                self._next_start = 0.0
            _log.warning("worker %d %s; another is started", worker.pid, how)

    # ---- what workers say ----

    def _attend(self, worker: _Worker) -> None:
        try:
            message, fds = sharing.receive(worker.control)
        except OSError:
            message, fds = None, []
        try:
            if message is None:  # it is about to end
                with contextlib.suppress(KeyError):
                    self._selector.unregister(worker.control)
            elif "addresses" in message:
                self._give_sockets(worker, message["addresses"])
            elif "ready" in message:
                self._note_ready(worker)
            elif "inspect" in message and fds:
                other = self._workers.get(message["inspect"])
                if other is not None:
                    sharing.send(other.control, message, fds[:1])
        except OSError as error:  # it, or the other, has just ended
            _log.debug("can't reach a worker: %s", error)
        finally:
            for fd in fds:
                os.close(fd)

    def _give_sockets(self, worker: _Worker, wanted: list[list[Any]]) -> None:
        if self._kill_at is not None:
            return
        if self._wanted is None:
            self._listen(wanted)
            self._wanted = wanted
        if wanted != self._wanted:
            said = ", ".join(text for text, *_ in wanted)
            msg = f"the server's addresses are now {said}: a reload can't change them; restart"
            sharing.send(worker.control, {"refused": msg})
            return
        fds = [self._table.fd, *(listener.socket.fileno() for listener in self._listeners)]
        sharing.send(worker.control, {"listen": worker.place}, fds)

    def _listen(self, wanted: list[list[Any]]) -> None:
        for text, for_others, remote in wanted:
            self._listeners.append(
                Listener(
                    addresses.parse(text), for_others=bool(for_others), allow_remote=bool(remote)
                )
            )
        handover.check_claimed(self._addresses())

    def _addresses(self) -> list[str]:
        return [str(listener.address) for listener in self._listeners]

    def _note_ready(self, worker: _Worker) -> None:
        worker.ready = True
        current = self._current()
        if len(current) < self.processes or not all(other.ready for other in current):
            return
        if not self._serving:
            self._serving = True
            handover.tell_ready()
            self.on_ready(self._addresses())
        elif self._reloading:
            self._reloading = False
            self._failures = 0
            for other in list(self._workers.values()):
                if other.generation != self._generation:
                    self._retire(other)
            handover.notify("READY=1")
            _log.info("reloaded")

    def _close_listeners(self) -> None:
        while self._listeners:
            self._listeners.pop().close()


def _note(_number: int, _frame: object) -> None:
    """Do nothing: the wakeup descriptor has the number."""


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Start a worker with what comes to the whole group blocked, until it has said how it takes it.

    Else Ctrl-C and a terminal's end would hit it while it is importing. What comes to us meanwhile
    comes afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def join_supervisor(fd: int, server: _Server) -> tuple[Sharing, Callable[[], None]]:
    """In a worker: get the listening sockets, which this server then finds when it starts.

    Returns what this worker shares with the others, and what to call when it serves. Raises
    ``ConnectError`` if it may not.
    """
    control = socket.socket(fileno=fd)
    control.set_inheritable(False)
    wanted = [
        (str(terms.address), bool(terms.allow_uids), terms.allow_remote) for terms in server._terms
    ]
    sharing.send(control, {"addresses": wanted})
    message, fds = sharing.receive(control)
    if message is None:
        msg = "the supervisor is gone"
        raise ConnectError(msg)
    if "refused" in message:
        raise ConnectError(message["refused"])
    table = LoadTable(fds[0])
    os.close(fds[0])
    shared = Sharing(control, table, message["listen"])
    handover.share(fds[1:], shared)
    return shared, lambda: sharing.send(control, {"ready": True})


def die_with_parent(supervisor: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it has ended before
        sys.exit(1)
