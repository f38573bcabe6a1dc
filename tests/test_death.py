"""kill -9 of either side at any moment: everybody learns it, and nothing is left."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SLACK, Service, shm_names, wait_until

import shmrpc
from shmrpc import segments

NOTICED = 0.1 * SLACK  # nominally 100 ms
KILLS = int(os.environ.get("SHMRPC_KILLS", "300"))


@pytest.mark.parametrize("how", ["call", "timeout", "result", "callback"])
def test_server_dies_while_a_client_waits(transport, service, connect, how):
    running = service(transport)
    client = connect(running.address)
    ended = []

    def wait():
        try:
            if how == "call":
                client.call("hold")
            elif how == "timeout":
                client.call("hold", timeout=30)
            elif how == "result":
                client.submit("hold").result()
            else:
                done = threading.Event()
                future = client.submit("hold")
                future.add_done_callback(lambda _: done.set())
                done.wait(30)
                raise future.exception(0)
        except shmrpc.ConnectionLost as error:
            ended.append((time.monotonic(), error))

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: client.call("running") == 4)
    start = time.monotonic()
    running.process.kill()
    for thread in threads:
        thread.join(20)
    running.process.wait()
    assert len(ended) == 4
    for when, error in ended:
        assert when - start < NOTICED
        assert error.outcome == "unknown"
        assert error.code == "UNAVAILABLE"
        assert f"pid {running.pid}" in str(error)


def test_outcome_of_calls_that_never_ran(transport, service, connect, directory):
    """One runs, the others wait for the only worker: over shm that can be told apart."""
    running = service(transport, workers=1)
    client = connect(running.address)
    path = os.path.join(directory, "noted")
    futures = [client.submit("note_and_hold", path, str(number)) for number in range(5)]
    wait_until(lambda: os.path.exists(path))
    client.ping()
    running.kill()
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, shmrpc.ConnectionLost) for error in errors)
    outcomes = [error.outcome for error in errors]
    assert Path(path).read_text().split() == ["0"]
    assert outcomes[0] == "unknown"
    if transport == "shm":
        assert outcomes[1:] == ["not_started"] * 4
    assert set(outcomes) <= {"unknown", "not_started", "not_sent"}


def test_outcome_of_calls_that_were_never_taken(transport, service, connect):
    """The server was stopped: what lies in the ring has not been taken."""
    running = service(transport)
    client = connect(running.address)
    client.call("add", 1, 2)
    running.pause()
    futures = [client.submit("add", number, 1) for number in range(5)]
    running.kill()
    outcomes = {future.exception(10).outcome for future in futures}
    assert outcomes == ({"not_started"} if transport == "shm" else {"unknown"})


def test_large_call_that_left_in_part(transport, service, connect):
    running = service(transport)
    client = connect(running.address, max_memory_bytes=0)  # in pieces, through the ring
    client.call("add", 1, 2)
    running.pause()

    def kill_in_the_middle():
        wait_until(lambda: client.stats()["outbox_bytes"] > 0)
        running.process.kill()

    thread = threading.Thread(target=kill_in_the_middle)
    thread.start()
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        client.call("size", bytes(30_000_000))
    thread.join()
    running.process.wait()
    assert caught.value.outcome in {"not_sent", "not_started"}


def test_server_handler_ends_its_process(transport, service, connect):
    running = service(transport)
    client = connect(running.address)
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        client.call("die")
    assert caught.value.outcome == "unknown"
    running.process.wait()


def test_reconnects_to_a_restarted_server(transport, service, connect):
    """A client that was idle when its server died does not notice but for stats()."""
    running = service(transport)
    client = connect(running.address)
    first = client.call("pid")
    for generation in range(3):
        running.kill()
        running = service(running.address)
        assert client.call("pid") == running.pid
        assert client.stats()["reconnects"] == generation + 1
    assert client.call("pid") != first
    client.notify("add", 1, 2)
    assert client.submit("add", 1, 2).result(5) == 3
    assert client.ping() > 0


def test_waits_for_a_server_that_is_coming(transport, service, connect):
    """Back-off within the client's connecting timeout."""
    running = service(transport)
    address = running.address
    client = connect(address, timeout=20)
    running.kill()
    replacement = []
    thread = threading.Timer(0.5, lambda: replacement.append(Service(address)))
    thread.start()
    try:
        assert client.call("pid") > 0
    finally:
        thread.join()
        replacement[0].close()


