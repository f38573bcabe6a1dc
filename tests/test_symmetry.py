"""Calls in both directions over one connection: whose thread serves them, and how they end."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import SLACK, Process, in_threads, wait_until
from duplex import ask, nest

import shmrpc

HOWS = ("call", "submit", "stream", "items", "result")
STORM_SECONDS = 5


def offer(client, *functions):
    for function in functions:
        client.method(function)
    return client


# ---- who serves ----


@pytest.mark.parametrize("workers", [1, 16])
def test_nested_calls(transport, service, connect, workers):
    client = offer(connect(service(transport, workers=workers).address), nest)
    for depth in range(1, 61):
        assert client.call("nest", depth, timeout=20) == depth


def test_nested_calls_in_many_threads_with_one_worker(transport, service, connect):
    client = offer(connect(service(transport, workers=1).address), nest)

    def work(number):
        return [client.call("nest", depth, timeout=20) for depth in range(number, number + 10)]

    expected = [list(range(number, number + 10)) for number in range(8)]
    assert in_threads(8, work, timeout=40) == expected


@pytest.mark.parametrize("how", HOWS)
def test_a_thread_that_waits_serves(client, how):
    """No other thread is woken for a handler that calls back."""

    @client.method
    def thread():
        return threading.get_ident()

    def work(_=0):
        if how == "call":  # it waits before its request is out
            served = [client.call("call_back", "call", "thread") for _ in range(50)]
            return set(served) == {threading.get_ident()}
        if how in {"stream", "items"}:
            served = ask(client, how, "call_back_stream", "thread", 20, 0.01)
        else:
            served = [ask(client, how, "call_back_late", "thread", 0.01) for _ in range(20)]
        # The handler may be faster than this thread, which is not waiting yet then.
        return served.count(threading.get_ident()) > 10

    assert work()
    assert in_threads(1, work) == [True]


def test_a_thread_that_waits_to_send_serves(client):
    """The handler takes no message before it has called back."""
    served = []

    @client.method
    def thread():
        served.append(threading.get_ident())

    for _ in range(10):
        with client.open("calls_back_first", "thread", 0.02) as call:
            for number in range(2000):
                call.send(number)
            call.close_send()
            assert list(call) == [None, sum(range(2000))]
    assert served.count(threading.get_ident()) > 5


def test_methods_from_before_and_after_connecting(transport, service, connect):
    """``method`` works at any time, and again: the newest wins."""
    client = connect(service(transport).address)
    assert client.call("call_back_outcome", "call", "late")[0] == "MethodNotFound"
    client.method(name="late")(lambda: 1)
    assert client.call("call_back", "call", "late") == 1
    client.method(name="late")(lambda: 2)
    assert client.call("call_back", "call", "late") == 2
    client.method(name="later")(lambda: 3)
    assert client.call("call_back", "call", "later") == 3
    in_threads(8, lambda number: client.method(name=f"n{number}")(lambda: number))
    assert [client.call("call_back", "call", f"n{number}") for number in range(8)] == list(range(8))


def test_a_client_where_nobody_waits_serves_from_a_thread_of_its_own(client):
    served, done = [], threading.Event()

    @client.method
    def note(number):
        served.append((number, threading.current_thread().name))
        if number == 59:
            done.set()
        return number

    client.call("kept.keep", "a")
    # A notification: in a call this thread would wait, and could serve the first of them itself.
    client.notify("kept.later", "a", "note", [0, 0.001, 0.02] * 20)
    assert done.wait(20)
    assert [number for number, _ in served] == list(range(60))
    assert all(name.startswith("shmrpc-worker") for _, name in served)
    wait_until(lambda: len(client.call("kept.outcomes_of", "a")) == 60)
    assert client.call("kept.outcomes_of", "a") == [["ok", number] for number in range(60)]


@pytest.mark.slow
def test_after_seconds_of_silence(client):
    """Both sides sleep without a timer; the next call wakes them."""
    numbers, done = [], threading.Event()

    @client.method
    def note(number):
        numbers.append(number)
        if number == 3:
            done.set()

    client.call("kept.keep", "b")
    client.call("kept.later", "b", "note", [0, 2.5, 0, 2.5])
    assert done.wait(20)
    assert numbers == [0, 1, 2, 3]


def test_a_worker_of_the_client_that_is_busy_holds_up_nobody(client):
    """While client methods run or wait in threads of its own, the next ones are still served."""
    gate, running = threading.Event(), threading.Semaphore(0)

    @client.method
    def block(number):
        running.release()
        assert gate.wait(30)
        return number

    client.method(name="quick")(lambda: "quick")
    for number in range(6):
        client.call("kept.keep", f"c{number}")
        client.call("kept.later", f"c{number}", "block", [0.2])  # not while we wait for this
    for _ in range(6):
        assert running.acquire(timeout=10)
    assert client.call("kept.call", "c0", "quick") == ["ok", "quick"]
    assert client.call("echo", 1) == 1
    gate.set()
    for number in range(6):
        wait_until(lambda n=number: client.call("kept.outcomes_of", f"c{n}") == [["ok", 0]])


def test_a_handler_that_waits_for_its_caller_holds_up_no_other_client(service, transport, connect):
    """The thread that waits reads for the whole server meanwhile."""
    running = service(transport)
    clients = [connect(running.address) for _ in range(4)]
    gate = threading.Event()
    entered = [threading.Event() for _ in clients]
    for number, client in enumerate(clients):
        client.method(name="block")(lambda n=number: entered[n].set() or gate.wait(30))
    futures = [client.submit("call_back", "call", "block") for client in clients[1:]]
    threads = [threading.Thread(target=future.result) for future in futures]
    for thread in threads:
        thread.start()
    assert all(event.wait(10) for event in entered[1:])
    for _ in range(20):
        assert clients[0].call("add", 1, 2) == 3
        assert connect(running.address).call("add", 1, 2) == 3
    gate.set()
    for thread in threads:
        thread.join(10)
    assert [future.result(10) for future in futures] == [True] * 3


# ---- kinds of calls and their errors ----


@pytest.mark.parametrize("how", ["call", "submit", "result"])
def test_unary_methods_of_a_client(client, how):
    client.method(name="add")(lambda a, b=1: a + b)
    assert client.call("call_back", how, "add", 1, 2) == 3
    assert client.call("call_back", how, "add", 1, b=5) == 6
    data = os.urandom(1 << 20)
    client.method(name="double")(lambda data: data + data)
    assert client.call("call_back", how, "double", data) == data + data


@pytest.mark.parametrize("how", ["stream", "items"])
def test_methods_of_a_client_that_stream(client, how):
    @client.method
    def count(limit):
        yield from range(limit)

    assert client.call("call_back", how, "count", 3) == [0, 1, 2]
    assert client.call("call_back", how, "count", 5000) == list(range(5000))


def test_methods_of_a_client_that_take_messages(client):
    @client.method(requests=True)
    def square(requests):
        for number in requests:
            yield number * number

    @client.method(requests=True)
    def total(requests):
        return [sum(requests)]

    items = list(range(700))  # more than a window; beyond two, both would only send
    assert client.call("upload_back", "square", items) == [number * number for number in items]
    # One result and no stream: its caller iterates, and is told how to ask.
    with pytest.raises(shmrpc.RemoteError, match="returns one result"):
        client.call("upload_back", "total", items)


def test_errors_of_a_client_s_methods_reach_the_handler(client, transport):
    @client.method
    def boom():
        raise KeyError("no such key")

    @client.method
    def boom_late():
        yield 1
        raise shmrpc.Abort("NOT_FOUND", "no more of it")

    for how in ("call", "submit", "result"):
        name, text, code, _, shown = client.call("call_back_outcome", how, "boom")
        assert (name, code) == ("RemoteError", "UNKNOWN")
        assert "no such key" in text
        assert ("in boom" in shown) == (transport != "tcp")  # whose peer may be anybody
    name, text, code, *_ = client.call("call_back_outcome", "stream", "boom_late")
    assert (name, code) == ("RemoteError", "NOT_FOUND")
    assert "no more of it" in text
    for how in HOWS:
        name, text, code, *_ = client.call("call_back_outcome", how, "no_such_method")
        assert (name, code) == ("MethodNotFound", "UNIMPLEMENTED")
        assert "no_such_method" in text
        assert str(os.getpid()) in text  # who has none


def test_a_client_without_methods_says_so(client):
    for how in HOWS:
        assert client.call("call_back_outcome", how, "anything")[0] == "MethodNotFound"


def test_the_caller_of_a_client_s_method_is_the_client(client):
    @client.method
    def who():
        call = shmrpc.current_call()
        assert call.caller is client
        return [call.method, call.peer.pid, call.deadline is None]

    pid = client.call("pid")
    assert client.call("call_back", "call", "who") == ["who", pid, True]
    with pytest.raises(RuntimeError, match="handler"):
        shmrpc.current_call()


def test_refused_beyond_max_concurrency(transport, service, connect):
    """Calls that wait for their caller count as well: there is a thread for each of them."""
    running = service(transport, workers=2, max_concurrency=8)
    client = connect(running.address)
    calls = [client.open("pass_on") for _ in range(8)]
    for call in calls:
        call.send(1)
        assert next(call) == 1
    with pytest.raises(shmrpc.Overloaded), client.open("pass_on") as ninth:
        next(ninth)
    with pytest.raises(shmrpc.Overloaded):
        client.call("add", 1, 2)
    calls.pop().close()
    wait_until(lambda: _accepted(client))
    for call in calls:
        call.send(2)
        assert next(call) == 2
        call.close()


def _accepted(client):
    try:
        return client.call("add", 1, 2) == 3
    except shmrpc.Overloaded:
        return False


# ---- connections that end ----


def test_methods_are_offered_again_after_a_reconnection(transport, service, connect):
    running = service(transport)
    client = offer(connect(running.address), nest)
    for _ in range(3):
        assert client.call("nest", 7) == 7
        running.kill()
        running = service(running.address)
        client.method(name="newest")(running.pid.__int__)
        assert client.call("nest", 7) == 7
        assert client.call("call_back", "call", "newest") == running.pid
    assert client.stats()["reconnects"] == 3


def test_caller_of_a_connection_that_is_gone(transport, service, connect):
    running = service(transport)
    client = offer(connect(running.address), nest)
    client.call("kept.keep", "gone")
    client.close()
    other = connect(running.address)
    wait_until(lambda: other.call("stats")["conns"] == 1)
    for _ in range(3):
        name, text, _, outcome, _ = other.call("kept.call", "gone", "nest", 1)
        assert (name, outcome) == ("ConnectionLost", "not_sent")
        assert str(os.getpid()) in text


CLIENT = """
import os, sys, time
import shmrpc

