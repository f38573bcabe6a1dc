"""Who gives a call up, and what its handler sees of it."""

import concurrent.futures
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SLACK, Process, in_threads, wait_until

import shmrpc

# method, arguments after the label, how it is left: what the handler sees
RETURN, EXIT, CANCELLED = ["return", True], ["GeneratorExit", True], ["Cancelled", True]
STREAMS = [
    ("pass_on", (), CANCELLED),  # waits for a message
    ("sum_up", (), CANCELLED),
    ("flood", (1000,), EXIT),  # waits for credit
    ("flood", (100, 0.01), EXIT),  # busy with something else
    ("until_cancelled", (), RETURN),
]


def opened(client, method, label, *args):
    """A call whose handler runs."""
    call = client.open(method, *[label, *args])
    wait_until(lambda: client.call("is_running", label))
    return call


def ended(client, label):
    return wait_until(lambda: client.call("ends_of", label))


def test_future_cancel(client):
    future = client.submit("until_cancelled", "a")
    wait_until(lambda: client.call("is_running", "a"))
    assert future.cancel()
    assert future.cancelled()
    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    assert ended(client, "a") == [RETURN]
    done = client.submit("add", 1, 2)
    assert done.result() == 3
    assert not done.cancel()


@pytest.mark.parametrize("method, args, end", STREAMS)
@pytest.mark.parametrize("how", ["cancel", "close", "with", "drop", "error"])
def test_call_that_is_left(client, method, args, end, how):
    label = f"{method}-{len(args)}-{how}"
    call = opened(client, method, label, *args)
    if how == "cancel":
        assert call.cancel()
        assert not call.cancel()
        with pytest.raises(shmrpc.Cancelled):
            next(call)
        with pytest.raises(shmrpc.Cancelled):
            call.send(1)
        with pytest.raises(shmrpc.Cancelled):
            call.result()
    elif how == "close":
        call.close()
        call.close()
        assert list(call) == []
    elif how == "with":
        with call:
            pass
    elif how == "error":
        with pytest.raises(ZeroDivisionError), call:
            1 / 0  # noqa: B018
    else:
        del call
        gc.collect()
    assert ended(client, label) == [end]
    assert client.call("add", 1, 2) == 3


def test_iteration_that_is_left(client):
    for item in client.stream("flood", "left", 10):
        assert item == bytes(10)
        break
    assert ended(client, "left") == [EXIT]


def test_a_call_that_is_over_is_not_cancelled(client):
    with client.open("add", 1, 2) as call:
        assert call.result() == 3
        assert not call.cancel()
        assert call.result() == 3
    stream = client.stream("numbers", 3)
    assert list(stream) == [0, 1, 2]
    assert not stream.cancel()


@pytest.mark.parametrize("how", ["future", "next", "result", "send", "metadata"])
def test_cancel_from_another_thread(client, how):
    """Who waits for the call wakes up."""
    label = f"elsewhere-{how}"
    call = client.submit("until_cancelled", label) if how == "future" else None
    call = call or client.open("until_cancelled", label)

    def wait(_):
        with pytest.raises((shmrpc.Cancelled, concurrent.futures.CancelledError)):
            if how == "future":
                call.result()
            elif how == "next":
                next(call)
            elif how == "result":
                call.result()
            elif how == "metadata":
                call.initial_metadata  # noqa: B018
            else:
                while True:
                    call.send(0)

    def act(number):
        if number == 1:
            wait_until(lambda: client.call("is_running", label))
            assert call.cancel()
        else:
            wait(number)

    in_threads(2, act)
    assert ended(client, label) == [RETURN]


def test_closing_the_client(transport, service, connect):
    running = service(transport)
    client, observer = connect(running.address), connect(running.address)
    labels = [f"closed-{number}" for number in range(len(STREAMS))]
    calls = [
        opened(client, method, label, *args)
        for (method, args, _), label in zip(STREAMS, labels, strict=True)
    ]
    future = client.submit("until_cancelled", "closed-future")
    wait_until(lambda: client.call("is_running", "closed-future"))
    ready = threading.Barrier(5)

    def work(number):
        ready.wait()
        if number == 3:
            wait_until(lambda: observer.call("is_running", "closed-call"))
            client.close()
        elif number == 4:
            list(calls[0])
        elif number == 2:
            client.call("until_cancelled", "closed-call")
        elif number == 1:
            future.result()
        else:
            calls[4].result()

    def outcome(number):
        try:
            work(number)
        except shmrpc.Cancelled as error:
            return str(error)

    outcomes = in_threads(5, outcome)
    assert outcomes.pop(3) is None
    assert all("the client was closed meanwhile" in text for text in outcomes)
    for (_, _, end), label in zip(STREAMS, labels, strict=True):
        assert ended(observer, label) == [end]
    for label in ("closed-call", "closed-future"):
        assert ended(observer, label) == [RETURN]
    for call in calls:
        assert not call.cancel()
        with pytest.raises(shmrpc.Cancelled):
            call.result()


