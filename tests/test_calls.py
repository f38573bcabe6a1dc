"""What calls carry and where they arrive: call, notify, proxy, services, several addresses."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import pytest
from conftest import TRANSPORTS, address_of, in_threads, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from services import Basket, JsonCodec

import shmrpc

SAME_FIXTURE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SCALARS = [
    None,
    True,
    False,
    0,
    -1,
    127,
    128,
    -(1 << 63),
    (1 << 63) - 1,
    (1 << 64) - 1,
    0.0,
    -1.5,
    float("inf"),
    5e-324,
    "",
    "text",
    "Grüße, 世界 🦀",
    "\0",
    b"",
    b"\0",
    b"\xff" * 300,
]


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: repr(value)[:20])
def test_scalars_come_back(client, value):
    result = client.call("echo", value)
    assert result == value
    assert type(result) is type(value)


def test_containers_come_back(client):
    nested = {"a": [1, [2.5, {"b": None}]], "": [], "bytes": b"\0\1", 7: {True: {}}}
    assert client.call("echo", nested) == nested
    assert client.call("echo", list(range(20000))) == list(range(20000))
    assert client.call("echo", (1, (2,))) == [1, [2]]
    assert client.call("echo", bytearray(b"ab")) == b"ab"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)


@SAME_FIXTURE
@given(value=VALUES)
def test_any_value_comes_back(client, value):
    assert client.call("echo", value) == value


# Around a frame, the ring and twice the ring; msgpack and the frame add a few bytes.
BOUNDARIES = [1, 4096, 8192, 16384, 32768, 65536, 131072]
SIZES = st.sampled_from(BOUNDARIES).flatmap(lambda size: st.integers(size - 80, size + 80))


@SAME_FIXTURE
@given(request=SIZES, reply=SIZES)
def test_sizes_around_boundaries(client, request, reply):
    request, reply = max(request, 0), max(reply, 0)
    data = os.urandom(64) * (request // 64 + 1)
    assert client.call("size", data[:request]) == request
    assert client.call("echo", data[:request]) == data[:request]
    assert client.call("zeros", reply) == bytes(reply)


@pytest.mark.parametrize("size", [1 << 20, (5 << 20) + 3])
def test_megabytes(client, size):
    data = os.urandom(size)
    assert client.call("echo", data) == data
    assert client.submit("echo", data).result(20) == data
    client.notify("echo", data)
    assert client.call("add", 1, 2) == 3


def test_megabytes_both_ways_at_once(client):
    """One thread sends while large replies arrive: nobody may wait for the other for ever."""
    data = os.urandom(2 << 20)
    futures = [client.submit("echo", data) for _ in range(8)]
    assert client.call("echo", data) == data
    assert all(future.result(30) == data for future in futures)


def test_megabytes_from_many_threads(client):
    def work(number):
        data = bytes([number]) * ((1 << 20) + number)
        return all(client.call("echo", data) == data for _ in range(4))

    assert all(in_threads(6, work))


def test_arguments(client):
    assert client.call("add", 1, 2) == 3
    assert client.call("add", 1) == 2
    assert client.call("add", a=1, b=5) == 6
    assert client.call("add", 1, b=5) == 6
    assert client.call("nothing") is None
    assert client.call("keywords", 1, "x", key=None, method="m") == [
        [1, "x"],
        {"key": None, "method": "m"},
    ]
    assert client.call("keywords", self=1) == [[], {"self": 1}]


def test_renamed_and_prefixed_methods(client):
    assert client.call("math.add", 1, 2) == 3
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("renamed", 1, 2)
    before = len(client.call("basket.items"))
    assert client.call("basket.put", "apple", count=2) == before + 2
    assert client.call("basket.items")[before:] == ["apple", "apple"]
    assert client.call("basket.version") == "1.0"
    for name in ("basket._private", "basket.size", "basket.__init__", "put"):
        with pytest.raises(shmrpc.MethodNotFound):
            client.call(name)


def test_a_service_without_public_methods_is_refused():
    with pytest.raises(ValueError, match="no public methods"):
        shmrpc.Server("calc").add_service(object())


class Calculator(Protocol):
    def add(self, a: int, b: int = 1) -> int: ...
    def echo(self, value): ...
    def _hidden(self): ...


def test_proxy(client):
    calc = client.proxy(Calculator)
    assert calc.add(1, 2) == 3
    assert calc.add(a=1) == 2
    assert calc.echo(value="x") == "x"
    for name in ("subtract", "_hidden", "sleep"):
        with pytest.raises(AttributeError, match=name):
            getattr(calc, name)
    assert {"add", "echo"} <= set(dir(calc))
    assert "Calculator" in repr(calc)


def test_proxy_of_a_class_with_prefix(client):
    basket = client.proxy(Basket, prefix="basket.")
    assert basket.version() == "1.0"
    assert basket.put("pear", count=3) >= 3
    with pytest.raises(AttributeError):
        basket.size  # noqa: B018
    untyped = client.proxy(prefix="basket.")
    assert untyped.version() == "1.0"
    with pytest.raises(shmrpc.MethodNotFound, match=r"basket\.nothing"):
        untyped.nothing()
    with pytest.raises(TypeError, match="class or Protocol"):
        client.proxy(Basket())


def test_notifications_arrive_in_order(transport, service, connect):
    client = connect(service(transport, workers=1).address)
    for number in range(500):
        client.notify("remember", number)
    assert client.call("remembered") == list(range(500))


def test_notify_carries_keywords(client, directory):
    path = os.path.join(directory, "noted")
    client.notify("note", path, text="by keyword")
    wait_until(lambda: os.path.exists(path) and Path(path).read_text() == "by keyword\n")


def test_notify_then_close_is_delivered(transport, service, connect):
    running = service(transport, workers=1)
    for number in range(20):
        with shmrpc.connect(running.address) as client:
            client.notify("remember", number)
            client.notify("remember", "x" * (number * 5000))
    observer = connect(running.address)
    expected = [item for number in range(20) for item in (number, "x" * (number * 5000))]
    wait_until(lambda: len(observer.call("remembered")) == len(expected))
    assert sorted(map(str, observer.call("remembered"))) == sorted(map(str, expected))


def test_failing_notification_disturbs_nothing(client):
    client.notify("raise_error", "ValueError", "nobody hears this")
    client.notify("add", "wrong", "arguments", "here")
    client.notify("no_such_method")
    assert client.call("add", 1, 2) == 3


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_notify_waits_for_room_with_a_timeout(transport, service, connect, memory):
    """A server that does not keep up: notify waits, and gives up after its timeout."""
    running = service(transport)
    client = connect(running.address, max_memory_bytes=memory)
    running.pause()
    data = b"x" * 300_000
    with pytest.raises(shmrpc.DeadlineExceeded):
        for _ in range(200):  # sockets have buffers
            client.notify("size", data, timeout=0.1)
    running.resume()
    client.notify("size", data, timeout=20)
    assert client.call("add", 1, 2, timeout=20) == 3


def test_ping(client):
    assert 0 < client.ping() < 5
    assert 0 < client.ping(timeout=5) < 5


def test_server_at_several_addresses(service, connect):
    running = service(*TRANSPORTS, "second-name")
    assert len(running.addresses) == 4
    clients = [connect(address) for address in running.addresses]
    assert {client.call("pid") for client in clients} == {running.pid}
    assert running.addresses[3] == "shm://second-name"


def test_fallback(service, connect, directory, transport):
    running = service(transport)
    client = connect("shm://nobody-here", fallback=running.address)
    assert client.call("pid") == running.pid
    other = connect(running.address, fallback="shm://nobody-here")
    assert other.call("pid") == running.pid
    with pytest.raises(shmrpc.ConnectError) as caught:
        shmrpc.connect("shm://nobody-here", fallback="tcp://127.0.0.1:1", timeout=2)
    assert "nobody-here" in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


def test_codec_is_replaceable(transport, service, connect):
    running = service(transport, codec="json")
    client = connect(running.address, codec=JsonCodec())
    value = {"big": 1 << 100, "list": [1, None]}
    assert client.call("echo", value) == value  # msgpack can't carry the integer
    assert client.submit("keywords", 1, a=2).result(5) == [[1], {"a": 2}]
    with pytest.raises(TypeError, match="argument 1"):
        client.call("echo", b"json has no bytes")
    with pytest.raises(shmrpc.RemoteError):
        client.call("zeros", 3)  # nor has the result
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call("abort", "NOT_FOUND", "errors are msgpack always", [1])
    assert caught.value.details == [1]
    assert client.call("add", 1, 2) == 3


def test_different_codecs_are_an_error_not_a_crash(transport, service, connect):
    running = service(transport)
    wrong = connect(running.address, codec=JsonCodec())
    for _ in range(20):
        with pytest.raises((shmrpc.Error, ValueError)):
            wrong.call("add", 1, 2)
    assert connect(running.address).call("add", 1, 2) == 3


def test_current_call(client, transport):
    found = client.call("context", timeout=9)
    assert found["method"] == "context"
    assert found["cancelled"] is False
    assert 0 < found["remaining"] <= 9
    assert abs(found["deadline"] - (time.monotonic() + 9)) < 5
    if transport == "tcp":
        assert found["peer"] == [os.getpid(), -1, -1]
    else:
        assert found["peer"] == [os.getpid(), os.getuid(), os.getgid()]
    found = client.call("context", tag="keywords")
    assert (found["tag"], found["deadline"], found["remaining"]) == ("keywords", None, None)
    assert client.submit("context", timeout=7).result()["remaining"] <= 7


def test_metadata(client):
    sent = {"trace": "00-ab", "raw": b"\x00\xff", "long": "x" * 4000}
    for found in (
        client.call("metadata", metadata=sent),
        client.call("metadata", tag="keywords", metadata=sent),
        client.submit("metadata", metadata=sent).result(),
    ):
        assert found == sent
    assert client.call("metadata") == {}
    assert client.call("metadata", metadata={}) == {}
    client.notify("remember_metadata", metadata=sent)
    wait_until(lambda: sent in client.call("metadata_remembered"))


@pytest.mark.parametrize(
    "metadata, kind, words",
    [
        ({1: "x"}, TypeError, "not 1 to str"),
        ({"a": 1}, TypeError, "'a' to int"),
        (["a"], TypeError, "not list"),
        ({"a": "x" * 9000}, ValueError, "8192"),
    ],
)
def test_metadata_that_is_none(client, metadata, kind, words):
    for send in (client.call, client.submit, client.notify):
        with pytest.raises(kind, match=words):
            send("metadata", metadata=metadata)
    assert client.call("metadata") == {}


def test_current_call_belongs_to_its_handler(client):
    with pytest.raises(RuntimeError, match="in a handler"):
        shmrpc.current_call()
    assert client.call("context_elsewhere").startswith("RuntimeError")


def test_cancelled_is_seen_by_the_handler(client):
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("hold_until_cancelled", timeout=0.1)
    future = client.submit("hold_until_cancelled")
    wait_until(lambda: client.call("running") == 1)
    assert future.cancel()
    wait_until(lambda: client.call("running") == 0)


def test_stats(transport, service, connect):
    client = connect(service(transport).address)
    before = client.stats()
    for _ in range(10):
        client.call("add", 1, 2)
    after = client.stats()
    assert after["frames_received"] - before["frames_received"] == 10
    assert after["reconnects"] == 0
    stats = client.call("stats")
    assert stats["calls_started"] == 11
    assert stats["running"] == 1
    assert stats["conns"] == 1


def test_methods_added_while_it_runs(transport, service, connect):
    client = connect(service(transport).address)
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("new")
    for generation in range(3):
        client.call("add_method", "new", generation)
        assert client.call("new") == generation
    for number in range(300):
        client.call("add_method", f"many-{number}", number)
    assert [client.call(f"many-{number}") for number in range(300)] == list(range(300))


def test_method_decorator_forms():
    server = shmrpc.Server("calc")

    @server.method
    def one():
        return 1

    @server.method()
    def two():
        return 2

    @server.method(name="drei")
    def three():
        return 3

    assert (one(), two(), three()) == (1, 2, 3)
    names = [method.name for method in server.registry.methods]
    assert [name for name in names if not name.startswith("shmrpc.")] == ["one", "two", "drei"]
    assert "shmrpc.describe" in names
    with pytest.raises(TypeError, match="callable"):
        server.method(name="x")(5)
    with pytest.raises(ValueError, match="255"):
        server.method(name="x" * 256)(one)
    with pytest.raises(ValueError, match="255"):
        server.method(name="")(one)

    async def coroutine():
        pass

    with pytest.raises(TypeError, match="async"):
        server.method(coroutine)


def test_method_with_function_and_name(directory):
    """Not the documented form; but then the name must not be ignored silently."""
    with shmrpc.Server("calc") as server, shmrpc.connect("calc") as client:
        try:
            server.method(lambda: 1, name="chosen")
        except TypeError:
            return
        assert client.call("chosen") == 1


def test_method_names(client):
    assert client.call("add_method", "Grüße 🦀", 1) is None
    assert client.call("Grüße 🦀") == 1
    longest = "n" * 255
    client.call("add_method", longest, 2)
    assert client.call(longest) == 2
    with pytest.raises(ValueError, match="255"):
        client.call("n" * 256)
    with pytest.raises(ValueError, match="255"):
        client.call("")
    with pytest.raises(TypeError, match="str"):
        client.call(b"bytes")
    with pytest.raises(TypeError, match="str"):
        client.call(["unhashable"])
    assert client.call("add", 1, 2) == 3


def test_server_in_this_process(transport, directory, connect):
    """The same server object, started and stopped several times, and called from here."""
    server = shmrpc.Server(address_of(transport, directory))
    server.method(name="echo")(lambda value: value)
    assert server.addresses == []
    for generation in range(3):
        with server:
            with shmrpc.connect(server.addresses[0]) as client:
                assert client.call("echo", generation) == generation
            with pytest.raises(shmrpc.Error, match="running"):
                server.start()
            assert server.stats()["calls_started"] == 1
        assert server.addresses == []
    server.stop()


def test_a_server_that_is_collected_leaves_nothing(transport, directory):
    server = shmrpc.Server(address_of(transport, directory))
    server.start()
    client = shmrpc.connect(server.addresses[0])
    server.stop()
    del server
    with pytest.raises(shmrpc.Error):
        client.call("echo", 1, timeout=1)
    del client  # not closed: the leak check finds what it leaves


def test_a_client_that_is_only_dropped_leaves_nothing(common, transport):
    address = common.addresses[TRANSPORTS.index(transport)]
    for _ in range(5):
        assert shmrpc.connect(address).call("add", 1, 2) == 3


def test_a_closed_client_says_so(client):
    client.close()
    client.close()
    for use in (
        lambda: client.call("add", 1, 2),
        lambda: client.notify("add", 1, 2),
        lambda: client.submit("add", 1, 2),
        client.ping,
    ):
        with pytest.raises(shmrpc.Error, match="closed"):
            use()
    assert "closed" in repr(client)


def test_program_that_ends_without_closing(common, transport):
    """An exit with clients, pending futures and a running server is clean and quiet."""
    address = common.addresses[TRANSPORTS.index(transport)]
    code = (
        "import shmrpc, sys\n"
        "server = shmrpc.Server('tcp://127.0.0.1:0'); server.start()\n"
        "client = shmrpc.connect(sys.argv[1])\n"
        "print(client.call('add', 1, 2))\n"
        "future = client.submit('sleep', 2)\n"
        "future.add_done_callback(print)\n"
        "client.notify('add', 1, 2)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, address],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "3\n", "")


def test_an_encoder_that_fails_otherwise_is_not_explained(transport, service):
    """What is not about the value passes as it is, raised from nothing, and the next call works."""

    class Failing(shmrpc.codec.MsgpackCodec):
        fails = False

        def encoder(self):
            pack = super().encoder()

            def packed(value):
                if self.fails:
                    raise KeyError("elsewhere")
                return pack(value)

            return packed

    codec = Failing()
    with shmrpc.connect(service(transport).address, codec=codec) as client:
        for way in (client.call, client.submit, client.notify):
            codec.fails = True
            with pytest.raises(KeyError) as raised:
                way("add", 1, 2)
            assert raised.value.__cause__ is None
            codec.fails = False
            assert client.call("add", 1, 2) == 3


def test_arguments_that_fail_only_together_raise_no_error_from_itself(transport, service):
    class TooMany(shmrpc.codec.MsgpackCodec):
        def encoder(self):
            pack = super().encoder()

            def packed(value):
                if isinstance(value, (list, tuple)) and len(value) > 2:
                    raise ValueError("too many")
                return pack(value)

            return packed

    with shmrpc.connect(service(transport).address, codec=TooMany()) as client:
        with pytest.raises(
            ValueError, match=r"arguments of 'add' can't be sent: too many"
        ) as raised:
            client.call("add", 1, 2, 3)
        assert raised.value.__cause__ is not raised.value
        assert client.call("add", 1, 2) == 3
