"""Metadata and timeouts: what travels beside a call, and what is refused."""

import math
import threading
import time

import pytest
from conftest import SLACK, TRANSPORTS, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmrpc
from shmrpc.interceptors import CallInfo

INITIAL = {"first": "1", "raw": b"\x00\xff"}
TRAILING = {"last": "z" * 3000, "empty": ""}
SENT = {"trace": "00-ab", "raw": b"\x00\xff"}


class Recorder:
    """What an interceptor sees of each call: the only way to a unary call's metadata."""

    def __init__(self):
        self.calls = []

    def intercept(self, call: CallInfo, proceed):
        self.calls.append(call)
        return proceed(call)


@pytest.fixture
def recorded(common, transport, connect):
    recorder = Recorder()
    address = common.addresses[TRANSPORTS.index(transport)]
    yield connect(address, interceptors=[recorder]), recorder.calls
    recorder.calls.clear()  # their errors keep the connection


# ---- there and back ----


def test_unary(recorded):
    client, calls = recorded
    assert client.call("metadata_unary", INITIAL, TRAILING, metadata=SENT) == SENT
    assert calls[-1].initial_metadata == INITIAL
    assert calls[-1].trailing_metadata == TRAILING
    assert client.call("metadata_unary") == {}
    assert calls[-1].initial_metadata == calls[-1].trailing_metadata == {}
    assert client.call("metadata_unary", {}, {}) == {}


def test_unary_by_future_and_open(client):
    future = client.submit("metadata_unary", INITIAL, TRAILING, metadata=SENT)
    assert future.initial_metadata == INITIAL  # waits
    assert future.trailing_metadata == TRAILING
    assert future.result() == SENT
    with client.open("metadata_unary", INITIAL, TRAILING, metadata=SENT) as call:
        assert call.initial_metadata == INITIAL
        assert call.result() == SENT
        assert call.trailing_metadata == TRAILING


def test_with_errors(recorded):
    client, calls = recorded
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call("metadata_unary", INITIAL, TRAILING, "failed")
    assert caught.value.code == "NOT_FOUND"
    assert (calls[-1].initial_metadata, calls[-1].trailing_metadata) == (INITIAL, TRAILING)
    future = client.submit("metadata_unary", INITIAL, TRAILING, "failed")
    assert future.trailing_metadata == TRAILING
    assert future.initial_metadata == INITIAL
    assert future.exception().code == "NOT_FOUND"
    call = client.stream("metadata_stream", INITIAL, TRAILING, "failed", metadata=SENT)
    assert next(call) == SENT
    with pytest.raises(shmrpc.RemoteError):
        next(call)
    assert (call.initial_metadata, call.trailing_metadata) == (INITIAL, TRAILING)
    future = client.submit("no_such_method", metadata=SENT)
    assert future.initial_metadata == future.trailing_metadata == {}


def test_streams(client):
    with client.stream("metadata_stream", INITIAL, TRAILING, metadata=SENT) as call:
        assert call.initial_metadata == INITIAL  # before any item is taken
        assert list(call) == [SENT]
        assert call.trailing_metadata == TRAILING
    with client.stream("metadata_stream", metadata=SENT) as call:
        assert call.initial_metadata == {}  # known when the first item comes
        assert list(call) == [SENT]
        assert call.trailing_metadata == {}


def test_initial_metadata_comes_before_the_messages_that_it_is_about(client):
    """The handler waits for messages; its metadata must not wait for its first reply."""
    with client.open("metadata_requests", INITIAL, TRAILING) as call:
        assert call.initial_metadata == INITIAL
        with pytest.raises(shmrpc.Error, match="comes at the end"):
            call.trailing_metadata  # noqa: B018
        for number in range(3):
            call.send(number)
        assert call.result() == 3
        assert call.trailing_metadata == TRAILING


def test_initial_metadata_in_two_threads(client):
    """One waits for the metadata while the other sends."""
    with client.open("metadata_requests", INITIAL, TRAILING) as call:
        found = []
        thread = threading.Thread(target=lambda: found.append(call.initial_metadata))
        thread.start()
        for number in range(2000):
            call.send(number)
        thread.join(10)
        assert found == [INITIAL]
        assert call.result() == 2000