def test_the_handler_of_a_client_sees_it_too(client):
    """The server gives up a call of one of its client's methods."""
    seen, end = [], threading.Event()

    @client.method
    def wait_here():
        client.notify("begun")
        call = shmrpc.current_call()
        while not call.cancelled and not end.wait(0.001):
            pass
        seen.append(call.cancelled)
        end.set()

    @client.method
    def stream_here():
        try:
            client.notify("begun")
            while True:
                yield 1
        finally:
            end.set()

    client.call("cancel_back", "submit", "wait_here")
    assert end.wait(10)
    assert seen == [True]
    end.clear()
    client.call("cancel_back", "stream", "stream_here")
    assert end.wait(10)


def test_a_queued_call_that_is_cancelled_never_starts(transport, service, connect, directory):
    client = connect(service(transport, workers=1).address)
    path = os.path.join(directory, "noted")
    blocker = client.submit("note_and_hold", path, "first")
    wait_until(lambda: os.path.exists(path))
    futures = [client.submit("note", path, "cancelled") for _ in range(5)]
    calls = [client.open("pass_on", "cancelled") for _ in range(5)]
    client.ping()  # they have arrived
    for call in (*futures, *calls):
        assert call.cancel()
    client.ping()  # so has that
    Path(f"{path}.release").touch()
    assert blocker.result(10) == "first"
    assert client.call("add", 1, 2) == 3
    assert Path(path).read_text().split() == ["first"]
    assert client.call("ends_of", "cancelled") == []


# ---- what comes too late ----


def test_late_replies_are_dropped_and_counted(transport, service, connect):
    client = connect(service(transport).address)
    before = client.stats()
    for _ in range(3):
        with pytest.raises(shmrpc.DeadlineExceeded):
            client.call("sleep", 0.3, timeout=0.05)

    def late():
        client.ping()
        return client.stats()["late_replies"] - before["late_replies"]

    wait_until(lambda: late() >= 3)
    after = client.stats()
    for _ in range(3):
        future = client.submit("sleep", 0.3)
        wait_until(lambda: client.call("running") == 1)
        assert future.cancel()
        wait_until(lambda: client.call("running") == 0)

    def dropped():
        client.ping()
        return client.stats()["frames_dropped"] - after["frames_dropped"]

    wait_until(lambda: dropped() >= 3)
    assert (late(), dropped()) == (3, 3)


def test_late_items_are_dropped_and_counted(transport, service, connect):
    client = connect(service(transport).address)
    for number in range(20):
        call = opened(client, "flood", f"late-{number}", 10)
        call.cancel()
        assert ended(client, f"late-{number}") == [EXIT]
    client.ping()
    assert client.stats()["frames_dropped"] > 0
    assert client.call("add", 1, 2) == 3


@pytest.mark.slow
def test_cancelling_at_any_moment(transport, service, connect):
    """Nothing is left of calls that were given up at a random time."""
    seed = random.randrange(1 << 32)
    print(f"SHMRPC_SEED={seed}")
    client = connect(service(transport, workers=4).address)

    def work(number):
        chance = random.Random(seed + number)
        for _ in range(300):
            method, *args = chance.choice(
                [("echo", 1), ("numbers", 1000), ("pass_on",), ("flood", "any"), ("sleep", 0.001)]
            )
            pause = chance.choice((0, 0, 0.0001, 0.001))
            if method == "echo" and chance.random() < 0.5:
                future = client.submit(method, *args)
                time.sleep(pause)
                assert future.cancel() or future.result() == 1
                continue
            with client.open(method, *args, timeout=30) as call:
                if chance.random() < 0.5 and method != "echo":
                    call.send(1)
                time.sleep(pause)
                assert call.cancel() or method in {"echo", "sleep", "numbers"}
        return True

    assert all(in_threads(4, work, timeout=50))
    wait_until(lambda: client.call("stats")["running"] == 1)
    stats = client.call("stats")
    assert (stats["queued"], stats["outbox_bytes"]) == (0, 0)
    assert list(client.stream("numbers", 2000)) == list(range(2000))


# ---- Ctrl-C ----

