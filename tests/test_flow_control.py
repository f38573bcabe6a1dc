"""A reader that stops makes its writer wait, at a bounded amount of memory, and nobody else."""

import threading
import time

import pytest
from conftest import address_of, wait_until

import shmrpc
from shmrpc.session import WINDOW_BYTES, WINDOW_MESSAGES

# An item, and how many of it fit in the windows of both ends. Over shm a block counts for a 32nd.
ITEMS = {
    "small": (bytes(64), 2 * WINDOW_MESSAGES),
    "large": ("x" * 50_000, 2 * WINDOW_BYTES // 50_000 + 2),
    "block": (bytes(50_000), 2 * WINDOW_BYTES * 32 // 50_000 + 2),
}


@pytest.fixture(params=ITEMS)
def item(request):
    return ITEMS[request.param]


def settled(counter):
    """Wait until it has grown, and grows no more."""
    seen = 0
    while counter[0] != seen or not seen:
        seen = counter[0]
        time.sleep(0.2)
    return seen


def test_a_reader_that_stops(directory, transport, connect, item):
    value, most = item
    server = shmrpc.Server(address_of(transport, directory))
    sent = [0]

    @server.method
    def flood():
        while True:
            yield value
            sent[0] += 1

    @server.method
    def add(a, b):
        return a + b

    with server:
        client = connect(server.addresses[0])
        with client.open("flood") as call:
            assert len(next(call)) == len(value)
            assert 0 < settled(sent) <= most
            assert [client.call("add", n, 1) for n in range(50)] == list(range(1, 51))
            with client.stream("flood") as other:  # another stream has credit of its own
                assert all(len(next(other)) == len(value) for _ in range(100))
            before = sent[0]
            for _ in range(2 * most):
                assert len(next(call)) == len(value)
            assert sent[0] > before


def test_a_handler_that_does_not_read(directory, transport, connect, item):
    value, most = item
    server = shmrpc.Server(address_of(transport, directory))
    go = threading.Event()

    @server.method(requests=True)
    def lazy(requests):
        go.wait(20)
        return sum(1 for _ in requests)

    @server.method
    def add(a, b):
        return a + b

    with server:
        client = connect(server.addresses[0])
        sent, count = [0], 3 * most
        with client.open("lazy") as call:

            def send():
                for _ in range(count):
                    call.send(value)
                    sent[0] += 1

            sender = threading.Thread(target=send)
            sender.start()
            assert 0 < settled(sent) <= most
            assert [client.call("add", n, 1) for n in range(50)] == list(range(1, 51))
            go.set()
            sender.join(30)
            assert call.result() == count
        wait_until(lambda: server.stats()["running"] == 0)
