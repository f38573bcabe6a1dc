"""What servers tell of themselves: also when all their handlers are stuck."""

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading
import time

import msgpack
import pytest
from conftest import SLACK, TRANSPORTS, address_of, in_threads, wait_until

import shmrpc
from shmrpc import aio
from shmrpc.timing import Histogram, percentile

SEED = int(os.environ.get("SHMRPC_SEED", "0")) or random.randrange(1 << 30)
BUILT_IN = ["shmrpc.describe", "shmrpc.health", "shmrpc.stats"]
HEADER = struct.Struct("<8sHBBIIII36x")
INSPECT, REPORT, REFUSE = 6, 7, 5


class Stuck:
    """Handlers that wait until the test has seen what it wants."""

    def __init__(self):
        self.release = threading.Event()
        self.started = threading.Semaphore(0)

    def hold(self):
        """Wait.

        Until released.
        """
        self.started.release()
        self.release.wait()

    def add(self, a: int, b: int = 2, *, c=None) -> int:
        return a + b

    def count(self, n):
        yield from range(n)


@pytest.fixture
def stuck():
    handlers = Stuck()
    yield handlers
    handlers.release.set()


def offer(server, handlers):
    server.method(handlers.hold)
    server.method(handlers.add, name="add")
    server.method(handlers.count)

    @server.method(requests=True, idempotent=True)
    def total(requests):
        return sum(requests)

    @server.method(requests=True)
    def echo(requests):
        yield from requests


