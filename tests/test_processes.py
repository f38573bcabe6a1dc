"""``shmrpc serve --processes``: workers that share a socket, die, and are reloaded."""

import collections
import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from command import COMMAND, Place, assert_complains
from conftest import TRANSPORTS, pause, short_directory, wait_until
from restarting import ACTIVATE

import shmrpc
from shmrpc.sharing import LoadTable, Sharing

WORK = """
import os, threading, time
import shmrpc

HERE = os.environ["SHMRPC_DIR"]
server = shmrpc.Server("work", f"unix://{HERE}/plain.sock", "tcp://127.0.0.1:0")

@server.method
def pid():
    return os.getpid()

@server.method
def version():
    return open(f"{HERE}/version").read() if os.path.exists(f"{HERE}/version") else "1"

VERSION = version()

@server.method
def loaded():
    return VERSION

@server.method
def sleep_pid(seconds):
    time.sleep(seconds)
    return os.getpid()

@server.method
def hold():
    threading.Event().wait()

if VERSION == "broken":
    raise RuntimeError("a broken version")
if VERSION == "elsewhere":
    server = shmrpc.Server("elsewhere")
if VERSION == "dies":
    threading.Timer(0.01, os._exit, [7]).start()
"""

ASYNC = """
import os
from shmrpc import aio

server = aio.Server("work")

@server.method
async def pid():
    return os.getpid()
"""

MODULES = {"work": WORK, "asynchronous": ASYNC, "broken": "raise RuntimeError('no')\n"}


