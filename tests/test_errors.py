"""What goes wrong with a call, and what its caller is told. The connection lives on each time."""

import copy
import os
import pickle
import time
from pathlib import Path

import pytest
from conftest import SLACK, in_threads, wait_until

import shmrpc
from shmrpc import errors


@pytest.fixture(autouse=True)
def connection_lives(client):
    """Whatever a test did, the same connection still works afterwards."""
    yield
    reconnects = client.stats()["reconnects"]
    assert client.call("add", 40, 2) == 42
    assert reconnects == 0


def remote_error(client, method, *args, **kwargs):
    """The RemoteError of a call, the same by call and by submit."""
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call(method, *args, **kwargs)
    future = client.submit(method, *args, **kwargs).exception(20)
    assert isinstance(future, shmrpc.RemoteError)
    assert (future.type, future.code) == (caught.value.type, caught.value.code)
    return caught.value


def test_unknown_method(client):
    with pytest.raises(shmrpc.MethodNotFound, match="'no_such_method'") as caught:
        client.call("no_such_method", 1)
    assert caught.value.code == "UNIMPLEMENTED"
    assert "pid" in str(caught.value)
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("Echo", 1)
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("no_such_method", b"x" * 1_000_000)


@pytest.mark.parametrize(
    "args, kwargs, text",
    [
        ((), {}, "missing 1 required positional argument: 'a'"),
        ((1, 2, 3), {}, "takes from 1 to 2 positional arguments but 3 were given"),
        ((1,), {"c": 1}, "unexpected keyword argument 'c'"),
        ((1,), {"a": 1}, "multiple values for argument 'a'"),
    ],
)
def test_wrong_arguments(client, args, kwargs, text):
    error = remote_error(client, "add", *args, **kwargs)
    assert (error.type, error.code) == ("TypeError", "INVALID_ARGUMENT")
    assert "add()" in error.message
    assert text in error.message
    assert error.remote_traceback == ""
    assert "Traceback" not in str(error)


def test_wrong_arguments_of_a_method_named_like_a_packer(client):
    error = remote_error(client, "serialize")
    assert (error.type, error.code) == ("TypeError", "INVALID_ARGUMENT")
    assert error.message.endswith("missing 1 required positional argument: 'value'")


def test_type_error_in_the_handler_is_not_about_arguments(client, transport):
    error = remote_error(client, "inner_type_error")
    assert (error.type, error.code) == ("TypeError", "UNKNOWN")
    assert "has no len()" in error.message
    if transport == "tcp":  # nobody knows whose connection it is: no traceback
        assert error.remote_traceback == ""
        return
    assert "inner_type_error" in error.remote_traceback
    assert "services.py" in error.remote_traceback
    assert "shmrpc/server.py" not in error.remote_traceback


def test_handler_raises(client, transport):
    error = remote_error(client, "raise_error", "KeyError", "k")
    assert (error.type, error.message) == ("KeyError", "'k'")
    error = remote_error(client, "raise_error", "ValueError", "the reason")
    assert (error.type, error.message, error.code) == ("ValueError", "the reason", "UNKNOWN")
    assert error.details is None
    if transport == "tcp":
        assert error.remote_traceback == ""
        assert str(error) == "ValueError: the reason"
        return
    assert error.remote_traceback.startswith("Traceback (most recent call last)")
    assert "ValueError: the reason" in error.remote_traceback
    assert "raise_error" in error.remote_traceback
    assert error.remote_traceback.rstrip() in str(error)


@pytest.mark.parametrize("shown", [True, False])
def test_tracebacks_by_choice(transport, service, connect, shown):
    other = connect(service(transport, show_tracebacks=shown).address)
    error = remote_error(other, "raise_error", "ValueError", "x")
    assert bool(error.remote_traceback) == shown


def test_builtin_method_raises(client):
    """A function without Python frames: its error is about neither arguments nor packing."""
    assert client.call("sqrt", 9) == 3.0
    error = remote_error(client, "sqrt", -1)
    assert error.type == "ValueError"
    assert "domain" in error.message or "nonnegative" in error.message
    assert "can't be sent" not in error.message
    assert remote_error(client, "sqrt", 1, 2).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt"])
