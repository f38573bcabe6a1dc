"""Retries over servers that die: what has run is not repeated, unless it may be."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import free_port, wait_until

import shmrpc
from shmrpc import aio
from shmrpc.interceptors import CallInfo
from shmrpc.retries import Retries

# Handlers die in the first process that runs them, and note each time that they run.
SERVER = """
import os, sys, time
import shmrpc

address, directory = sys.argv[1:]
server = shmrpc.Server(address, workers=1)


def note(name):
    path = os.path.join(directory, name)
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    return len(open(path).readlines())


@server.method(idempotent=True)
def set_to(value):
    if note("set_to") == 1:
        os._exit(1)
    return value


@server.method
def increase(by):
    if note("increase") == 1:
        os._exit(1)
    return by


@server.method
def add(a, b):
    note("add")
    return a + b


@server.method
def hold():
    note("hold")
    while True:
        time.sleep(60)


@server.method(idempotent=True)
def count():
    note("count")
    yield 1
    os._exit(1)


with server:
    print("ready", flush=True)
    sys.stdin.read()
"""


class Supervisor:
    """Starts the server again, at the same address, whenever it dies."""

    def __init__(self, address, directory):
        self.command = [sys.executable, "-c", SERVER, address, directory]
        self.directory = Path(directory)
        self.generation = 0
        self.stopping = False
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self.supervise, daemon=True)
        self.thread.start()
        assert self.ready.wait(20)

    def supervise(self):
        while not self.stopping:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            if self.stopping:  # close() may have killed the one before
                self.process.kill()
            if self.process.stdout.readline():
                self.generation += 1
                self.ready.set()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()

    def runs(self, method):
        path = self.directory / method
        return path.read_text().split() if path.exists() else []

    def close(self):
        self.stopping = True
        self.process.kill()
        self.thread.join(10)


@pytest.fixture
def supervised(directory, transport):
    """A server that comes back; on tcp at the same port."""
    address = {
        "shm": f"shm://{directory}/calc.sock",
        "unix": f"unix://{directory}/calc.sock",
        "tcp": f"tcp://127.0.0.1:{free_port()}",
    }[transport]
    supervisor = Supervisor(address, directory)
    supervisor.address = address
    yield supervisor
    supervisor.close()


def by_call(client, *args, **options):
    return client.call(*args, **options)


def by_submit(client, *args, **options):
    return client.submit(*args, **options).result(30)


either = pytest.mark.parametrize("run", [by_call, by_submit])


@either
def test_what_may_run_twice_is_repeated(supervised, connect, run):
    client = connect(supervised.address, retries=3, timeout=20)
    assert run(client, "set_to", 5) == 5
    assert len(set(supervised.runs("set_to"))) == 2
    wait_until(lambda: supervised.generation == 2)  # counted once the server says that it is ready


@either
def test_what_may_not_is_not(supervised, connect, run):
    client = connect(supervised.address, retries=3, timeout=20)
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        run(client, "increase", 5)
    assert caught.value.outcome == "unknown"
    assert len(supervised.runs("increase")) == 1
    assert run(client, "add", 1, 2) == 3


@either
def test_without_retries_nothing_is_repeated(supervised, connect, run):
    client = connect(supervised.address, timeout=20)
    with pytest.raises(shmrpc.ConnectionLost):
        run(client, "set_to", 5)
    assert len(supervised.runs("set_to")) == 1


@pytest.mark.parametrize("transport", ["shm"], indirect=True)
def test_a_request_that_waited_in_the_dead_server_is_repeated(supervised, connect):
    """Only shared memory can tell: the method is not declared idempotent, and need not be."""
    client = connect(supervised.address, retries=3, timeout=20)
    holding = client.submit("hold")
    wait_until(lambda: supervised.runs("hold"))
    waiting = [client.submit("add", number, 1) for number in range(5)]
    client.ping()  # so they have arrived
    supervised.process.kill()
    assert [future.result(30) for future in waiting] == [1, 2, 3, 4, 5]
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        holding.result(30)
    assert caught.value.outcome == "unknown"


def test_a_stream_that_began_is_not_repeated(supervised, connect):
    client = connect(supervised.address, retries=3, timeout=20)
    items = iter(client.stream("count"))
    with pytest.raises(shmrpc.ConnectionLost):
        for _ in range(2):
            next(items)
    assert len(supervised.runs("count")) == 1


@either
def test_the_attempts_are_used_up(directory, connect, run):
    server = shmrpc.Server("calc")
    with server:
        client = connect("calc", retries=3, timeout=0.1)
    with pytest.raises(shmrpc.ConnectError):
        run(client, "add", 1, 2)


def test_a_timeout_is_for_all_attempts(directory, connect):
    tried = []

    class Count:
        def intercept(self, call, proceed):
            tried.append(call.timeout)
            return proceed(call)

    random.seed(1)
    many = Retries(1000, backoff=0.05, backoff_max=0.05)
    with shmrpc.Server("calc"):
        client = connect("calc", interceptors=[many, Count()], timeout=0.05)
    with pytest.raises((shmrpc.ConnectError, shmrpc.DeadlineExceeded)):
        client.call("add", 1, 2, timeout=1.0)
    assert 2 <= len(tried) < 1000
    assert tried[0] == 1.0
    assert sorted(tried, reverse=True) == tried


def test_the_question(supervised, connect):
    """What the server says of its methods, asked by an interceptor."""
    answers = {}

    class Ask:
        def intercept(self, call: CallInfo, proceed):
            answers[call.method] = call.idempotent()
            return proceed(call)

    client = connect(supervised.address, interceptors=[Ask()])
    assert client.call("add", 1, 2) == 3
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("no_such_method")
    with pytest.raises(shmrpc.ConnectionLost):
        client.call("set_to", 5)
    assert answers == {"add": False, "no_such_method": False, "set_to": True}


def test_cancelling_a_repeated_future_reaches_the_server(directory, connect):
    server, started, ended = shmrpc.Server("calc"), threading.Event(), threading.Event()

    @server.method
    def hold():
        started.set()
        call = shmrpc.current_call()
        wait_until(lambda: call.cancelled)
        ended.set()

    with server:
        client = connect("calc", retries=3)
        future = client.submit("hold")
        assert started.wait(10)
        assert future.cancel()
        assert ended.wait(10)
        assert future.cancelled()


def test_a_closed_client_repeats_nothing(directory):
    with shmrpc.Server("calc"):
        client = shmrpc.connect("calc", retries=1000)
    client.close()
    with pytest.raises(shmrpc.Cancelled):
        client.call("add", 1, 2)
    with pytest.raises(shmrpc.Cancelled):
        client.submit("add", 1, 2).result(10)


def test_a_forked_child_repeats_nothing(directory):
    code = (
        "import os, shmrpc, sys\n"
        "with shmrpc.Server('calc'), shmrpc.connect('calc', retries=1000) as client:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            client.call('add', 1, 2)\n"
        "        except shmrpc.ForkedError:\n"
        "            os._exit(7)\n"
        "        os._exit(1)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    assert subprocess.run(command, check=False, timeout=30).returncode == 0


RESTARTED = """
import os, sys, time
import shmrpc

