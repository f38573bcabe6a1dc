"""Streams that go well, what they carry, and what using them wrongly says."""

import math
import threading

import pytest
from conftest import TRANSPORTS, in_threads, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_calls import BOUNDARIES, SCALARS, VALUES

import shmrpc

SAME_FIXTURE = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def tag(request):
    """What the server notes this test's handlers under."""
    return request.node.name


@pytest.fixture(autouse=True)
def connection_lives(client):
    """Whatever a test did, the same connection still works afterwards."""
    yield
    assert client.call("add", 40, 2) == 42
    assert list(client.stream("count", 2)) == [0, 1]
    assert client.stats()["reconnects"] == 0


def send_all(call, items):
    for item in items:
        call.send(item)
    call.close_send()


# ---- each kind ----


@pytest.mark.parametrize("count", [0, 1, 2, 511, 512, 513, 3000])
def test_server_streaming(client, count):
    assert list(client.stream("count", count)) == list(range(count))
    assert list(client.stream("count", count, start=7)) == list(range(7, count + 7))
    with client.open("count", count) as call:
        assert list(call) == list(range(count))
        assert call.result() is None


@pytest.mark.parametrize("count", [0, 1, 2, 511, 512, 513, 3000])
def test_client_streaming(client, count):
    with client.open("collect") as call:
        for number in range(count):
            call.send(number)
        assert call.result() == list(range(count))
        assert call.result() == list(range(count))
    with client.open("total", start=5) as call:
        send_all(call, range(count))
        assert call.result() == sum(range(count)) + 5


def test_ping_pong(client, tag):
    with client.open("parrot", tag) as call:
        for number in range(500):
            call.send(number)
            assert next(call) == number
        call.close_send()
        assert list(call) == []
        assert call.result() is None
    assert client.call("trace", tag) == {"items": 500, "end": "returned"}


def test_half_close_then_read_on(client, tag):
    with client.open("parrot", tag) as call:
        send_all(call, range(300))
        call.close_send()
        assert list(call) == list(range(300))


def test_neither_sends_anything(client, tag):
    with client.open("parrot", tag) as call:
        call.close_send()
        assert list(call) == []
    assert list(client.stream("parrot", f"{tag} stream")) == []
    with client.open("collect") as call:
        assert call.result() == []


def test_unary_methods_can_be_opened(client):
    with client.open("add", 1, b=2) as call:
        assert call.result() == 3
    with client.open("nothing") as call:
        assert call.result() is None


@pytest.mark.parametrize("direction", ["to client", "to server", "both"])
def test_100_000_items(client, tag, direction):
    count = 100_000
    if direction == "to client":
        assert sum(1 for _ in client.stream("count", count)) == count
    elif direction == "to server":
        with client.open("total") as call:
            send_all(call, range(count))
            assert call.result() == sum(range(count))
    else:
        with client.open("parrot", tag) as call:
            sender = threading.Thread(target=send_all, args=(call, range(count)), daemon=True)
            sender.start()
            assert all(got == number for number, got in enumerate(call))
            sender.join(20)
        assert client.call("trace", tag)["items"] == count


# ---- what goes through ----


def test_all_types(client, tag):
    values = [
        *SCALARS,
        [1, [2.5, {"b": None}]],
        {"bytes": b"\0\1", 7: {True: {}}},
        list(range(999)),
    ]
    assert list(client.stream("values", values)) == values
    with client.open("collect") as call:
        send_all(call, values)
        assert call.result() == values
    with client.open("parrot", tag) as call:
        send_all(call, values)
        for value in values:
            echoed = next(call)
            assert echoed == value
            assert type(echoed) is type(value)


@SAME_FIXTURE
@given(values=st.lists(VALUES, max_size=8))
def test_any_items_come_back(client, values):
    assert list(client.stream("values", values)) == values
    with client.open("collect") as call:
        send_all(call, values)
        assert call.result() == values


# Around a frame, the ring and the window of a stream (with what msgpack and the frame add), and
# beyond all of them.
AROUND = [size + more for size in [*BOUNDARIES[1:], 256 << 10] for more in (-40, -6, -5, -4, 0, 1)]
STREAM_SIZES = [0, 1, *AROUND, 3_000_000]


def test_all_sizes_to_the_client(client):
    sizes = [*STREAM_SIZES, *reversed(STREAM_SIZES), *[50_000] * 20]
    got = list(client.stream("sized", sizes))
    assert [len(item) for item in got] == sizes
    assert not any(map(any, got))