def test_handler_raises_what_would_end_a_program(client, kind):
    error = remote_error(client, "raise_error", kind, "bye")
    assert (error.type, error.message) == (kind, "bye")


def test_errors_that_resist_reporting(client):
    """More often than there are workers: each of them must survive."""
    for _ in range(20):
        with pytest.raises(shmrpc.RemoteError) as caught:
            client.call("raise_error", "Unprintable", timeout=5)
        assert caught.value.type.endswith("Unprintable")


def test_error_text_that_is_not_unicode(client):
    """A file name from os.listdir, say."""
    for _ in range(20):
        with pytest.raises(shmrpc.RemoteError) as caught:
            client.call("raise_surrogate", timeout=5)
        assert caught.value.type == "ValueError"


def test_shmrpc_errors_in_a_handler_keep_their_code(client):
    error = remote_error(client, "raise_error", "MethodNotFound", "inner")
    assert error.code == "UNIMPLEMENTED"
    assert error.type.endswith("MethodNotFound")
    error = remote_error(client, "raise_error", "DeadlineExceeded", "inner")
    assert error.code == "DEADLINE_EXCEEDED"


def test_abort(client):
    error = remote_error(client, "abort", "NOT_FOUND", "no such order", {"id": 7, "b": b"\xff"})
    assert (error.code, error.message) == ("NOT_FOUND", "no such order")
    assert error.details == {"id": 7, "b": b"\xff"}
    assert error.remote_traceback == ""
    for code in errors.STATUS_NAMES[1:]:
        assert remote_error(client, "abort", code).code == code


def test_abort_with_what_it_does_not_take(client):
    for _ in range(20):
        with pytest.raises(shmrpc.RemoteError) as caught:
            client.call("abort_strangely", "message", timeout=5)
        assert caught.value.code == "NOT_FOUND"
        assert "an exception as the message" in caught.value.message
        with pytest.raises(shmrpc.RemoteError) as caught:
            client.call("abort_strangely", "details", timeout=5)
        assert caught.value.code == "NOT_FOUND"
        assert "object object" in caught.value.details
    assert remote_error(client, "abort_strangely", "code").type == "ValueError"
    for code in ("OK", "NO_SUCH_CODE", ""):
        with pytest.raises(ValueError, match="gRPC"):
            shmrpc.Abort(code)


@pytest.mark.parametrize(
    "value, kind",
    [(object(), TypeError), ({1}, TypeError), (1 << 70, ValueError), ("\udc80", ValueError)],
    ids=["object", "set", "huge", "surrogate"],
)
def test_argument_that_cannot_be_sent(client, value, kind):
    name = type(value).__name__
    for use in (client.call, client.submit, client.notify):
        with pytest.raises(kind, match=rf"argument 2 of 'add'.*{name}"):
            use("add", 1, value)
        with pytest.raises(kind, match=rf"argument 'b' of 'add'.*{name}"):
            use("add", 1, b=value)
        with pytest.raises(kind, match=r"argument 1 of 'echo'"):
            use("echo", [1, {"deep": [value]}])
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="argument 1"):
        client.call("echo", cycle)


@pytest.mark.parametrize("kind", ["object", "set", "huge", "surrogate", "cycle"])
def test_result_that_cannot_be_sent(client, kind):
    error = remote_error(client, "unpackable", kind)
    assert error.code == "INTERNAL"
    assert "'unpackable' returned what can't be sent" in error.message
    assert "server.py" not in str(error)


