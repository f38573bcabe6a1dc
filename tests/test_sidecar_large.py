"""Large values through a sidecar: from arena to arena, and nothing of them is left."""

import contextlib
import gc
from pathlib import Path

import numpy as np
import pytest
from conftest import in_threads, wait_until
from sidecars import segments_of, starter

import shmrpc

PROGRAM = Path(__file__).with_name("large_services.py")
MIB = 1 << 20
HELD = ("lent_blocks", "lent_bytes", "pinned_blocks", "arena_used_bytes")


run = starter("sidecar")


@pytest.fixture
def large(service):
    return lambda where="shm", **options: service(where, program=PROGRAM, **options)


@pytest.fixture
def client(large, run, connect):
    run("--listen", "shm://front", "--upstream", large().address)
    return connect("front")


def settled(client):
    """Nothing is held any more: by us, by the server, by the sidecar between."""

    def idle():
        gc.collect()
        with shmrpc.inspect("front") as inspector:
            all_three = (client.stats(), client.call("stats"), inspector.stats())
        return all(stats[name] == 0 for stats in all_three for name in HELD)

    wait_until(idle, what="blocks to go back")


def test_they_stay_in_shared_memory(client):
    array = np.arange(MIB // 4, dtype="i4")
    got = client.call("add", array, array)
    assert (got == 2 * array).all()
    assert client.stats()["pinned_bytes"] == array.nbytes  # in the sidecar's arena
    with shmrpc.inspect("front") as inspector:
        stats = inspector.stats()
        assert stats["lent_bytes"] >= array.nbytes
        assert (stats["outbox_bytes"], stats["pinned_blocks"]) == (0, 0)
    assert client.stats()["lent_blocks"] == 0  # it went back before the reply came
    client.call("keep", array)
    assert client.call("stats")["pinned_bytes"] == array.nbytes
    client.call("drop")
    del got
    settled(client)


def test_what_comes_back_of_a_request_is_not_copied(client):
    """A server that returns what it got, or a part: the caller gets its own memory back."""
    first, second = np.arange(MIB // 4, dtype="i4"), np.arange(MIB, dtype="u1")
    whole, part = client.call("cut", first, 1000, 200000), client.call("cut", second, 0, MIB // 2)
    assert (whole == first[1000:200000]).all()
    assert (part == second[: MIB // 2]).all()
    stats = client.stats()
    assert stats["returned_blocks"] == stats["pinned_blocks"] == 2
    with shmrpc.inspect("front") as inspector:
        assert inspector.stats()["lent_blocks"] == 0
    swapped = client.call("swap", first, second)
    assert (swapped[0] == second).all()
    assert (swapped[1] == first).all()
    assert client.stats()["returned_blocks"] == 4
    # What an earlier request brought is copied: the caller may have the memory for something else.
    client.call("keep", first)
    kept = client.call("kept")
    assert (kept == first).all()
    assert client.stats()["returned_blocks"] == 4
    loan = client.empty((MIB,), "u1")
    loan[:] = 7
    back = client.call("cut", loan, 10, MIB)
    assert (back == 7).all()
    client.call("drop")
    del whole, part, swapped, kept, loan, back
    settled(client)


def test_many_callers_get_their_own_back(large, run, connect):
    """Callers share one connection to the server, but no memory."""
    run("--listen", "shm://front", "--upstream", large().address)

    def work(number):
        with contextlib.closing(connect("front")) as one:
            arrays = [np.full(8192 + 16 * i, number * 8 + i, dtype="u1") for i in range(6)]
            return all(
                (got == array).all()
                for _ in range(30)
                for got, array in zip(one.call("swap", *arrays), arrays[::-1], strict=True)
            )

    assert in_threads(4, work, timeout=60) == [True] * 4
    settled(connect("front"))


def test_every_kind_of_call(client):
    array = np.arange(MIB // 8, dtype="i8")
    assert (client.submit("echo", array).result(20) == array).all()
    assert client.call("add", array, array)[1] == 2
    assert [len(item) for item in client.stream("stream", 5, MIB)] == [MIB] * 5
    with client.open("echoes") as call:
        for _ in range(4):
            call.send(array)
            assert (next(call) == array).all()
        call.close_send()
        assert list(call) == []
    client.notify("keep", array)
    wait_until(lambda: client.call("stats")["pinned_blocks"] == 1)
    client.call("drop")
    settled(client)


def test_many_of_them(client):
    """The same memory over and over: arenas do not grow."""

    def work(number):
        array = np.full(MIB // 4, number, dtype="i4")
        return all((client.call("add", array, 1) == number + 1).all() for _ in range(40))

    assert in_threads(3, work, timeout=60) == [True] * 3
    with shmrpc.inspect("front") as inspector:
        assert MIB <= inspector.stats()["arena_bytes"] <= 32 * MIB
    settled(client)


def test_loans(client):
    array = client.empty((MIB,), "u1")
    array[:] = 7
    assert (client.call("echo", array) == 7).all()
    del array
    settled(client)


def test_no_room_at_the_upstream(large, run, connect):
    """The sidecar waits for it as a client would, and says who holds it."""
    run("--listen", "shm://front", "--upstream", large(max_memory_bytes=4 * MIB).address)
    client = connect("front")
    array = np.ones(MIB, dtype="u1")
    for _ in range(3):
        client.call("keep", array)
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("keep", np.ones(2 * MIB, dtype="u1"), timeout=0.3)
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("keep", np.ones(2 * MIB, dtype="u1"), timeout=0.3)
    assert client.call("echo", 1) == 1  # others go on
    client.call("drop", 3)
    assert (client.call("echo", np.ones(2 * MIB, dtype="u1"), timeout=20) == 1).all()
    settled(client)


def test_over_sockets_and_back(large, run, connect):
    """Two sidecars with tcp between them: in shared memory at both ends, inline on the way."""
    far = run("--listen", "tcp://127.0.0.1:0", "--upstream", large().address)
    run("--listen", "shm://front", "--upstream", far.address)
    client = connect("front")
    array = np.arange(MIB // 4, dtype="i4")
    for _ in range(3):
        assert (client.call("echo", array) == array).all()
    client.call("keep", array)
    assert client.call("stats")["pinned_blocks"] == 1
    client.call("drop")
    settled(client)


@pytest.mark.thorough
def test_idle_memory_goes_back_to_the_system(large, run, connect):
    """Also of a server whose results alone are large: the sidecar reads what it wants back."""
    server = large()
    sidecar = run("--listen", "shm://front", "--upstream", server.address)
    client = connect("front")
    assert client.call("echo", 1) == 1

    def held():
        return segments_of(server.pid), segments_of(sidecar.pid)

    before = held()
    for _ in range(20):
        assert [item.nbytes for item in client.call("make", 2, MIB)] == [MIB] * 2
    assert all(now > then for now, then in zip(held(), before, strict=True))
    gc.collect()
    wait_until(lambda: held() == before, timeout=60)