def test_all_sizes_to_the_server(client, tag):
    sizes = [*STREAM_SIZES, *reversed(STREAM_SIZES), *[50_000] * 20]
    with client.open("lengths") as call:
        send_all(call, map(bytes, sizes))
        assert call.result() == sizes
    with client.open("parrot", tag) as call:
        for number, size in enumerate(STREAM_SIZES):
            item = bytes([number + 1]) * size
            call.send(item)
            assert next(call) == item


def test_what_is_sent_has_left(client, common, transport, connect, tag):
    """Also if the sending thread never touches the connection again."""
    other = connect(common.addresses[TRANSPORTS.index(transport)])

    def received():
        return (other.call("trace", tag) or {"items": 0})["items"]  # it may not have begun

    call = client.open("first", 10, tag)
    for number in range(1, 4):
        call.send(bytes(300_000))
        wait_until(lambda number=number: received() == number)
    call.close()


# ---- many at once ----


def test_many_streams_from_many_threads(client, tag):
    def work(number):
        for turn in range(4):
            assert list(client.stream("count", 800, number)) == list(range(number, number + 800))
            with client.open("total") as call:
                send_all(call, range(800))
                assert call.result() == sum(range(800))
            with client.open("parrot", f"{tag} {number} {turn}") as call:
                for item in range(100):
                    call.send([number, item])
                    assert next(call) == [number, item]
            assert client.call("add", number, turn) == number + turn
            assert client.submit("add", number, turn).result(20) == number + turn

    in_threads(8, work, timeout=40)


def test_many_streams_in_one_thread(client, tag):
    """Open at the same time, more than the server has workers."""
    calls = [client.open("parrot", f"{tag} {number}") for number in range(60)]
    for turn in range(3):
        for number, call in enumerate(calls):
            call.send(number * turn)
    for turn in range(3):
        assert [next(call) for call in reversed(calls)] == [n * turn for n in reversed(range(60))]
    streams = [client.stream("count", 2000, number) for number in range(60)]
    for turn, items in enumerate(zip(*streams, strict=True)):
        assert items == tuple(range(turn, turn + 60))
    for call in calls:
        call.close_send()
        assert list(call) == []


def test_one_thread_sends_while_another_receives(client, tag):
    with client.open("parrot", tag) as call:
        sender = threading.Thread(target=send_all, args=(call, range(20_000)), daemon=True)
        sender.start()
        assert list(call) == list(range(20_000))
        sender.join(20)


# ---- streams and streams ----


def test_a_handler_streams_from_another_server(client, common, tag):
    def relayed(*path):
        return list(client.stream("relay", tag, *path))

    for address in common.addresses:
        assert relayed(address, "count", 2000) == list(range(2000))
        assert relayed(address, "relay", f"{tag} 2", address, "count", 700) == list(range(700))
    assert client.call("trace", tag)["end"] == "returned"


def test_a_handler_and_streams_of_its_caller(common, transport, connect, tag):
    client = connect(common.addresses[TRANSPORTS.index(transport)])

    @client.method
    def squares(n):
        for number in range(n):
            yield number * number

    @client.method(requests=True)
    def total(requests):
        return sum(requests)

    @client.method(requests=True)
    def parrot(requests):
        for item in requests:
            yield f"{item}, said the client"

    expected = [number * number for number in range(2000)]
    assert list(client.stream("ask_back", tag, "squares", 2000)) == expected
    assert client.call("sum_by_caller", list(range(2000))) == sum(range(2000))
    with client.open("converse") as call:
        for number in range(100):
            call.send(number)
            assert next(call) == f"{number}, said the client"
        call.close_send()
        assert list(call) == []

    def work(number):
        tagged = f"{tag} {number}"
        assert list(client.stream("ask_back", tagged, "squares", 2000)) == expected
        assert client.call("sum_by_caller", list(range(2000))) == sum(range(2000))

    in_threads(6, work, timeout=40)


def test_a_server_that_streams_to_itself(client, tag):
    """A method of the server, asked for by its own handler through the client in between."""
    client.method(name="there_and_back")(lambda n: client.stream("count", n))
    assert list(client.stream("ask_back", tag, "there_and_back", 1500)) == list(range(1500))


# ---- what may stream ----