CHILD = """
import sys, threading, time
import shmrpc

address, how, label = sys.argv[1:]
client = shmrpc.connect(address)

def elsewhere():
    # A thread of the client's own took it, because ours did not wait yet: once more.
    return threading.current_thread() is not threading.main_thread()

@client.method
def sleep_here():
    if elsewhere():
        return "again"
    client.notify("mark_running", label)
    for _ in range(6000):  # a signal just before one long sleep begins would not end it
        time.sleep(0.01)

@client.method
def wait_here():
    if elsewhere():
        return "again"
    client.call("until_cancelled", label)

def repeat(call):
    while call() == "again":
        pass

def send():
    with client.open("until_cancelled", label) as call:
        while True:
            call.send(0)

def notify():
    while True:
        client.notify("size", bytes(100_000))

works = {
    "call": lambda: client.call("until_cancelled", label),
    "timeout": lambda: client.call("until_cancelled", label, timeout=60),
    "future": lambda: client.submit("until_cancelled", label).result(),
    "next": lambda: next(client.open("pass_on", label)),
    "result": lambda: client.open("until_cancelled", label).result(),
    "send": send,
    "notify": notify,
    "inline": lambda: repeat(lambda: client.call("call_back", "call", "sleep_here")),
    "inline_call": lambda: repeat(
        lambda: client.submit("call_back", "call", "wait_here").result()
    ),
}
print("ready", flush=True)
try:
    works[how]()
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.readline()
print(client.call("add", 1, 2, timeout=10), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "how",
    ["call", "timeout", "future", "next", "result", "send", "notify", "inline", "inline_call"],
)
def test_ctrl_c(transport, service, connect, how):
    """The wait ends at once, the handler is told, and the client can be used further."""
    running = service(transport)
    observer = connect(running.address)
    child = Process(
        [sys.executable, "-c", CHILD, running.address, how, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "ready\n"
        if how == "notify":
            running.pause()
            time.sleep(0.3)  # for its ring to be full
        else:
            wait_until(lambda: observer.call("is_running", how))
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - start < 0.2 * SLACK
        if how == "notify":
            running.resume()
        elif how not in {"future", "inline"}:
            # Interrupting a future's result() does not cancel it: it may be asked again.
            assert ended(observer, how) in ([RETURN], [CANCELLED])
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "3\n"
        child.stdin.close()
    assert child.returncode == 0
    if how == "future":
        assert ended(observer, how) == [RETURN]
    wait_until(lambda: observer.call("stats")["running"] == 1)


INTERRUPTED = """
import faulthandler, random, signal, sys, threading, time
import shmrpc

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

address, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
client = shmrpc.connect(address)
client.method(name="echo")(lambda value: value)
signal.signal(signal.SIGALRM, interrupt)

def bidirectional():
    with client.open("pass_on") as call:
        for number in range(20):
            call.send(number)
        call.close_send()
        assert list(call) == list(range(20))

def futures():
    futures = [client.submit("echo", number) for number in range(20)]
    assert [future.result() for future in futures] == list(range(20))

works = [
    lambda: client.call("echo", 1),
    lambda: client.call("echo", bytes(300_000)),
    lambda: list(client.stream("numbers", 1000)),
    lambda: client.call("call_back", "call", "echo", 1),
    lambda: client.call("call_back", "submit", "echo", 1),
    lambda: client.notify("echo", bytes(100_000)),
    bidirectional,
    futures,
]

def others():
    while time.monotonic() < end:
        number = client.call("echo", 5, timeout=20)
        future = client.submit("echo", 6, timeout=20)
        assert (number, future.result()) == (5, 6)
        assert list(client.stream("numbers", 700, timeout=20)) == list(range(700))
        rounds.append(1)

end = time.monotonic() + seconds
rounds, interrupted = [], 0
thread = threading.Thread(target=others)
thread.start()
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.005))
        for _ in range(100):  # not for ever: an interrupt in a finalizer is ignored
            chance.choice(works)()
    except Interrupt:
        interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
thread.join(30)
if thread.is_alive():
    faulthandler.dump_traceback()
    sys.exit("the other thread hangs")
assert client.call("echo", 1, timeout=10) == 1
print(interrupted, len(rounds))
"""


@pytest.mark.thorough
@pytest.mark.slow
def test_interrupts_at_any_moment(transport, service, connect):
    """A signal handler that raises, anywhere: no other thread of the client suffers."""
    seed = random.randrange(1 << 32)
    print(f"SHMRPC_SEED={seed}")
    running = service(transport)
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", INTERRUPTED, running.address, "4", str(seed)],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
    )
    print(child.stdout, child.stderr)
    assert child.returncode == 0
    interrupted, rounds = map(int, child.stdout.split())
    assert interrupted > 50
    assert rounds > 5
    observer = connect(running.address)
    wait_until(lambda: observer.call("stats")["running"] == 1)