def test_gives_up_when_no_server_comes(transport, service, connect):
    running = service(transport)
    client = connect(running.address, timeout=0.3)
    running.kill()
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises((shmrpc.ConnectError, shmrpc.ConnectionLost)):
            client.call("add", 1, 2)
        assert time.monotonic() - start < 0.3 + 0.3 * SLACK
    with pytest.raises(shmrpc.Error):
        client.notify("add", 1, 2)
    with pytest.raises(shmrpc.Error):
        client.submit("add", 1, 2).result(5)


def test_stopped_server(transport, service, connect):
    """SIGSTOP: deadlines are kept by the client alone, and all goes on afterwards."""
    running = service(transport)
    client = connect(running.address)
    client.call("add", 1, 2)
    running.pause()
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(shmrpc.DeadlineExceeded):
            client.call("add", 1, 2, timeout=0.1)
        assert 0.095 < time.monotonic() - start < 0.1 + 0.1 * SLACK
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.submit("add", 1, 2, timeout=0.1).result()
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.ping(timeout=0.1)
    running.resume()
    assert client.call("add", 1, 2, timeout=20) == 3


# ---- clients that die ----

CALLERS = """
import os, random, signal, sys, threading, time
import shmrpc

path, log = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
data = os.urandom(200_000)

def report(text):
    os.write(log, f"{text}\\n".encode())

def work(client, number):
    chosen = random.Random(f"{os.getpid()}-{number}")
    for i in range(1 << 60):
        kind = chosen.randrange(5)
        name = f"{os.getpid()}-{number}-{i}" if kind == 4 else "-"
        try:
            if kind == 0:
                assert client.call("echo", data) == data
            elif kind == 1:
                client.notify("add", 1, 2)
            elif kind == 2:
                futures = [client.submit("sleep", 0.001, i) for i in range(20)]
                assert [future.result() for future in futures] == list(range(20))
            elif kind == 3:
                assert client.call("echo", number, timeout=20) == number
            else:
                client.call("note", path, name)
        except shmrpc.ConnectionLost as error:
            report(f"lost {name} {error.outcome}")
        except shmrpc.ConnectError:
            time.sleep(0.05)
        except BaseException as error:
            report(f"error {error!r}")

def run(address):
    client = None
    while client is None:
        try:
            client = shmrpc.connect(address, timeout=30)
        except shmrpc.ConnectError:
            time.sleep(0.01)  # the server was killed a moment ago
    for number in range(3):
        threading.Thread(target=work, args=(client, number), daemon=True).start()
    threading.Event().wait()

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(line.strip())
        except BaseException as error:
            report(f"error {error!r}")
        os._exit(0)
    print(child, flush=True)
"""