client = shmrpc.connect(sys.argv[1])

@client.method
def hang(*_):
    print("serving", flush=True)
    time.sleep(60)

if sys.argv[2] == "inline":
    client.call("call_back_outcome", sys.argv[3], "hang")
else:
    client.call("kept.keep", "killed")
    client.call("kept.later", "killed", "hang", [0.2])  # not while we wait for this
    print("waiting", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["call", "submit", "stream", "result", "background"])
def test_a_client_is_killed_while_the_server_waits_for_it(transport, service, connect, how):
    running = service(transport)
    observer = connect(running.address)
    place = "background" if how == "background" else "inline"
    child = Process(
        [sys.executable, "-c", CLIENT, running.address, place, how], stdout=subprocess.PIPE
    )
    with child:
        assert b"serving" in child.stdout.readline() + (
            child.stdout.readline() if how == "background" else b""
        )
        start = time.monotonic()
        child.kill()

        def outcomes():
            if how == "background":
                return observer.call("kept.outcomes_of", "killed")
            return observer.call("call_back_outcomes")

        (outcome,) = wait_until(outcomes)
        assert time.monotonic() - start < SLACK
    name, text, _, became, _ = outcome
    assert (name, became) == ("ConnectionLost", "unknown")
    assert str(child.pid) in text


