"""Deadlines hold whatever the other side does, and travel along with nested calls."""

import threading
import time

import pytest
from conftest import address_of

import shmrpc

CLOSE = 0.005  # seconds that a deadline may be missed by
TIMEOUT = 0.05


def wait_in(client, how):
    if how == "call":
        client.call("add", 1, 2, timeout=TIMEOUT)
    elif how == "submit":
        client.submit("add", 1, 2, timeout=TIMEOUT).result()
    elif how == "stream":
        next(client.stream("count", 3, timeout=TIMEOUT))
    elif how == "result":
        client.open("add", 1, 2, timeout=TIMEOUT).result()
    else:
        call = client.open("add", 1, 2, timeout=TIMEOUT)
        while True:
            call.send(bytes(1000))


@pytest.mark.parametrize("how", ["call", "submit", "stream", "result", "send"])
def test_a_stopped_server(transport, service, connect, how):
    """SIGSTOP is as bad as C code that never returns: nothing of the server runs any more."""
    running = service(transport)
    client = connect(running.address)
    assert client.call("add", 1, 2) == 3
    running.pause()
    lateness = []
    for _ in range(8):
        start = time.monotonic()
        with pytest.raises(shmrpc.DeadlineExceeded):
            wait_in(client, how)
        lateness.append(time.monotonic() - start - TIMEOUT)
        if lateness[-1] < CLOSE:
            break
    print(f"missed by {[f'{late * 1000:.1f} ms' for late in lateness]}")
    assert min(lateness) < CLOSE
    assert min(lateness) > -0.001
    running.resume()
    assert client.call("add", 1, 2) == 3


def test_nested_calls_inherit_the_deadline(directory, transport, connect):
    server = shmrpc.Server(address_of(transport, directory))
    client = None

    @server.method
    def remaining():
        return shmrpc.current_call().time_remaining()

    @server.method
    def nested(how, own):
        caller = shmrpc.current_call().caller
        if how == "caller":
            return caller.call("left", timeout=own)
        other = shmrpc.connect(server.addresses[0])
        with other:
            if how == "call":
                return other.call("remaining", timeout=own)
            if how == "submit":
                return other.submit("remaining", timeout=own).result()
            return other.open("remaining", timeout=own).result()

    with server:
        client = connect(server.addresses[0])
        client.method(name="left")(lambda: shmrpc.current_call().time_remaining())
        for how in ("call", "submit", "open", "caller"):
            assert 0 < client.call("nested", how, 60, timeout=20) <= 20
            assert 0 < client.call("nested", how, 5, timeout=20) <= 5
            assert client.call("nested", how, None) is None
            assert client.call("remaining") is None


def test_expired_in_the_queue_is_never_started(directory, transport, connect):
    server = shmrpc.Server(address_of(transport, directory), workers=1)
    release, started = threading.Event(), []

    @server.method
    def hold():
        release.wait(20)

    @server.method
    def note(number):
        started.append(number)

    with server:
        client = connect(server.addresses[0])
        holding = client.submit("hold")
        late = [client.submit("note", number, timeout=0.05) for number in range(5)]
        for future in late:
            with pytest.raises(shmrpc.DeadlineExceeded):
                future.result()
        client.ping()  # over tcp their time began when they arrived; they were given up by now
        release.set()
        holding.result(10)
        client.call("note", "after")
        assert started == ["after"]