@pytest.mark.parametrize(
    "method, args, expected",
    [
        ("squares.upto", [3], [0, 1, 4]),
        ("squares.static", [3], [0, 1, 2]),
        ("squares.named", [2], ["Squares", "Squares"]),
        ("squares", [3], [0, 1, 4]),
        ("four", [], [0, 1, 4, 9]),
        ("generated", [3], ["0", "1", "2"]),
        ("countdown", [3], [2, 1, 0]),
        ("countdown", [0], []),
    ],
    ids=["method", "static", "class", "callable", "partial", "expression", "iterator", "none"],
)
def test_whatever_makes_an_iterator(client, method, args, expected):
    assert list(client.stream(method, *args)) == expected
    with client.open(method, *args) as call:
        assert list(call) == expected


# ---- used wrongly ----


@pytest.mark.parametrize(
    "method, args, how",
    [("count", [3], "stream() or open()"), ("parrot", ["x"], "open()"), ("total", [], "open()")],
)
def test_call_of_what_streams(client, method, args, how):
    for ask in (client.call, lambda *args: client.submit(*args).result(20)):
        with pytest.raises(shmrpc.RemoteError) as caught:
            ask(method, *args)
        assert (caught.value.type, caught.value.code) == ("TypeError", "INVALID_ARGUMENT")
        assert f"{method!r} takes or returns a stream" in caught.value.message
        assert how in caught.value.message
    client.notify(method, *args)  # nobody is told, nothing runs
    assert client.call("trace", "x") is None


def test_stream_of_what_returns_one_result(client):
    for method, args in (("add", [1, 2]), ("squares.one", [3]), ("collect", [])):
        stream = client.stream(method, *args)
        with pytest.raises(shmrpc.Error, match="returns one result and streams nothing"):
            list(stream)
    assert client.stream("add", 1, 2).result() == 3


def test_call_of_what_returns_an_iterator(client):
    with pytest.raises(shmrpc.RemoteError, match="returned what can't be sent") as caught:
        client.call("countdown", 3)
    assert caught.value.code == "INTERNAL"


def test_unknown_methods_and_wrong_arguments(client):
    with pytest.raises(shmrpc.MethodNotFound, match="'no_such_method'"):
        list(client.stream("no_such_method"))
    with client.open("no_such_method") as call, pytest.raises(shmrpc.MethodNotFound):
        call.result()
    for stream in (client.stream("count"), client.stream("count", 1, x=2), client.open("parrot")):
        with pytest.raises(shmrpc.RemoteError) as caught:
            list(stream)
        assert (caught.value.type, caught.value.code) == ("TypeError", "INVALID_ARGUMENT")
        assert caught.value.remote_traceback == ""
    with pytest.raises(TypeError, match="argument 1 of 'count' can't be sent"):
        client.stream("count", object())
    with pytest.raises(TypeError, match="metadata"):
        client.open("total", metadata={"a": 1})
    with pytest.raises(ValueError, match="timeout"):
        client.stream("count", 1, timeout=-1)
    with pytest.raises(ValueError, match="method name"):
        client.stream("")


def test_sending_when_it_is_too_late(client, tag):
    with client.open("total") as call:
        send_all(call, [1, 2])
        with pytest.raises(shmrpc.Error, match=r"was told by close_send\(\) that nothing more"):
            call.send(3)
        assert call.result() == 3
        with pytest.raises(shmrpc.Error, match="close_send"):
            call.send(3)
    stream = client.stream("parrot", tag)
    with pytest.raises(shmrpc.Error, match=r"stream\(\) sends no messages to 'parrot'; use open"):
        stream.send(1)
    assert list(stream) == []
    call.close()
    with pytest.raises(shmrpc.Error, match="close_send"):
        call.send(3)
    closed = client.open("total")
    closed.close()
    with pytest.raises(shmrpc.Error, match="'total' was closed"):
        closed.send(1)


def test_sending_what_cant_be_sent(client):
    with client.open("collect") as call:
        call.send(1)
        with pytest.raises(TypeError, match=r"a message for 'collect' can't be sent.*of type set"):
            call.send({1})
        cycle = []
        cycle.append(cycle)
        with pytest.raises(ValueError, match="can't be sent"):
            call.send(cycle)
        with pytest.raises(ValueError, match="can't be sent"):
            call.send([1, 2, "\udc80"])
        call.send([math.pi])
        assert call.result() == [1, [math.pi]]


def test_sending_what_is_too_large(transport, service, connect):
    other = connect(service(transport, max_message_bytes=100_000).address)
    with other.open("lengths") as call:
        for _ in range(3):
            call.send(bytes(90_000))
            with pytest.raises(shmrpc.MessageTooLarge, match=r"'lengths' is longer than .*100000"):
                call.send(bytes(100_000))
        assert call.result() == [90_000] * 3