def test_message_too_large(transport, service, connect):
    """Refused where it is made, by whoever is to receive it, and nothing is sent."""
    running = service(transport, max_message_bytes=100_000)
    other = connect(running.address, max_message_bytes=50_000)
    for _ in range(3):
        for use in (other.call, other.submit, other.notify):
            with pytest.raises(shmrpc.MessageTooLarge, match="max_message_bytes=100000") as caught:
                use("size", bytes(100_001))
            assert caught.value.code == "RESOURCE_EXHAUSTED"
        with pytest.raises(shmrpc.MessageTooLarge, match="result"):
            other.call("zeros", 50_001)
        with pytest.raises(shmrpc.MessageTooLarge, match="result"):
            other.submit("zeros", 5_000_000).result(10)
        assert other.call("size", bytes(99_900)) == 99_900
        assert len(other.call("zeros", 49_900)) == 49_900
    with pytest.raises(shmrpc.RemoteError) as caught:
        other.call("abort", "ABORTED", "x" * 60_000)
    assert caught.value.code == "ABORTED"
    with pytest.raises(shmrpc.RemoteError):
        other.call("abort", "ABORTED", "x", ["y" * 60_000])
    assert other.stats()["reconnects"] == 0


def test_deadline(client):
    start = time.monotonic()
    with pytest.raises(shmrpc.DeadlineExceeded, match="hold_until_cancelled") as caught:
        client.call("hold_until_cancelled", timeout=0.1)
    assert 0.095 < time.monotonic() - start < 0.1 + 0.1 * SLACK
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    wait_until(lambda: client.call("running") == 0)  # the server's worker is free again
    assert client.call("sleep", 0.01, "in time", timeout=20) == "in time"
    assert client.call("add", 1, 2, timeout=1e9) == 3
    assert client.call("add", 1, 2, timeout=float("inf")) == 3


def test_deadline_of_zero(client):
    for _ in range(5):
        with pytest.raises(shmrpc.DeadlineExceeded):
            client.call("sleep", 1, timeout=0)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_negative_timeout(client, timeout):
    for use in (client.call, client.submit, client.notify):
        with pytest.raises(ValueError, match="timeout"):
            use("add", 1, 2, timeout=timeout)
    with pytest.raises((TypeError, ValueError)):
        client.call("add", 1, 2, timeout="soon")
    with pytest.raises(ValueError, match="timeout"):
        shmrpc.connect("calc", timeout=timeout)


def test_late_reply_is_dropped_and_counted(client):
    before = client.stats()["late_replies"]
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("sleep", 0.3, "late", timeout=0.1)
    for number in range(10):
        assert client.call("echo", number) == number
    wait_until(lambda: client.call("running") == 0)
    wait_until(lambda: client.call("echo", "next") and client.stats()["late_replies"] > before)
    assert client.stats()["late_replies"] == before + 1


def test_expired_request_in_the_queue_is_never_started(transport, service, connect, directory):
    running = service(transport, workers=1)
    other = connect(running.address)
    path, release = os.path.join(directory, "started"), os.path.join(directory, "release")
    holding = other.submit("hold", release)
    queued = [
        other.submit("note", path, "late", timeout=0.1),
        other.submit("note", path, "in time", timeout=30),
        other.submit("note", path, "no deadline"),
    ]
    with pytest.raises(shmrpc.DeadlineExceeded):
        queued[0].result()
    other.ping()  # over tcp its time began when it arrived; that it was given up has arrived now
    Path(release).touch()
    holding.result(10)
    for future in queued[1:]:
        future.result(10)
    assert Path(path).read_text().splitlines() == ["in time", "no deadline"]


# tcp carries the time that is left, which begins again when it arrives.
@pytest.mark.parametrize("transport", ["shm", "unix"])
def test_request_that_expired_on_its_way_is_never_started(transport, service, connect, directory):
    """The server was stopped while the deadline passed; only clocks that are one tell."""
    running = service(transport)
    other = connect(running.address)
    path = os.path.join(directory, "started")
    other.call("add", 1, 2)
    running.pause()
    with pytest.raises(shmrpc.DeadlineExceeded):
        other.call("note", path, "late", timeout=0.1)
    running.resume()
    assert other.call("add", 1, 2, timeout=20) == 3
    assert not os.path.exists(path)


