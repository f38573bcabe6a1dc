"""``ConnectionLost.outcome`` is true, whenever and however the server is killed.

First states that are arranged: calls in the server's queue, calls that it never read, senders that
its death overtakes. Then storms of kills at random moments, in which a server writes each call that
it starts into a file before it does anything else.
"""

import concurrent.futures
import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import address_of, in_threads, pause, shm_names, wait_until
from mortal import LINE_BYTES, WORKERS

import shmrpc
from shmrpc._native import lib

KILLS = max(2000, int(os.environ.get("SHMRPC_KILLS", "0")))
SAFE = {"not_sent", "not_started", "not_connected"}  # what is called so has not run


def fate_of(ask):
    """What became of a call."""
    try:
        ask()
    except shmrpc.ConnectionLost as error:
        return error.outcome
    except shmrpc.ConnectError:
        return "not_connected"
    return "done"


# ---- servers to kill ----


class Mortals:
    """Makes servers that log what they start; see mortal.py."""

    def __init__(self, log):
        self._log = log
        self._parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mortal.py")), log.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, *addresses):
        self._parent.stdin.write(f"{json.dumps(addresses)}\n".encode())
        self._parent.stdin.flush()
        answer = json.loads(self._parent.stdout.readline())
        assert "error" not in answer, answer["error"]
        return Mortal(answer["pid"], answer["addresses"])

    def started(self):
        """The numbers of the calls that were started since it was asked last."""
        data = self._log.read()
        assert len(data) % LINE_BYTES == 0
        return [int(line) for line in data.split()]

    def close(self):
        self._parent.kill()
        self._parent.communicate()


class Mortal:
    """A server process, of which nothing runs any more after ``kill`` or ``wait``."""

    def __init__(self, pid, addresses):
        self.address = addresses[0]
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def signal(self, number):
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self):
        """Until it is dead."""
        assert select.select([self._pidfd], [], [], 20)[0], f"pid {self.pid} lives on"
        os.close(self._pidfd)


@pytest.fixture
def mortals(directory):
    path = Path(directory) / "log"
    path.touch()
    with path.open("rb") as log, contextlib.closing(Mortals(log)) as parent:
        yield parent


# ---- arranged states ----


class Words:
    """What the two segments of a connection say, as docs/protocol.md has it."""

    def __init__(self, segments):
        (self._own,) = [start for start, mode in segments if mode == "rw-s"]
        (self._peer,) = [start for start, mode in segments if mode == "r--s"]

    def sent(self):
        return ctypes.c_uint64.from_address(self._own + 128).value

    def answered(self):
        return ctypes.c_uint64.from_address(self._peer + 128).value

    def taken(self):
        return ctypes.c_uint64.from_address(self._peer + 256).value

    def queued(self):
        places = (ctypes.c_uint64 * 448).from_address(self._peer + 512)
        return sum(call_id != 0 for call_id in places)


