"""Many threads, many connections, slow handlers, signals."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SERVICES, SLACK, TRANSPORTS, address_of, in_threads, wait_until

import shmrpc


def mixed_calls(client, number, rounds):
    chosen = random.Random(number)
    for i in range(rounds):
        kind = chosen.randrange(6)
        if kind == 0:
            size = chosen.choice((0, 1, 1000, 20_000, 70_000, 300_000))
            data = bytes([number]) * size
            assert client.call("echo", data) == data
        elif kind == 1:
            assert client.submit("add", number, i).result(20) == number + i
        elif kind == 2:
            client.notify("add", number, i)
        elif kind == 3:
            with pytest.raises(shmrpc.RemoteError):
                client.call("raise_error", "ValueError", "x")
        elif kind == 4:
            assert client.call("keywords", i, key=number) == [[i], {"key": number}]
        else:
            assert client.call("add", number, b=i, timeout=30) == number + i


def test_threads_share_a_client(client):
    in_threads(8, lambda number: mixed_calls(client, number, 200))


def test_switching_threads_all_the_time(client):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(6, lambda number: mixed_calls(client, number, 100))
    finally:
        sys.setswitchinterval(interval)


def test_threads_come_and_go(client):
    for _ in range(20):
        in_threads(10, lambda number: client.call("echo", number))


def test_each_thread_with_its_own_deadline(client):
    def work(number):
        timeout = 0.05 + 0.05 * (number % 4)
        start = time.monotonic()
        with pytest.raises(shmrpc.DeadlineExceeded):
            client.call("hold_until_cancelled", timeout=timeout)
        return time.monotonic() - start - timeout

    late = in_threads(8, work)
    assert min(late) > -0.005
    assert max(late) < 0.2 * SLACK


# ---- handlers that take long ----


def test_slow_handler_holds_up_nobody(transport, service, connect):
    running = service(transport)
    same, other = connect(running.address), connect(running.address)
    same.call("add", 1, 2)
    slow = [same.submit("hold", "", number) for number in range(3)]
    for number in range(50):
        assert same.call("add", number, 1) == number + 1
        assert other.call("add", number, 1) == number + 1
    assert connect(running.address).call("add", 1, 2) == 3
    assert not any(future.done() for future in slow)
    same.call("release")
    assert [future.result(20) for future in slow] == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_bound_what_runs_at_once(transport, service, connect, workers):
    client = connect(service(transport, workers=workers).address)
    futures = [client.submit("sleep", 0.02, number) for number in range(workers * 6)]
    assert [future.result(30) for future in futures] == list(range(workers * 6))
    assert client.call("peak") == workers


def test_more_stuck_handlers_than_workers(transport, service, connect, directory):
    """What is queued runs afterwards; the core answers pings meanwhile."""
    running = service(transport, workers=3)
    client = connect(running.address)
    release = os.path.join(directory, "release")
    stuck = [client.submit("hold", release, number) for number in range(3)]
    queued = [client.submit("echo", number) for number in range(50)]
    other = connect(running.address)
    for _ in range(5):
        assert client.ping(timeout=20) < 1 * SLACK
        assert other.ping(timeout=20) < 1 * SLACK
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("echo", "x", timeout=0.1)
    Path(release).touch()
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("no_such_method", timeout=20)
    assert [future.result(20) for future in queued] == list(range(50))
    assert [future.result(20) for future in stuck] == [0, 1, 2]


def test_workers_that_call_other_servers(transport, service, connect):
    """Handlers block in a client of their own."""
    inner = service(transport)
    outer = connect(service("outer", workers=4).address)
    futures = [outer.submit("call_other", inner.address, "add", n, 1) for n in range(40)]
    assert [future.result(30) for future in futures] == [n + 1 for n in range(40)]


def test_handler_that_calls_its_own_server(transport, service, connect):
    running = service(transport, workers=4)
    client = connect(running.address)
    for number in range(20):
        assert (
            client.call("call_other", running.address, "add", number, 1, timeout=20) == number + 1
        )


# ---- many connections ----


def test_many_connections(transport, service):
    running = service(transport)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(shmrpc.connect(running.address)) for _ in range(200)]
        active = idle[::50]
        in_threads(4, lambda number: mixed_calls(active[number], number, 50))
        for number, client in enumerate(idle):
            assert client.call("echo", number) == number
        in_threads(8, lambda number: mixed_calls(idle[number * 20], number, 30))
        assert active[0].call("stats")["conns"] == 200
    with shmrpc.connect(running.address) as client:
        wait_until(lambda: client.call("stats")["conns"] == 1)


# ---- signals ----

INTERRUPTED = """
import os, signal, sys, threading, time
import shmrpc

address, mode, release = sys.argv[1:]
client, watcher = shmrpc.connect(address), shmrpc.connect(address)
results = []

def wait_for_running(count):
    while watcher.call("running") != count:
        time.sleep(0.005)

def interrupted(what, among=1):
    # Once it runs, and is among so many.
    def interrupt():
        wait_for_running(among)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        what()
    except KeyboardInterrupt:
        print("interrupted", end=" ")
    else:
        print("not interrupted", end=" ")
    thread.join()
    wait_for_running(among - 1)  # an interrupted call is cancelled

def hold():
    client.call("hold_until_cancelled")

def hold_until_timeout():
    client.call("hold_until_cancelled", timeout=100)

def wait_for_future():
    future = client.submit("hold_until_cancelled")
    try:
        future.result()
    finally:
        future.cancel()