class Workers(Place):
    """``shmrpc serve --processes`` in a directory of its own."""

    def __init__(self, directory):
        super().__init__(directory, MODULES)
        self.process = None
        self.lines = []

    def start(self, target="work", count=2, *options, **more):
        self.process = self.popen("serve", target, "--processes", str(count), *options, **more)
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.said("serving ") or self.process.poll() is not None, 40)
        assert self.said("serving "), self.lines
        return self

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def said(self, text):
        return any(text in line for line in self.lines)

    @property
    def pid(self):
        return self.process.pid

    @property
    def address(self):
        return f"shm://{self.sockets}/work.sock"

    def at(self, transport):
        if transport == "shm":
            return self.address
        [line] = [line for line in self.lines if line.startswith("serving ")]
        return re.search(rf"{transport}://[^ ,]+", line)[0]

    def workers(self):
        """The pids of the workers that accept connections."""
        with contextlib.suppress(shmrpc.ConnectError), shmrpc.inspect(self.address) as inspector:
            return set(inspector.stats()["workers"])
        return set()

    def wait_for_others_than(self, before):
        """Until two workers serve that have not before."""
        wait_until(lambda: len(now := self.workers()) == 2 and not now & before, 40)

    def children(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return {child.pid for child in psutil.Process(self.pid).children(recursive=True)}
        return set()

    def signal(self, number):
        self.process.send_signal(number)

    def set_version(self, text):
        Path(self.sockets, "version").write_text(text)

    def ended(self):
        status = self.process.wait(40)
        self._reader.join(20)
        return status

    def close(self):
        if self.process is not None:
            gone = self.children()
            self.process.kill()
            self.process.wait()
            self._reader.join(20)
            for pipe in (self.process.stdout, self.process.stderr):
                pipe.close()
            wait_until(lambda: not any(map(psutil.pid_exists, gone)))


@pytest.fixture
def workers():
    with short_directory() as directory:
        started = Workers(directory)
        yield started
        started.close()


def pids(address, count):
    """The pids of the workers that so many new connections get to, held at the same time."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(shmrpc.connect(address)) for _ in range(count)]
        return collections.Counter(client.call("pid") for client in clients)


# ---- serving ----


def test_connections_spread_over_the_workers(workers):
    workers.start(count=3)
    assert "3 processes" in workers.lines[0]
    assert len(workers.workers()) == 3
    assert workers.workers() == workers.children()
    for transport in TRANSPORTS:
        found = pids(workers.at(transport), 6)
        assert set(found) <= workers.workers()
        # Not all: one that is late by more than its patience, on a busy machine, gets fewer.
        assert len(found) > 1
    workers.signal(signal.SIGTERM)
    assert workers.ended() == 0
    assert os.listdir(workers.sockets) == []
    assert len(workers.lines) == 1


def test_an_asynchronous_server(workers):
    workers.start("asynchronous", 2)
    assert set(pids(workers.address, 4)) <= workers.workers()
    workers.signal(signal.SIGTERM)
    assert workers.ended() == 0


def test_one_process_and_ctrl_c(workers):
    workers.start(count=1, start_new_session=True)
    assert "1 process)" in workers.lines[0]
    with shmrpc.connect(workers.address) as client:
        call = client.submit("sleep_pid", 0.5)
        wait_until(lambda: client.call("pid"))
        os.killpg(workers.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        assert call.result(20) in range(1, 1 << 30)
    assert workers.ended() == 0
    assert os.listdir(workers.sockets) == []


def test_ctrl_c_while_workers_start(workers):
    """A terminal sends it to all of the group: workers that are importing leave it to the first."""
    for tries in range(3):
        process = workers.popen("serve", "work", "--processes", "2", start_new_session=True)
        wait_until(psutil.Process(process.pid).children)
        time.sleep(tries * 0.05)  # each time somewhere else in their imports
        os.killpg(process.pid, signal.SIGINT)
        _, complaints = process.communicate(timeout=40)
        assert "Traceback" not in complaints
        assert process.returncode == 0, complaints


def test_errors_name_the_worker(workers):
    workers.start(count=2)
    with shmrpc.connect(workers.address) as client:
        pid = client.call("pid")
        call = client.submit("hold")
        wait_until(lambda: running(workers.address, pid) == 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(shmrpc.ConnectionLost, match=f"pid {pid}\\)"):
            call.result(20)


def running(address, pid):
    with contextlib.suppress(shmrpc.ConnectError), shmrpc.inspect(address, worker=pid) as one:
        return one.stats()["running"]
    return None


# ---- looking at them ----


def test_each_worker_can_be_asked(workers):
    workers.start(count=3)
    for pid in workers.workers():
        with shmrpc.inspect(workers.address, worker=pid) as inspector:
            for _ in range(3):
                assert inspector.stats()["pid"] == pid
    entries = json.loads(workers.run("ls", "--json").stdout)
    assert {entry["pid"] for entry in entries if entry["name"] == "work"} == workers.workers()
    looks = json.loads(workers.run("top", "work", "--once", "--json", "-i", "0.1").stdout)
    assert {look["pid"] for look in looks} == workers.workers()
    with (
        shmrpc.inspect(workers.address, worker=workers.pid) as inspector,
        pytest.raises(shmrpc.ConnectError, match="no process"),
    ):
        inspector.health()


# ---- death ----


def test_a_worker_that_dies_is_replaced(workers):
    workers.start(count=2)
    before = workers.workers()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    after = wait_until(lambda: len(now := workers.workers() - {victim}) == 2 and now, 40)
    assert len(after & before) == 1
    assert any(f"worker {victim} was ended by SIGKILL" in line for line in workers.lines)
    assert set(pids(workers.address, 6)) <= after


def test_the_supervisors_death_leaves_no_worker(workers):
    workers.start(count=3)
    with shmrpc.connect(workers.address) as client:
        client.submit("hold")
        children = workers.children()
        assert len(children) == 3
        workers.process.kill()
        wait_until(lambda: not any(map(alive, children)), 20)
    workers.close()
    workers.start(count=1)  # the address is free
    assert pids(workers.address, 1)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_that_die_at_once_are_started_ever_more_slowly(workers):
    workers.start(count=1)
    workers.set_version("dies")
    os.kill(min(workers.workers()), signal.SIGKILL)
    wait_until(lambda: sum("ended with 7" in line for line in workers.lines) >= 3, 40)
    workers.set_version("2")  # and when that is mended, it serves again
    with shmrpc.connect(workers.address, timeout=40, retries=20) as client:
        assert client.call("loaded", timeout=40) == "2"


def test_calls_under_way_end_before_the_workers_do(workers):
    workers.start(count=2)
    with shmrpc.connect(workers.address, connections=2) as pool:
        calls = [pool.submit("sleep_pid", 0.5) for _ in range(4)]
        wait_until(lambda: sum(running(workers.address, pid) for pid in workers.workers()) == 4)
        workers.signal(signal.SIGTERM)
        assert all(call.result(20) for call in calls)
    assert workers.ended() == 0


def test_a_worker_that_does_not_end_is_killed(workers):
    workers.start("work", 1, "--grace", "0.1")
    with shmrpc.connect(workers.address) as client:
        call = client.submit("hold")
        [pid] = workers.workers()
        wait_until(lambda: running(workers.address, pid) == 1)
        pause(pid)
        workers.signal(signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"{workers.sockets}/work.sock"))
        workers.signal(signal.SIGTERM)  # the second time: at once
        with pytest.raises(shmrpc.ConnectionLost):
            call.result(20)
    assert workers.ended() == 0
    assert workers.said("did not end in time")


# ---- reload ----


def test_a_reload_under_load_loses_no_call(workers):
    workers.start(count=2)
    done = threading.Event()
    seen, errors = collections.Counter(), []

    def call(make):
        with make() as client:
            while not done.is_set():
                try:
                    seen[client.call("pid")] += 1
                except Exception as error:
                    errors.append(error)

    # One connection and several, at each transport.
    ways = [
        functools.partial(shmrpc.connect, workers.at(transport), connections=connections, retries=3)
        for transport in TRANSPORTS
        for connections in (None, 3)
    ]
    threads = [threading.Thread(target=call, args=(make,)) for make in ways]
    for thread in threads:
        thread.start()
    try:
        for generation in ("2", "3"):
            before = workers.workers()
            workers.set_version(generation)
            workers.signal(signal.SIGHUP)
            workers.wait_for_others_than(before)
            count = sum(seen.values())
            while sum(seen.values()) < count + 10 and not errors:
                time.sleep(0.01)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    with shmrpc.connect(workers.address) as client:
        assert client.call("loaded") == "3"
    wait_until(lambda: workers.children() == workers.workers(), 40)


@pytest.mark.parametrize(
    "version,text",
    [
        ("broken", "a broken version"),
        ("dies", "a new worker ended with 7"),
        ("elsewhere", "a reload can't change them"),
    ],
)
def test_a_reload_that_fails_changes_nothing(workers, version, text):
    workers.start(count=2)
    before = workers.workers()
    workers.set_version(version)
    workers.signal(signal.SIGHUP)
    wait_until(lambda: workers.said("reload given up") and workers.said(text), 40)
    wait_until(lambda: workers.children() == before, 40)
    assert workers.workers() == before
    workers.set_version("2")
    workers.signal(signal.SIGHUP)
    workers.wait_for_others_than(before)


def test_a_reload_while_another_goes_on(workers):
    workers.start(count=2)
    before = workers.workers()
    workers.signal(signal.SIGHUP)
    wait_until(lambda: len(workers.children()) > 2)
    workers.signal(signal.SIGHUP)
    wait_until(
        lambda: (
            len(now := workers.workers()) == 2 and not now & before and workers.children() == now
        ),
        40,
    )
    assert pids(workers.address, 2)


# ---- what can't be started ----


def test_wrong_numbers_of_processes(workers):
    for wrong in ("0", "many", "100000"):
        assert_complains(workers.run("serve", "work", "--processes", wrong), 2, "--processes")


@pytest.mark.parametrize(
    "target,text",
    [("nowhere", "no module named 'nowhere'"), ("work:nothing", "'nothing'"), ("broken", "no")],
)
def test_modules_that_can_not_be_served(workers, target, text):
    assert_complains(workers.run("serve", target, "--processes", "3"), 2, text)
    assert os.listdir(workers.sockets) == []


def test_an_address_that_is_taken(workers):
    with workers.serving("work") as other:
        assert_complains(
            workers.run("serve", "work", "--processes", "2"), 2, "in use", str(other.pid)
        )


# ---- under a supervisor of its own ----


def test_it_tells_systemd_how_far_it_is(workers):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        path = f"{workers.temporary}/notify"
        notified.bind(path)
        notified.settimeout(40)
        workers.start(count=2, env={"NOTIFY_SOCKET": path})
        assert notified.recv(4096) == b"READY=1"
        assert len(workers.workers()) == 2
        workers.signal(signal.SIGHUP)
        told = notified.recv(4096).decode().split("\n")
        assert told[0] == "RELOADING=1"
        assert int(told[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        assert notified.recv(4096) == b"READY=1"
        workers.signal(signal.SIGTERM)
        assert notified.recv(4096) == b"STOPPING=1"
        assert workers.ended() == 0


# ---- who accepts ----


def test_the_load_table():
    supervisor = LoadTable()
    first, second = LoadTable(supervisor.fd), LoadTable(supervisor.fd)
    ours, theirs = socket.socketpair()
    one, two = Sharing(ours, first, 0), Sharing(theirs, second, 1)
    assert one.least_loaded
    one.publish(2)
    two.publish(1)
    assert supervisor.pids() == [os.getpid()] * 2
    assert not one.least_loaded
    assert two.least_loaded
    two.publish(2)
    assert one.least_loaded
    assert two.least_loaded
    two.publish(1)
    two.retire()
    assert one.least_loaded
    assert supervisor.free_place({0, 1}) == 2
    supervisor.put(0, 0, 0)
    assert supervisor.pids() == []
    for table in (supervisor, first, second):
        table.close()
    ours.close()
    theirs.close()


def test_a_worker_that_is_stopped_keeps_nobody_waiting(workers):
    """It has the fewest connections, and takes none: others do after a moment."""
    workers.start(count=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(shmrpc.connect(workers.address)) for _ in range(2)]
        busy = clients[0].call("pid")
        idle = min(workers.workers() - {busy})
        clients[1].close()
        pause(idle)
        try:
            for _ in range(3):
                client = stack.enter_context(shmrpc.connect(workers.address, timeout=20))
                assert client.call("pid") == busy
        finally:
            os.kill(idle, signal.SIGCONT)


def test_the_sockets_of_systemd(workers):
    """It takes the socket that it was started with, and leaves it there."""
    path = f"{workers.sockets}/work.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        given = ",".join([str(listening.fileno())])
        command = [sys.executable, "-I", "-S", "-c", ACTIVATE, given, *COMMAND]
        workers.start(command=command, pass_fds=[listening.fileno()])
        assert pids(workers.address, 2)
        assert len(workers.workers()) == 2
        workers.signal(signal.SIGTERM)
        assert workers.ended() == 0
        assert os.path.exists(path)
