"""Memory that is sent without a copy: whose it is, when it goes back, what it may be used for."""

import gc
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import pytest
from conftest import wait_until

import shmrpc
from shmrpc import tending


@pytest.fixture
def server(directory):
    """A server in this process, so that both sides' memory can be looked at."""
    server = shmrpc.Server("lender")
    kept = server.kept = []

    @server.method
    def keep(value):
        kept.append(value)

    @server.method
    def echo(value):
        return value

    @server.method
    def add(array, number):
        result = shmrpc.current_call().empty(array.shape, array.dtype)
        np.add(array, number, out=result)
        return result

    @server.method
    def ramp(count, size):
        for number in range(count):
            item = shmrpc.current_call().empty(size, "u1")
            item[:] = number
            yield item

    @server.method
    def text(size):
        view = shmrpc.current_call().loan(size)
        view[:] = b"t" * size
        return view

    with server:
        yield server


def test_a_loan_that_comes_back_is_copied(server, connect):
    client = connect("lender")
    data = client.loan(100_000)
    data[:] = b"a" * 100_000
    back = client.call("echo", data)
    data[:] = b"b" * 100_000
    assert back == b"a" * 100_000
    array = client.empty(100_000, "u1")
    array[:] = 1
    back = client.call("echo", array[5:50_000])
    array.flags.writeable = True  # the call is over
    array[:] = 2
    assert (back == 1).all()


def test_a_loan_is_seen_by_the_receiver_without_a_copy(server, connect):
    client = connect("lender")
    array = client.empty((1000, 100), "int64")
    array[:] = 7
    client.call("keep", array)
    [kept] = server.kept
    assert (kept == 7).all()
    array.flags.writeable = True  # we know who reads it
    array[3, 4] = 8
    assert kept[3, 4] == 8
    assert client.stats()["loans"] == 1


def test_a_sent_array_is_read_only_and_can_be_sent_again(server, connect):
    client = connect("lender")
    array = client.empty(100_000)
    array[:] = 1.5
    assert array.flags.writeable
    for value in (array, array[10:50_000], array.reshape(1000, 100), [array, array[::2]]):
        client.call("echo", value)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
    assert client.call("echo", array).sum() == 150_000


def test_a_loan_goes_back_when_the_last_reference_dies(server, connect):
    client = connect("lender")
    array = client.empty(100_000, "u1")
    part = array[5:10]
    del array
    gc.collect()
    assert client.stats()["loans"] == 1
    del part
    assert client.stats()["loans"] == 0
    view = client.loan(100_000)
    part = view[5:]
    view.release()
    assert client.stats()["loans"] == 1
    part.release()
    del part, view
    assert client.stats()["arena_used_bytes"] == 0


def test_a_loan_that_goes_back_wakes_who_waits_for_room(server, connect, monkeypatch):
    """At once: the peer, which never had it, says nothing, and what tidies up comes much later."""
    monkeypatch.setattr(tending, "QUIET", 1000)
    client = connect("lender", max_memory_bytes=4 << 20)
    for _ in range(10):
        held = client.loan(3 << 20)
        pool = ThreadPoolExecutor(2)
        waiting = [pool.submit(client.loan, 3 << 20, timeout=40) for _ in range(2)]
        assert client.call("echo", 5) == 5
        assert not any(future.done() for future in waiting)
        held.release()
        for future in as_completed(waiting, 40):
            future.result().release()
        pool.shutdown()
    wait_until(lambda: client.stats()["loans"] == 0)


def test_a_loan_outlives_its_client(server, connect):
    client, other = connect("lender"), connect("lender")
    array, view = client.empty(100_000), client.loan(100_000)
    client.close()
    del client
    gc.collect()
    array[:] = 4
    view[:3] = b"abc"
    assert other.call("echo", array).sum() == 400_000  # another connection: copied
    assert bytes(other.call("echo", view)[:3]) == b"abc"


def test_what_the_peer_keeps_is_not_lent_again(server, connect):
    client = connect("lender")
    for number in range(10):
        array = client.empty(100_000, "u1")
        array[:] = number
        client.call("keep", array)
        del array
    gc.collect()
    assert [int(kept[0]) for kept in server.kept] == list(range(10))
    assert client.stats()["lent_blocks"] == 10
    server.kept.clear()
    gc.collect()
    wait_until(lambda: client.call("echo", 0) == client.stats()["lent_blocks"])


def test_handlers_have_memory_of_their_caller(server, connect):
    client = connect("lender")
    result = client.call("add", np.ones((100, 1000)), 2)
    assert (result.sum(), result.flags.writeable) == (300_000, False)
    assert bytes(client.call("text", 50_000)) == b"t" * 50_000
    assert [int(item[-1]) for item in client.stream("ramp", 5, 30_000)] == list(range(5))


def test_what_is_no_array_is_refused(server, connect):
    client = connect("lender")
    for shape, dtype in ((5, object), (5, "T"), (5, "no dtype")):
        with pytest.raises(TypeError):
            client.empty(shape, dtype)
    for shape in (-1, (2, -1), (2**40, 2**40)):
        with pytest.raises((ValueError, TypeError)):
            client.empty(shape)
    for size in (-1, 1.5, True, "5"):
        with pytest.raises(ValueError, match="number of bytes"):
            client.loan(size)
    assert client.empty((3, 0)).shape == (3, 0)
    assert client.empty((2, 3), [("a", "i4"), ("b", "f8")]).dtype.names == ("a", "b")
    assert len(client.loan(0)) == 0


@pytest.mark.parametrize("where", ["unix://{}/lender.sock", "tcp://127.0.0.1:0"])
def test_without_shared_memory_it_is_ordinary_memory(directory, connect, where):
    server = shmrpc.Server(where.format(directory))

    @server.method
    def echo(value):
        return value

    with server:
        client = connect(server.addresses[0])
        array = client.empty(100_000)
        array[:] = 2
        assert client.call("echo", array).sum() == 200_000
        view = client.loan(100_000)
        view[:1] = b"x"
        assert client.call("echo", view)[0] == ord("x")


def test_no_more_room_is_said(server, connect):
    client = connect("lender", max_memory_bytes=1 << 20)
    kept = client.empty(900_000, "u1")
    with pytest.raises(shmrpc.DeadlineExceeded, match="loans of this process"):
        client.empty(900_000, "u1", timeout=0.1)
    assert client.empty(2_000_000, "u1").flags.writeable  # more than ever: ordinary memory
    del kept
    assert client.empty(900_000, "u1", timeout=10).size == 900_000