def other():
    results.append(client.call("hold", release, "other"))

def follower():
    # Another thread reads for all; it must go on, and so must the interrupted one.
    thread = threading.Thread(target=other)
    thread.start()
    wait_for_running(1)
    interrupted(hold, among=2)
    open(release, "w").close()
    thread.join()
    print(results, end=" ")

def leader():
    # The interrupted one reads for all, and hands that on.
    def later():
        wait_for_running(1)
        other()

    thread = threading.Thread(target=later)
    thread.start()
    interrupted(hold, among=2)
    open(release, "w").close()
    thread.join()
    print(results, end=" ")

def again():
    for _ in range(3):
        interrupted(hold)

alone = {"call": hold, "timeout": hold_until_timeout, "future": wait_for_future}
if mode in alone:
    interrupted(alone[mode])
else:
    {"follower": follower, "leader": leader, "again": again}[mode]()
print([client.call("echo", number) for number in range(3)], client.submit("add", 1, 2).result())
"""


@pytest.mark.parametrize("mode", ["call", "timeout", "future", "follower", "leader", "again"])
def test_keyboard_interrupt(common, transport, directory, mode):
    """Ctrl-C ends the wait at once, and the client goes on working."""
    address = common.addresses[TRANSPORTS.index(transport)]
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, address, mode, f"{directory}/release"],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
    )
    expected = {
        "follower": "interrupted ['other'] ",
        "leader": "interrupted ['other'] ",
        "again": "interrupted " * 3,
    }.get(mode, "interrupted ")
    assert run.stdout == f"{expected}[0, 1, 2] 3\n", run.stderr


@pytest.mark.slow
def test_signals_at_any_moment(client):
    """A handler that raises, at random moments around going to sleep: no wait may miss it."""

    class Alarm(Exception):
        pass

    def alarm(number, frame):
        raise Alarm

    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    before = signal.signal(signal.SIGALRM, alarm)
    worst = 0
    try:
        for _ in range(400):
            start = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, chosen.uniform(0.00005, 0.001))
                client.call("hold_until_cancelled")
            except Alarm:
                worst = max(worst, time.monotonic() - start)
            else:
                pytest.fail("a call ended that should have been interrupted")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert worst < 0.2 * SLACK
    wait_until(lambda: client.call("running") == 0)
    assert client.call("add", 1, 2) == 3


def test_signal_that_raises_nothing_disturbs_nothing(client):
    counted = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: counted.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert client.call("sleep", 0.5, "done") == "done"
        assert client.submit("sleep", 0.3, "done").result() == "done"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(counted) > 10  # handlers ran while the call waited


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_forever_drains(transport, service, connect, number, directory):
    """The call under way ends as it would; new ones are told that they were not started."""
    running = service(transport)
    client = connect(running.address)
    release = f"{directory}/release"
    future = client.submit("hold", release, "finished")
    wait_until(lambda: client.call("running") == 1)
    running.signal(number)
    outcomes = set()

    def refused():
        try:
            client.call("add", 1, 2, timeout=0.2)
        except shmrpc.ConnectionLost as error:
            outcomes.add(error.outcome)
        except (shmrpc.ConnectError, shmrpc.DeadlineExceeded):
            pass
        return "not_started" in outcomes

    wait_until(refused, what="a call that is told so")
    Path(release).touch()
    assert future.result(20) == "finished"
    assert outcomes <= {"not_started", "not_sent"}
    assert running.process.wait(20) == 0
    with pytest.raises((shmrpc.ConnectError, shmrpc.ConnectionLost)):
        client.call("add", 1, 2, timeout=0.3)


def test_stop_with_stuck_handlers_ends(transport, service, connect, directory):
    """The grace is over: the process ends, and the call is told that it may have run."""
    code = (
        "import sys, time, shmrpc\n"
        "server = shmrpc.Server(sys.argv[1])\n"
        "server.method(time.sleep)\n"
        "server.start(); print(server.addresses[0], flush=True)\n"
        "sys.stdin.readline(); server.stop(grace=0.2); print('stopped', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, address_of(transport, directory, "stuck")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=SERVICES.parent,
    )
    client = connect(process.stdout.readline().strip())
    future = client.submit("sleep", 600)
    wait_until(lambda: client.call("shmrpc.stats")["running"])
    output, _ = process.communicate("\n", timeout=50)
    assert output == "stopped\n"
    assert future.exception(5).outcome == "unknown"


@pytest.mark.parametrize("in_process", [False, True])
def test_calls_while_another_thread_computes(transport, common, directory, connect, in_process):
    """Neither starves, also where the server needs the same interpreter's lock."""
    rounds, ended = [0], threading.Event()

    def compute():
        while not ended.is_set():
            sum(range(1000))
            rounds[0] += 1

    with contextlib.ExitStack() as stack:
        address = common.addresses[TRANSPORTS.index(transport)]
        if in_process:
            server = stack.enter_context(shmrpc.Server(address_of(transport, directory)))
            server.method(name="add")(lambda a, b: a + b)
            address = str(server.addresses[0])
        client = connect(address)
        thread = threading.Thread(target=compute)
        thread.start()
        try:
            for number in range(40):
                assert client.call("add", number, 1) == number + 1
                assert client.submit("add", number, 2).result(60) == number + 2
            before = rounds[0]
            wait_until(lambda: client.call("add", 1, 2) == 3 and rounds[0] > before + 10)
        finally:
            ended.set()
            thread.join()
        client.close()