server = shmrpc.Server(sys.argv[1])


@server.method(idempotent=True)
def pid():
    return os.getpid()


@server.method(idempotent=True)
def slow(seconds):
    time.sleep(seconds)
    return os.getpid()


server.start()
print("ready", flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_ten_restarts_lose_no_idempotent_call(directory, transport, end):
    """Sync and asyncio clients, whose only help is ``retries=``; the server drains or is killed."""
    address = {
        "shm": f"shm://{directory}/calc.sock",
        "unix": f"unix://{directory}/calc.sock",
        "tcp": f"tcp://127.0.0.1:{free_port()}",
    }[transport]

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", RESTARTED, address], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        return process

    process = start()
    stopping, errors = threading.Event(), []
    counts, pids = [0] * 4, [set() for _ in range(4)]

    def call_all_the_time(number):
        method = [("pid",), ("slow", 0.01)][number % 2]
        try:
            with shmrpc.connect(address, retries=50) as client:
                while not stopping.is_set():
                    pids[number].add(client.call(*method, timeout=30))
                    counts[number] += 1
        except BaseException as error:
            errors.append(error)

    async def await_all_the_time(number):
        async with aio.connect(address, retries=50) as client:
            while not stopping.is_set():
                pids[number].add(await client.call("slow", 0.002, timeout=30))
                counts[number] += 1

    def in_loop(number):
        try:
            asyncio.run(await_all_the_time(number))
        except BaseException as error:
            errors.append(error)

    def progress():
        goal = [count + 5 for count in counts]
        wait_until(
            lambda: errors or all(have >= least for have, least in zip(counts, goal, strict=True)),
            30,
            "calls of every client",
        )
        assert not errors

    work = [call_all_the_time, call_all_the_time, in_loop, in_loop]
    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n, run in enumerate(work)]
    for thread in threads:
        thread.start()
    served = []
    try:
        for _ in range(10):
            progress()
            served.append(process.pid)
            process.send_signal(end)
            process.wait(20)
            process.stdout.close()
            process = start()
        progress()
        served.append(process.pid)
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
        process.kill()
        process.wait()
        process.stdout.close()
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    assert all(seen == set(served) for seen in pids)