def mapped_segments():
    """Start and mode of each segment in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    fields = [line.split() for line in lines if "shmrpc" in line]
    return {(int(f[0].partition("-")[0], 16), f[1]) for f in fields if f[1].endswith("s")}


def connect_watched(connect, address):
    """A client, and the words of its connection."""
    before = mapped_segments()
    client = connect(address)
    return client, Words(mapped_segments() - before)


WAYS = ("call", "timeout", "submit", "stream")


def ask(client, pool, how, count, method, *args):
    """So many calls as futures, made in one way or in all."""
    if how == "call":
        return [pool.submit(client.call, method, *args) for _ in range(count)]
    if how == "timeout":
        return [pool.submit(client.call, method, *args, timeout=60) for _ in range(count)]
    if how == "submit":
        return [client.submit(method, *args) for _ in range(count)]
    if how == "stream":
        return [pool.submit(list, client.stream(method, *args)) for _ in range(count)]
    ways = [ask(client, pool, way, count // len(WAYS), method, *args) for way in WAYS]
    return [future for futures in ways for future in futures]


def outcomes(futures):
    return Counter(future.exception(20).outcome for future in futures)


def hold_all_workers(client, words):
    held = [client.submit("hold") for _ in range(WORKERS)]
    wait_until(lambda: words.taken() == words.sent() and words.queued() == 0)
    return held


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(32) as executor:
        yield executor


@pytest.mark.parametrize("data", [b"", bytes(200_000)], ids=["small", "large"])
@pytest.mark.parametrize("how", [*WAYS, "all"])
def test_calls_in_the_servers_queue(pool, service, connect, how, data):
    running = service("shm", workers=WORKERS)
    client, words = connect_watched(connect, running.address)
    held = hold_all_workers(client, words)
    waiting = ask(client, pool, how, 24, "size", data)
    wait_until(lambda: words.queued() == 24)
    running.kill()
    assert outcomes(waiting) == {"not_started": 24}
    assert outcomes(held) == {"unknown": WORKERS}


@pytest.mark.parametrize("how", [*WAYS, "all"])
def test_calls_that_the_server_never_read(pool, service, connect, how):
    running = service("shm")
    client, words = connect_watched(connect, running.address)
    client.call("add", 1, 2)
    span = words.sent()
    running.pause()
    waiting = ask(client, pool, how, 24, "add", 1, 2)
    wait_until(lambda: words.sent() == 25 * span)
    running.kill()
    assert outcomes(waiting) == {"not_started": 24}


def test_more_calls_than_the_server_queues(service, connect):
    """It reads no further then, and leaves the rest in the ring."""
    running = service("shm", workers=WORKERS)
    client, words = connect_watched(connect, running.address)
    held = hold_all_workers(client, words)
    waiting = [client.submit("add", 1, 2) for _ in range(600)]
    wait_until(lambda: words.queued() == 448)
    assert words.taken() < words.sent()
    running.kill()
    assert outcomes(waiting) == {"not_started": 600}
    assert outcomes(held) == {"unknown": WORKERS}


def test_notifications_in_the_same_queue(service, connect, directory):
    """They have no id, and no place in the table of those that wait."""
    running = service("shm", workers=1)
    client, words = connect_watched(connect, running.address)
    held = client.submit("hold", f"{directory}/release")
    client.notify("note_and_hold", f"{directory}/noted", "1")
    waiting = [client.submit("add", 1, 2) for _ in range(3)]
    wait_until(lambda: words.queued() == 3)
    Path(f"{directory}/release").touch()
    assert held.result(20) is None
    wait_until(lambda: os.path.exists(f"{directory}/noted"))
    running.kill()
    assert outcomes(waiting) == {"not_started": 3}


def test_futures_whose_connection_was_replaced(service, connect):
    """Another call notices the loss and connects again, before anybody asks for them."""
    running = service("shm", workers=WORKERS)
    client, words = connect_watched(connect, running.address)
    held = hold_all_workers(client, words)
    waiting = [client.submit("add", 1, 2) for _ in range(24)]
    wait_until(lambda: words.queued() == 24)
    running.kill()
    service(running.address)
    assert client.call("add", 1, 2) == 3
    assert outcomes(waiting) == {"not_started": 24}
    assert outcomes(held) == {"unknown": WORKERS}


@pytest.mark.parametrize("count", [0, 200_000], ids=["small", "large"])
def test_replies_that_a_thread_has_taken_when_another_learns_of_the_end(
    pool, service, connect, count
):
    """The first of two runs its callbacks meanwhile, which may take as long as they like."""
    running = service("shm")
    client, words = connect_watched(connect, running.address)
    client.call("zeros", count)
    span = words.answered()
    first, second = client.submit("zeros", count), client.submit("zeros", count)
    wait_until(lambda: words.answered() == 3 * span)
    held = client.submit("hold")
    wait_until(lambda: words.taken() == words.sent() and words.queued() == 0)
    fates = []

    def end(_):
        running.kill()
        fates.append(pool.submit(fate_of, held.result).result(20))

    # The base class's own: ours would have a thread read at once.
    concurrent.futures.Future.add_done_callback(first, end)
    assert first.result(20) == bytes(count)
    assert fates == ["unknown"]
    assert second.result(20) == bytes(count)


def test_call_that_kills_before_its_sender_runs_on(pool, service, connect):
    """The server takes the call, and dies of it, while the sender waits for the same CPU."""
    running = service("shm", workers=WORKERS)
    client = connect(running.address)
    reader = pool.submit(client.call, "hold")  # notices the death, and tells for all
    wait_until(lambda: client.call("running") == 1)
    cpu = min(os.sched_getaffinity(0))
    for thread in os.listdir(f"/proc/{running.pid}/task"):
        os.sched_setaffinity(int(thread), {cpu})

    def die():
        os.sched_setaffinity(0, {cpu})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        client.call("die")

    assert in_threads(1, lambda _: fate_of(die)) == ["unknown"]
    assert outcomes([reader]) == {"unknown": 1}


@pytest.mark.parametrize("how", ["call", "submit", "notify"])
def test_sender_that_waits_longer_than_its_call_takes(pool, mortals, connect, directory, how):
    """The first of three calls has run when the second kills; most of the third is not sent."""
    server = mortals.start(address_of("shm", directory))
    client = connect(server.address, max_memory_bytes=0)  # or they would not wait in the outbox

    def make(*args):
        if how == "submit":
            return client.submit(*args).result(20)
        return getattr(client, how)(*args)

    def send(nbytes, *args):
        end = client.stats()["outbox_bytes"] + nbytes - 100_000  # the ring takes some
        future = pool.submit(fate_of, lambda: make(*args, bytes(nbytes)))
        wait_until(lambda: client.stats()["outbox_bytes"] > end)
        return future

    pause(server.pid)
    first = send(1_000_000, "run", 1, 0)
    second = send(1_000_000, "die", 2)
    third = send(50_000_000, "die", 3)
    server.signal(signal.SIGCONT)
    server.wait()
    assert mortals.started() == [1, 2]
    assert first.result(20) == ("unknown" if how == "notify" else "done")
    assert second.result(20) == "unknown"
    assert third.result(20) == "not_sent"


class _Call:
    """A call that is about to be sent."""

    def replied(self, status, metadata, body):
        raise AssertionError

    def lost(self, error):
        """Its thread will see that."""


def test_thread_that_registers_its_call_when_another_one_has_hung_up(mortals, connect, directory):
    """It used to be told that the call may have run, whatever had become of it."""
    server = mortals.start(address_of("shm", directory))
    client = connect(server.address)
    client.ping()
    connection = client._link
    connection.register(1, _Call())  # as any call before
    connection.session.calls.clear()
    slot = connection.slot()
    server.kill()
    client._drop(connection)  # by a thread whose call found the server dead
    connection.register(2, _Call())
    assert connection.outcome(2, 1 << 40) == lib.SHMRPC_NOT_SENT
    connection.slots.append(slot)


# ---- storms ----


class Load:
    """Calls of every kind on a few clients, from several threads, until the server is dead."""

    THREADS = 6
    CLIENTS = 2

    def __init__(self, address):
        # A call that finds the server dead looks for another one so long.
        self.clients = [shmrpc.connect(address, timeout=0.1) for _ in range(self.CLIENTS)]
        self.numbers = itertools.count(1)
        self.fates = {}  # of the current server: number of a call -> (kind, what became of it)
        self.longest = 0.0
        self.dead = threading.Event()

    def close(self):
        for client in self.clients:
            client.close()

    def wait_connected(self):
        for client in self.clients:
            wait_until(lambda client=client: fate_of(lambda: client.ping(20)) == "done")

    def run(self, seed, kill):
        """Have the server killed under load; returns when every call has ended."""
        self.fates = {}
        self.longest = random.Random(seed).choice((0, 0.002, 0.02))
        self.dead.clear()
        begun = threading.Barrier(self.THREADS + 1)

        def work(number):
            begun.wait()
            if number == self.THREADS:
                kill()
                self.dead.set()
                return
            chosen = random.Random(f"{seed}-{number}")
            while not self.dead.is_set():
                self.call_somehow(self.clients[number % self.CLIENTS], chosen)

        in_threads(self.THREADS + 1, work)

    def call_somehow(self, client, chosen):
        kind = chosen.choice(("call", "timeout", "notify", "stream", "submit", "wait"))
        if kind in {"submit", "wait"}:
            self.submit(client, chosen, kind)
            return
        number, *rest = args = self.arguments(chosen)
        if kind == "call":
            fate = fate_of(lambda: client.call("run", *args))
        elif kind == "timeout":
            fate = fate_of(lambda: client.call("run", number, *rest, timeout=60))
        elif kind == "stream":
            fate = fate_of(lambda: list(client.stream("items", *args)))
        else:
            fate = fate_of(lambda: client.notify("run", *args))
        self.fates[number] = kind, fate

    def submit(self, client, chosen, kind):
        """Many calls at once, each of which its thread or a background one reads for."""
        futures = {}
        for _ in range(chosen.randrange(1, 50)):
            if self.dead.is_set():
                break
            number, *_ = args = self.arguments(chosen)

            def submit(number=number, args=args):
                futures[number] = client.submit("run", *args)

            self.fates[number] = kind, fate_of(submit)
        if kind == "wait":
            concurrent.futures.wait(futures.values())
        for number, future in futures.items():
            self.fates[number] = kind, fate_of(future.result)

    def arguments(self, chosen):
        """A call's number, how long it runs, and what it carries: some more than the ring holds."""
        seconds = chosen.choice((0, self.longest * chosen.random()))
        return next(self.numbers), seconds, bytes(chosen.choice((0, 0, 0, 0, 10_000, 200_000)))