def test_metadata_of_a_client_s_methods(client):
    @client.method
    def back():
        call = shmrpc.current_call()
        call.send_initial_metadata(INITIAL)
        call.set_trailing_metadata(TRAILING)
        return call.metadata

    found = client.call("metadata_back", "back", SENT)
    assert found == [SENT, INITIAL, TRAILING]


def test_of_a_cancelled_call(client):
    call = client.open("metadata_requests", INITIAL, TRAILING)
    assert call.initial_metadata == INITIAL
    call.cancel()
    assert call.trailing_metadata == {}
    assert call.initial_metadata == INITIAL


# ---- what can't be sent ----


@pytest.mark.parametrize(
    "metadata, kind, words",
    [
        ("text", TypeError, "not str"),
        ([("a", "b")], TypeError, "not list"),
        ({b"key": "x"}, TypeError, "b'key'"),
        ({None: "x"}, TypeError, "None"),
        ({"ok": "x", "culprit": 1.5}, TypeError, "'culprit' to float"),
        ({"culprit": None}, TypeError, "'culprit' to NoneType"),
        ({"culprit": ["x"]}, TypeError, "'culprit' to list"),
        ({"culprit": bytearray(b"x")}, TypeError, "'culprit' to bytearray"),
        ({"culprit": "\udc80"}, ValueError, "'culprit'"),
        ({"culprit\udc80": "x"}, ValueError, "culprit"),
        ({"a": "x", "culprit": "x" * 8200}, ValueError, "8192 allowed; 'culprit'"),
        ({str(n): "x" * 100 for n in range(100)}, ValueError, "8192 allowed"),
    ],
)
def test_what_a_caller_can_t_send(client, recorded, metadata, kind, words):
    for use in (
        client.call,
        client.submit,
        client.notify,
        client.stream,
        client.open,
        recorded[0].call,
        recorded[0].submit,
        recorded[0].stream,
    ):
        with pytest.raises(kind, match=words):
            use("metadata", metadata=metadata)
    assert client.call("add", 1, 2) == 3


@pytest.mark.parametrize(
    "kind, words",
    [
        ("type", "TypeError: metadata must be a mapping"),
        ("key", "TypeError: metadata must map str to str or bytes, not 1 to str"),
        ("value", "TypeError: metadata must map str to str or bytes, not 'culprit' to int"),
        ("size", "ValueError: metadata of"),
        ("text", "ValueError: metadata 'culprit' can't be sent"),
    ],
)
def test_what_a_handler_can_t_send(recorded, kind, words):
    """It is told, what was set before stays, and the call is none the worse."""
    client, calls = recorded
    found = client.call("metadata_mistakes", kind)
    assert len(found) == 2
    for text in found:
        assert text.startswith(words)
    assert "culprit" in found[0] or kind in {"type", "key"}
    assert calls[-1].initial_metadata == {}
    assert calls[-1].trailing_metadata == {"after": kind}


def test_the_limit_is_for_both_kinds_together(client):
    """A unary call's initial and trailing metadata travel in one frame; a stream's do not."""
    big = {"a": "x" * 5000}
    with pytest.raises(shmrpc.RemoteError, match="8192 allowed"):
        client.call("metadata_unary", big, {"b": "x" * 5000})
    call = client.stream("metadata_stream", big, {"b": "x" * 5000})
    assert list(call) == [{}]
    assert (call.initial_metadata, call.trailing_metadata) == (big, {"b": "x" * 5000})