@pytest.mark.parametrize("inline", [True, False])
def test_the_server_is_killed_while_a_client_serves(transport, service, connect, inline):
    running = service(transport)
    client = connect(running.address)
    served, killed = threading.Event(), []

    @client.method
    def kill(_=None):
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        for how in ("call", "result"):
            try:
                ask(client, how, "echo", 1, timeout=0.2)
            except shmrpc.Error as error:
                killed.append(error)
        served.set()
        return 1

    if inline:
        with pytest.raises(shmrpc.ConnectionLost) as caught:
            client.call("call_back", "call", "kill")
        assert caught.value.outcome == "unknown"
    else:
        client.call("kept.keep", "x")
        with contextlib.suppress(shmrpc.ConnectionLost):  # it may be killed before it replies
            client.call("kept.later", "x", "kill", [0])
    assert served.wait(10)
    assert len(killed) == 2
    assert all(isinstance(e, shmrpc.ConnectError | shmrpc.ConnectionLost) for e in killed)
    again = service(running.address)
    assert client.call("pid") == again.pid


def test_many_clients_with_methods(transport, service, connect):
    running = service(transport)
    clients = [connect(running.address) for _ in range(40)]
    for number, client in enumerate(clients):
        client.method(name="me")(lambda number=number: number)
        client.call("kept.keep", str(number))

    def work(number):
        client = clients[number]
        own = [client.call("call_back", "call", "me") for _ in range(5)]
        other = (number + 7) % len(clients)
        return own == [number] * 5 and client.call("kept.call", str(other), "me") == ["ok", other]

    assert all(in_threads(len(clients), work, timeout=40))


# ---- load ----