def test_iterating_twice(client, tag):
    stream = client.stream("count", 3)
    assert list(stream) == [0, 1, 2]
    assert next(stream, "over") == "over"
    with pytest.raises(shmrpc.Error, match="'count' were iterated to their end already"):
        list(stream)
    with client.open("twice") as call, pytest.raises(shmrpc.RemoteError) as caught:
        call.result()
    assert "iterated to their end already" in caught.value.message
    partly = client.stream("count", 4)
    for first in partly:
        assert first == 0
        break
    assert list(partly) == [1, 2, 3]


# ---- result() and its relations ----


def test_result_of_what_streams(client, tag):
    """It says so, and takes nothing away."""
    call = client.open("count", 3)
    wait_until(call.done)
    with pytest.raises(shmrpc.Error, match="'count' streams its results: iterate"):
        call.result()
    assert list(call) == [0, 1, 2]
    assert call.result() is None
    call = client.open("parrot", tag)
    call.send("first")
    with pytest.raises(shmrpc.Error, match="'parrot' streams its results: iterate"):
        call.result()
    assert list(call) == ["first"]


def test_result_with_a_timeout_of_its_own(client, tag):
    with client.open("reluctant", tag) as call:
        call.send("one")
        for _ in range(3):
            with pytest.raises(TimeoutError, match="'reluctant' has no result yet") as caught:
                call.result(timeout=0.02)
            assert not isinstance(caught.value, shmrpc.Error)
        assert not call.done()
        client.call("go", tag)
        assert call.result(timeout=20) == 1
        assert call.done()
        assert call.result(timeout=0) == 1


def test_result_does_not_wait_for_a_sender(client, tag):
    """For longer than it may, that is."""
    call = client.open("reluctant", tag)
    begun = []

    def send():
        with pytest.raises(shmrpc.Cancelled):
            for number in range(10_000):
                begun.append(number)
                call.send("x" * 100_000)  # large bytes would travel beside, and count for less

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    # Three are more than the window: the fourth waits, holding the lock.
    wait_until(lambda: len(begun) == 4 and call._send_lock.locked())
    with pytest.raises(TimeoutError, match="no result yet"):
        call.result(timeout=0.05)
    call.cancel()
    sender.join(10)
    assert not sender.is_alive()


def test_result_after_the_end_of_a_call(client, tag):
    with client.open("total") as call:
        call.send(5)
        call.close_send()
        wait_until(call.done)
    assert call.result() == 5  # it was over when it was closed
    closed = client.open("reluctant", tag)
    closed.close()
    with pytest.raises(shmrpc.Cancelled, match="'reluctant' was closed before its result came"):
        closed.result()
    cancelled = client.open("reluctant", tag)
    assert cancelled.cancel()
    with pytest.raises(shmrpc.Cancelled, match="'reluctant' was cancelled"):
        cancelled.result()


# ---- metadata ----


def test_initial_metadata_comes_before_all_else(client, tag):
    call = client.open("described", [1, 2], {"last": b"trailing"}, metadata={"asked": "so"})
    assert call.initial_metadata == {"first": "initial", "asked": "so"}
    assert list(call) == [1, 2]
    assert call.trailing_metadata == {"last": b"trailing"}
    assert call.initial_metadata == {"first": "initial", "asked": "so"}


def test_trailing_metadata_comes_at_the_end(client, tag):
    call = client.stream("stepwise", tag, 2)
    assert next(call) == 0
    with pytest.raises(shmrpc.Error, match="comes at the end of the call"):
        _ = call.trailing_metadata
    client.call("go", tag)
    assert list(call) == [1]
    assert call.trailing_metadata == {}
    assert call.initial_metadata == {}
    cancelled = client.stream("count", 3)
    cancelled.close()
    assert cancelled.trailing_metadata == {}


def test_metadata_and_errors(client):
    call = client.stream("described", [1], {"last": "trailing"}, "the reason")
    with pytest.raises(shmrpc.RemoteError, match="the reason"):
        list(call)
    assert call.initial_metadata == {"first": "initial"}
    assert call.trailing_metadata == {"last": "trailing"}
    failed = client.stream("no_such_method")
    assert failed.initial_metadata == {}
    assert failed.trailing_metadata == {}


# ---- the state of a call ----


def test_done_and_repr(client, tag):
    call = client.open("stepwise", tag, 1)
    assert not call.done()
    assert repr(call).startswith("<shmrpc.Call of 'stepwise' on ")
    assert repr(call).endswith(" open>")
    client.call("go", tag)
    wait_until(call.done)
    assert repr(call).endswith(" over>")
    assert list(call) == [0]
    assert call.done()