def test_as_much_as_is_allowed(client):
    """8192 bytes packed: 2 + 3 for the map and key, 3 in front of the value."""
    most = {"k": "x" * (8192 - 6)}
    assert client.call("metadata_unary", metadata=most) == most
    assert client.submit("metadata_unary", metadata=most).result() == most
    with pytest.raises(ValueError, match="8193 bytes"):
        client.call("metadata_unary", metadata={"k": "x" * (8192 - 5)})


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    metadata=st.dictionaries(
        st.text(max_size=20), st.one_of(st.text(max_size=50), st.binary(max_size=50)), max_size=8
    )
)
def test_any_metadata(client, metadata):
    future = client.submit("metadata_unary", metadata, metadata, metadata=metadata)
    assert future.result() == metadata
    assert future.initial_metadata == future.trailing_metadata == metadata


# ---- when a call is over ----


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_context_of_a_call_that_is_over(transport, service, connect, elsewhere):
    """It says so, and what is set on it reaches no other call."""
    client = connect(service(transport, workers=1).address)
    client.call("keep_context")
    found = client.call("use_kept_context", elsewhere)
    assert found[:3] == ["RuntimeError: the call of 'keep_context' is over"] * 3
    assert found[3] is False
    for _ in range(20):
        future = client.submit("metadata_unary")
        assert future.initial_metadata == future.trailing_metadata == {}


def test_the_context_of_a_call_that_ended_just_now(transport, service, connect):
    """Its worker has not taken another request yet."""
    client = connect(service(transport, workers=1).address)
    client.call("keep_context_and_use_it_late")
    wait_until(lambda: len(client.call("used_late")) == 2)
    for text in client.call("used_late"):
        assert text == "RuntimeError: the call of 'keep_context_and_use_it_late' is over"
    for _ in range(20):
        assert client.submit("metadata_unary").trailing_metadata == {}


def test_metadata_is_sent_by_the_handler_s_thread(client):
    text = client.call("metadata_from_another_thread")
    assert text.startswith("RuntimeError:")
    assert "thread that runs its handler" in text


# ---- timeouts ----


@pytest.mark.parametrize(
    "timeout",
    [-1, -0.001, -math.inf, math.nan, True, False, "5", b"5", [1], {}, 1j, -(10**400)],
)
def test_timeouts_that_are_none(client, recorded, timeout):
    for use in (
        client.call,
        client.submit,
        client.notify,
        client.stream,
        client.open,
        recorded[0].call,
        recorded[0].submit,
        recorded[0].open,
    ):
        with pytest.raises(ValueError, match="timeout must be seconds from 0 on, not") as caught:
            use("add", 1, 2, timeout=timeout)
        assert repr(timeout) in str(caught.value)
    with pytest.raises(ValueError, match="timeout"):
        client.ping(timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        shmrpc.connect("nowhere", timeout=timeout)


@pytest.mark.parametrize("timeout", [1e6, 1e10, 1e300, math.inf, 10**400])
def test_timeouts_that_are_long(client, recorded, common, connect, transport, timeout):
    for channel in (client, recorded[0]):
        assert channel.call("add", 1, 2, timeout=timeout) == 3
        assert channel.submit("add", 1, 2, timeout=timeout).result(5) == 3
        assert list(channel.stream("numbers", 3, timeout=timeout)) == [0, 1, 2]
        channel.notify("add", 1, 2, timeout=timeout)
    remaining = client.call("remaining", timeout=timeout)
    assert remaining is None or remaining > 1e5
    remaining = client.submit("remaining", timeout=timeout).result()
    assert remaining is None or remaining > 1e5
    assert client.ping(timeout=timeout) < 5
    address = common.addresses[TRANSPORTS.index(transport)]
    assert connect(address, timeout=timeout).call("add", 1, 2) == 3


def test_timeouts_that_are_short(client):
    """From 0 on: the call is over at once, and has not run."""
    before = client.call("remembered")
    for timeout in (0, 0.0, 5e-324, 1e-9):
        for use in (
            lambda timeout: client.call("remember", "late", timeout=timeout),
            lambda timeout: client.submit("remember", "late", timeout=timeout).result(),
            lambda timeout: client.open("remember", "late", timeout=timeout).result(),
        ):
            start = time.monotonic()
            with pytest.raises(shmrpc.DeadlineExceeded):
                use(timeout)
            assert time.monotonic() - start < SLACK
    assert client.call("remembered") == before