class Storm:
    """Threads of one client that call, and are called, in all ways at once."""

    def __init__(self, client, seconds):
        self.client = client
        self.end = time.monotonic() + seconds
        self.done = 0
        offer(client, nest)
        client.method(name="echo")(lambda value: value)
        client.method(self.count)

    @staticmethod
    def count(limit):
        yield from range(limit)

    def run(self, seed):
        chance = random.Random(seed)
        acts = [self.nest, self.echo, self.futures, self.stream, self.back, self.late, self.cancel]
        while time.monotonic() < self.end:
            chance.choice(acts)(chance)
            self.done += 1

    def nest(self, chance):
        depth = chance.randrange(1, 7)
        assert self.client.call("nest", depth, timeout=30) == depth

    def echo(self, chance):
        data = chance.randbytes(chance.choice((1, 100, 30_000)))
        assert self.client.call("echo", data, timeout=30) == data

    def futures(self, chance):
        numbers = range(chance.randrange(1, 20))
        futures = [self.client.submit("call_back", "call", "echo", n, timeout=30) for n in numbers]
        assert [future.result() for future in futures] == list(numbers)

    def stream(self, chance):
        limit = chance.randrange(700)
        with self.client.stream("count", limit, timeout=30) as call:
            expected = list(range(limit))
            if chance.random() < 0.3:
                expected = expected[: limit // 2]
                assert [next(call) for _ in expected] == expected
            else:
                assert list(call) == expected

    def back(self, chance):
        how, limit = chance.choice(("stream", "items")), chance.randrange(700)
        assert self.client.call("call_back", how, "count", limit, timeout=30) == list(range(limit))

    def late(self, chance):
        try:
            self.client.call("nest", 5, timeout=chance.uniform(0, 0.002))
        except shmrpc.DeadlineExceeded:
            pass
        except shmrpc.RemoteError as error:
            assert error.code == "DEADLINE_EXCEEDED"  # noqa: PT017 - or a success

    def cancel(self, chance):
        future = self.client.submit("nest", 5)
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0, 0.001))
        future.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 8])
def test_storm(transport, service, connect, workers):
    seed = random.randrange(1 << 32)
    print(f"SHMRPC_SEED={seed}")
    running = service(transport, workers=workers)
    storm = Storm(connect(running.address), STORM_SECONDS)
    in_threads(6, lambda number: storm.run(seed + number), timeout=STORM_SECONDS + 40)
    print(f"{storm.done} acts in {STORM_SECONDS} s")
    # What was given up may still run: then everything is as before.
    wait_until(lambda: storm.client.call("stats")["running"] == 1)
    assert storm.client.call("nest", 60) == 60


# ---- handlers that wait ----


def test_streams_that_wait_use_up_no_workers(transport, service, connect):
    running = service(transport, workers=4)
    clients = [connect(running.address) for _ in range(50)]
    process = psutil.Process(running.pid)
    threads = process.num_threads()
    calls = [client.open("pass_on") for client in clients]
    for number, call in enumerate(calls):
        call.send(number)
        assert next(call) == number
    for client in clients:
        assert client.call("add", 1, 2, timeout=20) == 3
    assert clients[0].call("sleep", 0.01, "x") == "x"
    assert process.num_threads() >= threads + 40
    for number, call in enumerate(calls):
        call.send(number + 1)
        assert next(call) == number + 1
    for call in calls:
        call.close()
    wait_until(lambda: process.num_threads() < threads + 20, what="the end of idle threads")
    wait_until(lambda: clients[0].call("stats")["running"] == 1)


def test_handlers_that_wait_for_each_other(transport, service, connect):
    """More handlers than workers, each of which needs another one to run."""
    running = service(transport, workers=2)
    client = offer(connect(running.address), nest)
    futures = [client.submit("nest", 6) for _ in range(30)]
    assert [future.result(40) for future in futures] == [6] * 30


IDLE = """
import sys, time
import shmrpc

client = shmrpc.connect(sys.argv[1])
client.method(name="echo")(lambda value: value)
assert client.call("call_back", "call", "echo", 5) == 5
client.call("kept.keep", "idle")
client.call("kept.later", "idle", "echo", [0])
print("idle", flush=True)
sys.stdin.read()
"""


def cpu_seconds(pid):
    """Of all its threads, more exact than ticks."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@pytest.mark.slow
def test_a_client_with_methods_that_has_nothing_to_do_uses_no_cpu(transport, service):
    running = service(transport)
    child = Process(
        [sys.executable, "-c", IDLE, running.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout.readline() == b"idle\n"
        time.sleep(0.5)  # for spinning and standing by to end
        before = [cpu_seconds(pid) for pid in (child.pid, running.pid)]
        time.sleep(2)
        used = [
            cpu_seconds(pid) - b for pid, b in zip((child.pid, running.pid), before, strict=True)
        ]
        child.stdin.close()
    assert child.returncode == 0
    print("client and server used", used)
    assert max(used) < 0.05