class Callers:
    """Processes that call all the time, each in three threads; forked, because that is quick."""

    def __init__(self, noted, log):
        self.living = []
        self.parent = subprocess.Popen(
            [sys.executable, "-c", CALLERS, noted, log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, address):
        self.parent.stdin.write(f"{address}\n".encode())
        self.parent.stdin.flush()
        self.living.append(int(self.parent.stdout.readline()))

    def kill(self, index=0):
        pid = self.living.pop(index)
        os.kill(pid, 9)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"))

    def close(self):
        while self.living:
            self.kill()
        self.parent.kill()
        self.parent.communicate()


def test_client_dies_during_its_calls(transport, service, connect):
    running = service(transport)
    observer = connect(running.address)
    observer.call("add", 1, 2)
    time.sleep(0.1)
    before = running.fds()
    with contextlib.closing(Callers(os.devnull, os.devnull)) as callers:
        for number in range(8):
            callers.start(running.address)
            time.sleep(0.03 * number)
            callers.kill()
            assert observer.call("add", 1, 2, timeout=20) == 3
    wait_until(lambda: running.fds() <= before, what="descriptors of dead clients closed")
    wait_until(lambda: observer.call("stats")["conns"] == 1)
    wait_until(lambda: observer.call("running") == 0)


def test_client_dies_while_its_call_runs(transport, service, connect, directory):
    """What it had queued is not started any more; its worker is free after the handler."""
    running = service(transport, workers=1)
    observer = connect(running.address)
    path = os.path.join(directory, "noted")
    code = (
        "import sys, shmrpc\n"
        "client = shmrpc.connect(sys.argv[1])\n"
        "futures = [client.submit('note_and_hold', sys.argv[2], str(n)) for n in range(5)]\n"
        "client.ping(); print('sent', flush=True); sys.stdin.readline()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, running.address, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout.readline() == b"sent\n"
        wait_until(lambda: os.path.exists(path))
        child.kill()
        child.wait()
    time.sleep(0.2)
    assert observer.ping() < 1 * SLACK
    Path(f"{path}.release").touch()
    assert observer.call("add", 1, 2, timeout=20) == 3
    assert Path(path).read_text().split() == ["0"]


# ---- many kills ----


@pytest.mark.slow
@pytest.mark.timeout(120 + KILLS * 2)
def test_kill_storm(directory):
    """Random kills of servers and clients under load, with the leak check after each hundred.

    SHMRPC_KILLS says how many (300), SHMRPC_SEED which.
    """
    seed = int(os.environ.get("SHMRPC_SEED", "0")) or random.randrange(1, 1 << 32)
    print(f"SHMRPC_SEED={seed} SHMRPC_KILLS={KILLS}")
    chosen = random.Random(seed)
    noted = os.path.join(directory, "noted")
    log_path = os.path.join(directory, "log")
    names = shm_names()
    addresses = [
        f"shm://{directory}/calc.sock",
        f"unix://{directory}/unix.sock",
        f"tcp://127.0.0.1:{free_port()}",
    ]
    with contextlib.ExitStack() as stack:
        callers = stack.enter_context(contextlib.closing(Callers(noted, log_path)))
        server = Service(*addresses)
        stack.callback(lambda: server.close())  # noqa: PLW0108 - whichever it is by then
        for number in range(1, KILLS + 1):
            while len(callers.living) < 4:
                callers.start(addresses[chosen.choice((0, 0, 0, 1, 2))])  # shm most of all
            time.sleep(chosen.uniform(0, 0.05))
            if chosen.random() < 0.2:
                server.close()
                server = Service(*addresses)
            else:
                callers.kill(chosen.randrange(4))
            if number % 100 == 0:
                check_healthy(server, addresses, names)
        callers.close()
        check_healthy(server, addresses, names)
        wait_until(lambda: server.fds() < 30)
    check_log(log_path, noted)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def check_healthy(server, addresses, names):
    assert server.process.poll() is None
    for address in addresses:
        with shmrpc.connect(address, timeout=20) as client:
            assert client.call("add", 1, 2, timeout=20) == 3
    assert len(os.listdir("/proc/self/fd")) < 200
    # A name lives for an instant while a segment is made; who was killed in it, is swept for.
    wait_until(lambda: segments.sweep() is not None and shm_names() <= names, 20, "no names")


def check_log(log_path, noted):
    """Nothing but lost connections, and what is called not started has not been started."""
    lines = Path(log_path).read_text().splitlines()
    assert not [line for line in lines if not line.startswith("lost")]
    lost = [line.split()[1:] for line in lines]
    assert lost
    outcomes = {outcome for _, outcome in lost}
    print(json.dumps({o: sum(1 for _, x in lost if x == o) for o in sorted(outcomes)}))
    assert outcomes <= {"unknown", "not_started", "not_sent"}
    started = set(Path(noted).read_text().split())
    wrong = [name for name, outcome in lost if outcome != "unknown" and name in started]
    assert not wrong