def test_overloaded(transport, service, connect, directory):
    """workers=2 run, two more wait, the fifth is refused and never started."""
    running = service(transport, workers=2, max_concurrency=4)
    other = connect(running.address)
    path, release = os.path.join(directory, "started"), os.path.join(directory, "release")
    holding = [other.submit("hold", release, number) for number in range(4)]
    other.ping()
    for _ in range(3):
        with pytest.raises(shmrpc.Overloaded) as caught:
            other.call("note", path, "refused")
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        with pytest.raises(shmrpc.Overloaded):
            other.submit("note", path, "refused").result(5)
    Path(release).touch()
    assert [future.result(10) for future in holding] == [0, 1, 2, 3]
    assert not os.path.exists(path)
    assert other.call("note", path, "accepted") is None
    assert other.call("stats")["calls_refused"] == 6


def test_overloaded_many(transport, service, connect):
    """Far more calls than fit: each ends, one way or the other, and the server recovers."""
    other = connect(service(transport, workers=2, max_concurrency=8).address)
    futures = [other.submit("sleep", 0.002, number) for number in range(1000)]
    outcomes = [future.exception(30) for future in futures]
    assert all(outcome is None or isinstance(outcome, shmrpc.Overloaded) for outcome in outcomes)
    done = [future.result() for future, error in zip(futures, outcomes, strict=True) if not error]
    assert len(done) >= 8
    wait_until(lambda: other.call("running") == 0)


def test_every_error_has_a_code():
    expected = {
        "Error": "UNKNOWN",
        "ConnectError": "UNAVAILABLE",
        "ConnectionLost": "UNAVAILABLE",
        "DeadlineExceeded": "DEADLINE_EXCEEDED",
        "Cancelled": "CANCELLED",
        "MethodNotFound": "UNIMPLEMENTED",
        "RemoteError": "UNKNOWN",
        "Overloaded": "RESOURCE_EXHAUSTED",
        "MessageTooLarge": "RESOURCE_EXHAUSTED",
        "ProtocolError": "INTERNAL",
        "ForkedError": "FAILED_PRECONDITION",
    }
    for name, code in expected.items():
        error = getattr(shmrpc, name)("text")
        assert isinstance(error, shmrpc.Error)
        assert error.code == code
        assert "text" in str(error)
    assert isinstance(shmrpc.Abort("ABORTED", "x"), shmrpc.RemoteError)
    assert shmrpc.ConnectionLost("x").outcome == "unknown"


def test_bad_options(common):
    address = common.addresses[0]
    for options, text in [
        ({"max_message_bytes": 0}, "max_message_bytes"),
        ({"max_message_bytes": 1 << 33}, "max_message_bytes"),
        ({"backing": "disk"}, "backing"),
        ({"wait": "patiently"}, "wait"),
        ({"spin_budget": 2}, "spin_budget"),
        ({"timeout": -1}, "timeout"),
    ]:
        with pytest.raises(ValueError, match=text):
            shmrpc.connect(address, **options)
        if text != "timeout":
            with pytest.raises(ValueError, match=text):
                shmrpc.Server("calc", **options)
    for options in ({"workers": 0}, {"max_concurrency": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            shmrpc.Server("calc", **options)
    with pytest.raises(ValueError, match="address"):
        shmrpc.Server()
    for uids in ("root", [-1], [None]):
        with pytest.raises(TypeError, match="numbers of users"):
            shmrpc.connect(address, allow_uids=uids)
        with pytest.raises(TypeError, match="numbers of users"):
            shmrpc.Server("calc", allow_uids=uids)


def test_what_can_not_be_copied(client):
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="connect anew"):
            duplicate(client)


def test_what_a_server_is_called(directory):
    server = shmrpc.Server("calc", "tcp://127.0.0.1:0")
    assert repr(server) == "<shmrpc.Server shm://calc tcp://127.0.0.1:0 not listening>"
    with server:
        assert repr(server) == f"<shmrpc.Server {' '.join(server.addresses)} listening>"


@pytest.mark.parametrize("wait", ["auto", "spin", "block"])
def test_ways_of_waiting(transport, service, connect, wait):
    running = service(transport, wait=wait)
    other = connect(running.address, wait=wait, spin_budget=0.00005)
    for number in range(200):
        assert other.call("echo", number) == number
    in_threads(4, lambda n: [other.call("echo", i) for i in range(n, 100)])
    assert other.call("sleep", 0.05, "slow") == "slow"