def check_fates(fates, started, *, is_shm):
    """Hold what callers were told about the calls to a dead server against what it started."""
    ran = set(started)
    assert len(ran) == len(started), "calls that ran twice"
    assert ran <= fates.keys(), "calls that nobody made"
    lies = {n: f for n, f in fates.items() if f[1] in SAFE and n in ran}
    assert not lies, f"they ran: {lies}"
    lies = {n: f for n, f in fates.items() if f[1] == "done" and f[0] != "notify" and n not in ran}
    assert not lies, f"they have results and never ran: {lies}"
    # A notification has no id, by which it could be found in the server's queue.
    unknown = {n for n, (kind, fate) in fates.items() if fate == "unknown" and kind != "notify"}
    if is_shm:
        assert len(unknown) <= WORKERS, (
            f"more than the workers had: {unknown}, of which {unknown & ran} ran"
        )
    else:
        assert "not_started" not in {fate for _, fate in fates.values()}, "no socket can tell"


def storm(mortals, address, kills):
    """Kill that many servers; returns how many calls had each fate."""
    seed = int(os.environ.get("SHMRPC_SEED", "0")) or random.randrange(1, 1 << 32)
    print(f"SHMRPC_SEED={seed}: {kills} kills at {address}")
    chosen = random.Random(seed)
    names = shm_names()
    counts = Counter()
    server = mortals.start(address)
    address = server.address  # with the port that the system chose

    def kill():
        time.sleep(chosen.uniform(0, 0.02))
        server.signal(signal.SIGKILL)

    with contextlib.closing(Load(address)) as load:
        for number in range(kills):
            load.wait_connected()
            load.run(f"{seed}-{number}", kill)
            server.wait()
            check_fates(load.fates, mortals.started(), is_shm=address.startswith("shm"))
            counts.update(fate for _, fate in load.fates.values())
            server = mortals.start(address)
        load.wait_connected()
        # One that was killed while it made a segment has left a name until the next one started.
        assert shm_names() <= names
    server.kill()
    print(json.dumps(counts))
    return counts


def check_counts(counts, kills, transport):
    """Nothing was shown unless all of it has happened, many times."""
    assert counts["done"] > kills / 2
    assert counts["unknown"] > kills / 4
    if transport == "shm":
        assert counts["not_sent"] > kills / 20
        assert counts["not_started"] > kills


@pytest.mark.parametrize("transport, kills", [("shm", 110), ("unix", 20), ("tcp", 20)])
def test_storm(mortals, directory, transport, kills):
    counts = storm(mortals, address_of(transport, directory), kills)
    check_counts(counts, kills, transport)


@pytest.mark.deep
@pytest.mark.timeout(120 + KILLS)
@pytest.mark.parametrize("transport", ["shm", "unix", "tcp"])
def test_long_storm(mortals, directory, transport):
    """SHMRPC_KILLS says how many over shm (2000), SHMRPC_SEED which."""
    faulthandler.cancel_dump_traceback_later()  # it is no hang that it takes longer than others
    kills = KILLS if transport == "shm" else KILLS // 20
    counts = storm(mortals, address_of(transport, directory), kills)
    check_counts(counts, kills, transport)