@contextlib.contextmanager
def served(kind, handlers, *addresses, **options):
    """A server of either kind, in this process."""
    if kind == "sync":
        server = shmrpc.Server(*addresses, **options)
        offer(server, handlers)
        with server:
            yield server.addresses
            handlers.release.set()
        return
    ready, done = threading.Event(), threading.Event()
    where = []

    async def run():
        server = aio.Server(*addresses)
        offer(server, handlers)

        @server.method
        async def block():  # the loop itself
            handlers.hold()

        async with server:
            where.extend(server.addresses)
            ready.set()
            await asyncio.get_running_loop().run_in_executor(None, done.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield where
    finally:
        handlers.release.set()
        done.set()
        thread.join()


# ---- what there is to learn ----


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_methods(kind, directory, stuck):
    with served(kind, stuck, "calc"), shmrpc.inspect("calc") as inspector:
        methods = {method["name"]: method for method in inspector.describe()}
        offered = ["add", "count", "echo", "hold", "total", *(["block"] if kind == "aio" else [])]
        assert list(methods) == sorted([*offered, *BUILT_IN])
        assert methods["add"] == inspector.describe("add")
        assert methods["hold"]["doc"] == "Wait.\n\nUntil released."
        assert "c=None" in methods["add"]["signature"]
        assert "int = 2" in methods["add"]["signature"]
        kinds = {name: method["kind"] for name, method in methods.items()}
        assert kinds["add"] == "unary"
        assert kinds["count"] == "server_streaming"
        assert kinds["total"] == "client_streaming"
        assert kinds["echo"] == "bidirectional"
        assert methods["total"]["idempotent"]
        assert not methods["add"]["idempotent"]
        assert inspector.describe("no such") is None


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_ordinary_calls_learn_the_same(kind, directory, stuck, connect):
    with served(kind, stuck, "calc"), shmrpc.inspect("calc") as inspector:
        client = connect("calc")
        assert client.call("shmrpc.describe", "add") == inspector.describe("add")
        assert client.call("shmrpc.describe") == inspector.describe()
        assert client.call("shmrpc.health") == {"status": "serving"}
        assert client.call("shmrpc.stats")["pid"] == os.getpid()


def test_functions_that_tell_little(directory):
    class Odd:
        def __repr__(self):
            raise RuntimeError("no")

    server = shmrpc.Server("calc")
    server.method(print, name="builtin")
    server.method(dict.get, name="get")
    server.method(lambda a=Odd(): a, name="odd")  # noqa: B008
    server.method(lambda: None, name="long").__doc__ = "\udc80" + "x" * 100_000
    with server, shmrpc.inspect("calc") as inspector:
        found = {method["name"]: method for method in inspector.describe()}
        assert found["odd"]["signature"] == "(...)"
        assert found["builtin"]["kind"] == "unary"
        assert 1000 < len(found["long"]["doc"]) < 10_000


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_stats(kind, transport, directory, stuck, connect):
    before = time.monotonic()
    with served(kind, stuck, address_of(transport, directory)) as where:
        client = connect(where[0])
        for n in range(5):
            client.call("add", n)
        with shmrpc.inspect(where[0]) as inspector:
            # The last may not quite have ended when its reply is there.
            stats = wait_until(lambda: not (now := inspector.stats())["running"] and now)
            assert (stats["pid"], stats["uid"]) == (os.getpid(), os.geteuid())
            assert stats["addresses"] == where
            assert 0 < stats["uptime"] <= time.monotonic() - before
            assert (stats["conns"], stats["running"], stats["queued"]) == (1, 0, 0)
            assert stats["calls_started"] == stats["methods"]["add"]["calls"] == 5
            assert "p50" not in stats["methods"]["add"]
            assert stats["slowest"] == []
            assert stats["workers"] == []
            if transport == "shm":
                assert stats["ring_bytes"] > 0
                wait_until(lambda: inspector.stats()["ring_used"] == 0)


# ---- when handlers are stuck ----


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_a_server_answers_when_all_its_handlers_are_stuck(
    kind, transport, directory, stuck, connect
):
    with served(kind, stuck, address_of(transport, directory), workers=2) as where:
        client = connect(where[0])
        method = "hold" if kind == "sync" else "block"
        calls = [client.submit(method) for _ in range(3)]
        running = 2 if kind == "sync" else 1
        for _ in range(running):
            assert stuck.started.acquire(timeout=20)
        asked = time.monotonic()
        with shmrpc.inspect(where[0], timeout=20) as inspector:
            assert inspector.health() == "serving"
            assert inspector.describe("add")["name"] == "add"
            first = wait_until(
                lambda: (
                    (stats := inspector.stats())["slowest"][running - 1 :]
                    and stats["slowest"][0]["seconds"] > 0
                    and stats
                )
            )
            assert [call["method"] for call in first["slowest"]][:running] == [method] * running
            assert {call["peer_pid"] for call in first["slowest"]} == {os.getpid()}
            second = wait_until(
                lambda: (stats := inspector.stats())["time"] > first["time"] + 0.05 and stats
            )
            age = second["slowest"][0]["seconds"] - first["slowest"][0]["seconds"]
            assert age == pytest.approx(second["time"] - first["time"], abs=0.02)
            if kind == "sync":
                wait_until(lambda: inspector.stats()["queued"] == 1)
                assert inspector.stats()["oldest_queued_ns"] > 0
                assert inspector.stats()["queued_ns"] == 0
        assert time.monotonic() - asked < 10 * SLACK
        stuck.release.set()
        for call in calls:
            call.result(20)
        if kind == "sync":
            with shmrpc.inspect(where[0]) as inspector:
                stats = inspector.stats()
                assert stats["calls_queued"] == 1
                assert stats["queued_ns"] > 0


def test_a_short_call_has_no_age_and_a_long_one_has(directory, connect):
    """No clock is looked at when a request starts: the standby notes those that take long."""
    server = shmrpc.Server("calc")
    seen = []
    release = threading.Event()

    @server.method
    def look():
        seen.extend(server._poller.running([]))

    @server.method
    def wait():
        release.wait()

    with server, shmrpc.inspect("calc") as inspector:
        client = connect("calc")
        client.call("look")
        [call] = seen
        assert call.since is None or time.monotonic() - call.since < 60  # on a slow machine
        assert call.peer_pid == os.getpid()
        began = time.monotonic()
        future = client.submit("wait")
        stats = wait_until(
            lambda: (
                (stats := inspector.stats())["slowest"]
                and stats["slowest"][0]["seconds"] > 0
                and stats
            )
        )
        assert 0 <= stats["slowest"][0]["seconds"] <= stats["time"] - began + 0.01
        release.set()
        future.result(20)


def test_a_handler_that_waits_for_its_caller_is_seen(directory, connect):
    server = shmrpc.Server("calc", workers=1)
    release = threading.Event()

    @server.method
    def nested():
        return shmrpc.current_call().caller.call("answer")

    with server, shmrpc.inspect("calc") as inspector:
        client = connect("calc")

        @client.method
        def answer():
            release.wait()
            return 42

        future = client.submit("nested")
        stats = wait_until(
            lambda: (
                (stats := inspector.stats())["slowest"]
                and stats["slowest"][0]["seconds"] > 0
                and stats
            )
        )
        assert stats["slowest"][0]["method"] == "nested"
        release.set()
        assert future.result(20) == 42


def test_a_server_that_drains_says_so(directory, stuck, connect):
    server = shmrpc.Server("calc")
    offer(server, stuck)
    server.start()
    client = connect("calc")
    with shmrpc.inspect("calc") as inspector:
        call = client.submit("hold")
        assert stuck.started.acquire(timeout=20)
        assert inspector.health() == "serving"
        stopper = threading.Thread(target=server.stop, args=(30,))
        stopper.start()
        wait_until(lambda: inspector.health() == "draining")
        assert inspector.stats()["running"] == 1
        stuck.release.set()
        call.result(20)
        stopper.join()
        with pytest.raises(shmrpc.ConnectError):
            inspector.health()
    server.start()  # and once more
    with shmrpc.inspect("calc") as inspector:
        assert inspector.health() == "serving"
        assert inspector.stats()["uptime"] < 60
    server.stop()


# ---- timing handlers, while somebody watches ----


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_handlers_are_timed_while_somebody_watches(kind, directory, stuck, connect):
    with served(kind, stuck, "calc"):
        client = connect("calc")
        client.call("add", 1)
        with shmrpc.inspect("calc") as inspector, shmrpc.inspect("calc") as other:
            assert "p50" not in inspector.stats()["methods"]["add"]
            assert inspector.stats(watch=True)["methods"]["add"]["p50"] is None
            for n in range(10):
                assert client.call("add", n, b=1) == n + 1
            assert list(client.stream("count", 3)) == [0, 1, 2]
            with client.open("echo") as call:
                call.send("a")
                assert next(call) == "a"
                call.close_send()
                assert list(call) == []
            stats = wait_until(
                lambda: (stats := other.stats(watch=True))["methods"]["echo"]["buckets"] and stats
            )
            timed = stats["methods"]["add"]
            assert sum(count for _, count in timed["buckets"]) == 10
            assert 0 < timed["p50"] <= timed["p99"] < 60
            assert sum(count for _, count in stats["methods"]["count"]["buckets"]) == 1
            assert "p50" not in stats["methods"]["shmrpc.stats"]
            inspector.close()
            assert "p50" in other.stats()["methods"]["add"]  # the other still watches
        with shmrpc.inspect("calc") as inspector:
            wait_until(lambda: "p50" not in inspector.stats()["methods"]["add"])
        assert client.call("add", 1) == 3


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_errors_are_the_same_while_somebody_watches(kind, directory, connect):
    class Failing(Stuck):
        def add(self, a):
            raise LookupError("nothing here")

    handlers = Failing()
    with served(kind, handlers, "calc"), shmrpc.inspect("calc") as inspector:
        client = connect("calc")

        def errors():
            found = []
            for args in ([], [1], [1, 2, 3]):
                with pytest.raises(shmrpc.RemoteError) as caught:
                    client.call("add", *args)
                found.append((caught.value.code, caught.value.type, caught.value.message))
                if kind == "sync":  # aio's goes through the event loop's own frames
                    found.append(caught.value.remote_traceback)
            return found

        before = errors()
        assert before[0][0] == "INVALID_ARGUMENT"
        inspector.stats(watch=True)
        assert errors() == before
        handlers.release.set()


def test_methods_may_be_added_while_somebody_watches(directory, connect):
    server = shmrpc.Server("calc")
    with server, shmrpc.inspect("calc") as inspector:
        inspector.stats(watch=True)

        @server.method
        def late():
            return "late"

        assert connect("calc").call("late") == "late"
        assert inspector.stats()["methods"]["late"]["buckets"]
        assert inspector.describe("late")["signature"] == "()"


def test_histograms_know_a_value_to_an_eighth():
    print(f"SHMRPC_SEED={SEED}")
    rng = random.Random(SEED)
    for _ in range(50):
        values = [int(2 ** rng.uniform(0, 45)) for _ in range(rng.randint(1, 200))]
        histogram = Histogram()
        for value in values:
            histogram.add(value)
        values.sort()
        for fraction in (0.01, 0.5, 0.9, 0.99, 1.0):
            exact = values[max(0, -(-int(fraction * 1000) * len(values) // 1000) - 1)] / 1e9
            assert percentile(histogram.buckets(), fraction) == pytest.approx(exact, rel=0.13)
    assert percentile([], 0.5) is None


def test_histograms_count_all_threads():
    histogram = Histogram()

    def add(number):
        for value in range(2000):
            histogram.add(value)

    in_threads(4, add)
    assert sum(count for _, count in histogram.buckets()) == 8000


# ---- those who ask ----


def test_nobody_to_ask(directory):
    with shmrpc.inspect("calc") as inspector, pytest.raises(shmrpc.ConnectError, match="calc"):
        inspector.health()
    with pytest.raises(shmrpc.ConnectError, match="no name"):
        shmrpc.inspect("no name")
    with pytest.raises(ValueError, match="timeout"):
        shmrpc.inspect("calc", timeout=-1)


def test_a_server_that_does_not_answer(service):
    stopped = service("shm")
    stopped.pause()
    with shmrpc.inspect(stopped.address, timeout=0.2) as inspector:
        with pytest.raises(shmrpc.ConnectError, match=r"did not answer within 0\.2 s"):
            inspector.stats()
        stopped.resume()
        wait_until(lambda: _answers(inspector))


def _answers(inspector):
    with contextlib.suppress(shmrpc.ConnectError):
        return inspector.health() == "serving"
    return False


def test_an_inspector_finds_the_next_server(service):
    first = service("shm")
    with shmrpc.inspect(first.address) as inspector:
        assert inspector.stats()["pid"] == first.pid
        first.kill()
        with pytest.raises(shmrpc.ConnectError):
            inspector.stats()
        second = service(first.address)
        assert inspector.stats()["pid"] == second.pid


def test_a_worker_that_there_is_not(common):
    with (
        shmrpc.inspect(common.addresses[0], worker=1) as inspector,
        pytest.raises(shmrpc.ConnectError, match="no process 1 serves"),
    ):
        inspector.health()


def test_an_inspector_of_many_threads(common):
    with shmrpc.inspect(common.addresses[0]) as inspector:
        results = in_threads(8, lambda _: [inspector.health() for _ in range(20)])
    assert results == [["serving"] * 20] * 8


def test_those_who_are_too_many_are_refused(service):
    server = service("shm")
    server.fds()
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(shmrpc.inspect(server.address)).health()
        with pytest.raises(shmrpc.ConnectError, match="64 others"):
            stack.enter_context(shmrpc.inspect(server.address)).health()
        with shmrpc.connect(server.address) as client:  # calls are not their business
            assert client.call("add", 1, 2) == 3
    with shmrpc.inspect(server.address) as inspector:
        wait_until(lambda: _answers(inspector))


# ---- hostile ones ----


def message(kind, size, version=1, magic=b"shmrpc\r\n", worker=0):
    return HEADER.pack(magic, version, kind, 0, worker, 0, 0, size)


class Raw:
    """A socket that says anything."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(address.removeprefix("shm://"))

    def answer(self):
        header = self._read(HEADER.size)
        _, _, kind, *_, size = HEADER.unpack(header)
        return kind, self._read(size)

    def _read(self, size):
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "hung up"
            data += part
        return data

    def ended(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def raw(common):
    before = common.fds()
    sockets = []

    def connected():
        sockets.append(Raw(common.addresses[0]))
        return sockets[-1]

    yield connected
    for each in sockets:
        each.socket.close()
    with shmrpc.connect(common.addresses[0]) as client:
        assert client.call("add", 1, 2, timeout=20) == 3
    wait_until(lambda: common.fds() <= before)


@pytest.mark.parametrize(
    "request_bytes,said",
    [
        (b"", "1 to 65536 bytes"),
        (b"x" * 65537, "1 to 65536 bytes"),
        (b"\xc1", "msgpack"),
        (b"\x01", "msgpack"),
        (msgpack.packb([]), "msgpack"),
        (msgpack.packb(["add", 1, 2]), "can't be asked"),
        (msgpack.packb([["shmrpc.stats"]]), "can't be asked"),
        (msgpack.packb(["shmrpc.stats", 1.5]), "can't be asked"),
        (msgpack.packb(["shmrpc.stats", True, True]), "can't be asked"),
        (msgpack.packb(["shmrpc.health", None]), "can't be asked"),
        (msgpack.packb(["shmrpc.describe", 7]), "can't be asked"),
        (msgpack.packb(["shmrpc.describe", "a", "b"]), "can't be asked"),
        (msgpack.packb({"shmrpc.stats": 1}), "msgpack"),
    ],
)
def test_wrong_requests(raw, request_bytes, said):
    asker = raw()
    asker.socket.sendall(message(INSPECT, len(request_bytes)) + request_bytes)
    kind, text = asker.answer()
    assert kind == REFUSE
    assert said in text.decode()
    assert asker.ended()


@pytest.mark.parametrize(
    "second",
    [
        b"x" * 64,
        message(INSPECT, 5, magic=b"whatever"),
        message(INSPECT, 5, version=9),
        message(1, 5),
        message(77, 5),
        message(INSPECT, 0xFFFF_FFFF),
        message(INSPECT, 0),
    ],
)
def test_wrong_messages_after_a_right_one(raw, second):
    asker = raw()
    ask = msgpack.packb(["shmrpc.health"])
    asker.socket.sendall(message(INSPECT, len(ask)) + ask)
    assert asker.answer() == (REPORT, msgpack.packb({"status": "serving"}))
    asker.socket.sendall(second)
    assert asker.answer()[0] == REFUSE
    assert asker.ended()


def test_requests_in_pieces_and_without_an_end(raw):
    ask = msgpack.packb(["shmrpc.health"])
    whole = message(INSPECT, len(ask)) + ask
    slow = raw()
    for byte in whole:
        slow.socket.sendall(bytes([byte]))
    assert slow.answer()[0] == REPORT
    slow.socket.sendall(whole * 3)  # one after the other
    assert [slow.answer()[0] for _ in range(3)] == [REPORT] * 3
    for cut in (1, 63, 64, len(whole) - 1):
        gone = raw()
        gone.socket.sendall(whole[:cut])
        gone.socket.close()


def test_descriptors_that_nobody_asked_for(raw):
    ask = msgpack.packb(["shmrpc.health"])
    asker = raw()
    with open("/dev/null") as null:
        socket.send_fds(asker.socket, [message(INSPECT, len(ask))], [null.fileno()] * 2)
        socket.send_fds(asker.socket, [ask], [null.fileno()] * 2)
        assert asker.answer()[0] == REPORT


def test_one_who_does_not_read_the_answers(raw, common):
    ask = msgpack.packb(["shmrpc.describe"])
    asker = raw()
    asker.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            asker.socket.send(message(INSPECT, len(ask)) + ask)
    with shmrpc.inspect(common.addresses[0]) as inspector:  # others are not held up
        assert inspector.health() == "serving"


class Impostor:
    """A server that answers anything."""

    def __init__(self, path, answer):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        sock, _ = self._listener.accept()
        with sock:
            sock.recv(4096)
            sock.sendall(self._answer)

    def close(self):
        self._thread.join(20)
        self._listener.close()


@pytest.mark.parametrize(
    "answer,error,text",
    [
        (b"", shmrpc.ConnectError, "closed the connection"),
        (b"x" * 64, shmrpc.ConnectError, "does not speak shmrpc"),
        (message(2, 0), shmrpc.ConnectError, "not unknown"),
        (message(REPORT, 5), shmrpc.ConnectError, "closed the connection"),
        (message(REPORT, 1) + b"\xc1", shmrpc.ProtocolError, "report"),
        (message(REPORT, 1) + b"\x05", shmrpc.ProtocolError, "stats"),
        (message(REPORT, 0xFFFF_FFFF), shmrpc.ProtocolError, "4294967295"),
        (message(REFUSE, 3) + b"no!", shmrpc.ConnectError, "no!"),
    ],
)
def test_servers_that_answer_anything(directory, answer, error, text):
    impostor = Impostor(f"{directory}/calc.sock", answer)
    with shmrpc.inspect("calc") as inspector, pytest.raises(error, match=text):
        inspector.stats()
    impostor.close()


def test_another_users_server_is_not_asked(directory, monkeypatch):
    with shmrpc.Server("calc"), shmrpc.inspect("calc") as inspector:
        monkeypatch.setattr(inspector, "_allowed", frozenset())
        with pytest.raises(shmrpc.ConnectError, match="allow_uids"):
            inspector.health()
