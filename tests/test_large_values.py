"""Values with large memory in them, by each transport: they arrive, and nothing is left."""

import concurrent.futures
import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TRANSPORTS, Service, address_of, in_threads, short_directory, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmrpc
from shmrpc import lending, tending

PROGRAM = Path(__file__).with_name("large_services.py")
MIB = 1 << 20
LARGE = 16 << 10


@pytest.fixture(scope="module")
def common():
    """One server at all three transports, for tests that leave it as it was."""
    with short_directory() as path:
        running = Service(
            *(address_of(transport, path) for transport in TRANSPORTS),
            program=PROGRAM,
            max_message_bytes=256 * MIB,
        )
        yield running
        assert running.process.poll() is None, "the server died"
        running.close()


@pytest.fixture
def large(service):
    """Start a server process of its own."""
    return lambda *where, **options: service(*where, program=PROGRAM, **options)


@pytest.fixture
def shm_client(common, connect):
    return connect(common.addresses[0], max_message_bytes=256 * MIB)


def settled(client):
    """Nothing that was sent or received is held any more, on either side."""

    def idle():
        gc.collect()
        theirs, ours = client.call("stats"), client.stats()
        return all(
            stats[name] == 0
            for stats in (ours, theirs)
            for name in ("lent_blocks", "lent_bytes", "pinned_blocks", "arena_used_bytes")
        )

    return idle


def same(left, right):
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (bytearray, memoryview)):
        return bytes(left) == bytes(right)
    return type(left) is type(right) and left == right


# ---- there and back ----


@pytest.mark.parametrize("size", [0, 1, LARGE - 1, LARGE, LARGE + 1, 100_000, 3 * MIB])
def test_sizes(client, size):
    data = np.random.default_rng(size).integers(0, 255, size, "u1")
    for value in (data, data.tobytes(), memoryview(data.tobytes()), bytearray(data.tobytes())):
        assert same(value, client.call("echo", value))
        assert same(value, client.submit("echo", value).result(20))


@pytest.mark.parametrize("size", [LARGE, MIB])
def test_kinds_are_the_same_by_every_transport(client, size):
    data = bytes(range(256)) * (size // 256)
    assert type(client.call("echo", data)) is bytes
    assert client.call("kind", data) == ["bytes"]
    for value in (bytearray(data), memoryview(data)):
        assert client.call("kind", value) == ["memoryview", "B", [size], False]
        result = client.call("echo", value)
        assert isinstance(result, memoryview)
        assert result.readonly
    array = np.frombuffer(data, "<f4").reshape(4, -1)
    assert client.call("kind", array) == ["ndarray", "float32", [4, size // 16], False]
    result = client.call("echo", array)
    assert not result.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        result[0, 0] = 1
    assert type(client.call("echo", shmrpc.Buffer(data))) is shmrpc.Buffer


@pytest.mark.parametrize("size", [0, 1, 100, LARGE - 1, LARGE, 100_000])
def test_views_with_gaps_are_copied(client, size):
    view, data = memoryview(b"ab" * size)[::2], b"a" * size
    assert client.call("echo", view) == data
    assert client.call("echo", value=[view, view]) == [data, data]
    assert client.submit("echo", view).result() == data
    assert client.call("gaps", size) == data
    assert list(client.stream("stream_gaps", size, size)) == [data, data]
    with client.open("echoes") as call:
        call.send(view)
        call.send([np.ones(LARGE, "u1"), view])
        assert next(call) == data
        assert next(call)[1] == data


def test_nested_and_several(client):
    value = {
        "a": [np.arange(10_000), b"b" * 50_000, "text", None],
        "c": {"d": np.asfortranarray(np.ones((100, 50))), "e": [1.5, memoryview(b"x" * 20_000)]},
    }
    assert same(value, client.call("echo", value))
    assert client.call("total", np.ones(9000, "u1"), np.ones(30_000, "u1"), scale=2) == 78_000
    assert [array[0] for array in client.call("make", 20, 20_000)] == list(range(20))


values = st.recursive(
    st.none()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=20)
    | st.builds(lambda n, b: bytes([b]) * n, st.integers(0, 60_000), st.integers(0, 255))
    | st.builds(lambda n, b: memoryview(bytes([b]) * n), st.integers(LARGE, 60_000), st.just(7))
    | st.builds(lambda n, d: np.arange(n).astype(d), st.integers(0, 9000), st.sampled_from("fdiBh"))
    | st.builds(lambda n: np.ones((n, 40), order="F"), st.integers(0, 90)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(values)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value(client, value):
    assert same(value, client.call("echo", value))


def test_values_of_a_failing_call(client):
    with pytest.raises(shmrpc.RemoteError, match="50000"):
        client.call("fail", b"x" * 50_000)
    with pytest.raises(TypeError, match="argument 2"):
        client.call("add", np.ones(50_000), object())
    with pytest.raises(TypeError, match="objects"):
        client.call("echo", np.array([object()]))
    assert client.call("add", 1, 2) == 3


def test_notifications(client):
    before = client.call("kept_sums")
    for number in range(20):
        client.notify("keep", np.full(50_000, number, "u1"))
    # Several threads run them.
    expected = sorted(before + [50_000 * number for number in range(20)])
    wait_until(lambda: sorted(client.call("kept_sums")) == expected)
    client.call("drop", len(expected))


def test_calls_from_the_server(common, transport, connect):
    client = connect(common.addresses[TRANSPORTS.index(transport)])

    @client.method
    def double(array):
        return array * 2

    assert client.call("call_back", np.ones(100_000)).sum() == 200_000


# ---- streams ----


def test_streams(client):
    for number, array in enumerate(client.stream("stream", 40, 300_000)):
        assert array[0] == array[-1] == number
        assert len(array) == 300_000
    with client.open("sums") as call:
        for number in range(40):
            call.send(np.full(100_000, number, "u1"))
        call.close_send()
        assert list(call) == [100_000 * number for number in range(40)]
    with client.open("echoes") as call:
        for size in (10, LARGE, 200_000):
            call.send(np.ones(size, "u1"))
            assert len(next(call)) == size


def test_streams_of_small_and_large_items(client):
    sizes = [10, 200_000, 20, 30, LARGE, 40] * 20
    with client.open("echoes") as call:

        def send():
            for size in sizes:
                call.send(np.ones(size, "u1"))
            call.close_send()

        sender = threading.Thread(target=send)
        sender.start()
        assert [len(item) for item in call] == sizes
        sender.join()


def test_a_slow_reader_bounds_what_is_under_way(shm_client):
    with shm_client.stream("stream", 1000, MIB) as items:
        next(items)
        time.sleep(0.1)
        # A window of 256 KiB, where blocks count for a 32nd, and one that may exceed it.
        assert shm_client.call("stats")["lent_bytes"] <= 10 * MIB
        for _ in range(50):
            next(items)
    wait_until(settled(shm_client))


# ---- what is held, and what goes back ----


def test_blocks_go_back(shm_client):
    for number in range(30):
        result = shm_client.call("echo", np.full(MIB + number, number % 250, "u1"))
        assert result[0] == number % 250
    stats = shm_client.stats()
    assert stats["pinned_blocks"] == 1
    assert stats["arena_bytes"] <= 8 * MIB  # the same memory over and over
    del result
    wait_until(settled(shm_client))


def test_views_pin_their_blocks(shm_client):
    held = [shm_client.call("add", np.full(100_000, number, "u1"), 0) for number in range(20)]
    assert shm_client.stats()["pinned_blocks"] == 20
    assert shm_client.stats()["pinned_bytes"] == 2_000_000
    theirs = shm_client.call("stats")
    assert theirs["lent_blocks"] == 20
    parts = [array[10:20] for array in held]
    del held
    gc.collect()
    assert shm_client.stats()["pinned_blocks"] == 20  # parts hold them as well
    assert [int(part[0]) for part in parts] == list(range(20))
    del parts[::2]
    assert shm_client.stats()["pinned_blocks"] == 10
    del parts
    wait_until(settled(shm_client))


def test_others_pin_what_they_wrap(shm_client):
    """By the buffer protocol, and by DLPack as torch and others use it."""
    for wrap in (np.from_dlpack, lambda a: a.__dlpack__(max_version=(1, 0)), memoryview):
        array = shm_client.call("echo", np.arange(50_000, dtype="f4").reshape(50, 1000))
        with pytest.raises(BufferError):
            array.__dlpack__()  # before version 1.0 nobody could say that it is read-only
        wrapped = wrap(array)
        if isinstance(wrapped, np.ndarray):
            assert np.shares_memory(wrapped, array)
            assert not wrapped.flags.writeable
        del array
        gc.collect()
        assert shm_client.stats()["pinned_blocks"] == 1
        del wrapped
        wait_until(settled(shm_client))


def test_what_comes_back_is_not_copied(shm_client):
    sent = np.arange(100_000, dtype="u2")
    whole = shm_client.call("echo", sent)
    assert np.array_equal(whole, sent)
    assert not whole.flags.writeable
    stats = shm_client.stats()
    assert stats["returned_blocks"] == stats["pinned_blocks"] == 1
    assert 200_000 <= stats["arena_used_bytes"] < 201_000
    theirs = shm_client.call("stats")
    assert theirs["arena_bytes"] == 0
    again = shm_client.call("echo", whole[10:90_000])  # which is in the block still
    assert np.array_equal(again, sent[10:90_000])
    assert shm_client.stats()["arena_used_bytes"] == stats["arena_used_bytes"]
    del whole
    assert np.array_equal(again, sent[10:90_000])
    del again
    wait_until(settled(shm_client))


def test_what_came_can_be_sent_back(shm_client):
    made = shm_client.call("make", 2, 100_000)
    assert shm_client.call("total", *made) == 100_000
    assert shm_client.call("total", made[1][:50_000], made[0], made[1]) == 150_000
    assert shm_client.stats()["arena_bytes"] == 0  # nothing was copied
    back = shm_client.call("echo", made)
    assert [int(array.sum()) for array in back] == [0, 100_000]
    del made
    assert [int(array.sum()) for array in back] == [0, 100_000]
    del back
    wait_until(settled(shm_client))


def test_what_came_back_outlives_the_client(large, connect):
    client = connect(large("shm").address)
    array = client.call("echo", np.full(MIB, 7, "u1"))
    client.close()
    assert array.sum() == 7 * MIB


def test_bytes_pin_nothing(shm_client):
    held = [shm_client.call("echo", b"x" * 100_000) for _ in range(5)]
    assert shm_client.stats()["pinned_blocks"] == 0
    assert all(value == b"x" * 100_000 for value in held)


def test_the_server_holds_what_it_keeps(shm_client):
    shm_client.call("keep", np.full(100_000, 3, "u1"))
    stats = shm_client.stats()
    assert stats["lent_blocks"] == 1
    assert 100_000 <= stats["lent_bytes"] < 101_000
    shm_client.call("drop")
    wait_until(settled(shm_client))


def test_what_nobody_waits_for_goes_back(shm_client):
    with pytest.raises(shmrpc.DeadlineExceeded):
        shm_client.call("echo", np.ones(MIB), timeout=0)
    future = shm_client.submit("echo", np.ones(MIB))
    future.cancel()
    with shm_client.stream("stream", 100, 100_000) as items:
        next(items)
    shm_client.submit("echo", np.ones(MIB)).result()
    wait_until(settled(shm_client))


def test_idle_memory_goes_back_to_the_system(large, connect, monkeypatch):
    """Also when nobody calls, and so nobody but a thread in the background reads."""
    monkeypatch.setattr(tending, "QUIET", 0.1)
    client = connect(large("shm", env={"QUIET": "0.1"}).address)
    for _ in range(2):
        assert client.call("add", np.ones(4 * MIB, "u1"), 0).sum() == 4 * MIB
        assert client.stats()["arena_bytes"] >= 4 * MIB
        assert client.stats()["peer_arena_bytes"] >= 4 * MIB
        wait_until(lambda: not arenas(client))


def test_an_idle_server_learns_what_came_back(directory, connect, monkeypatch):
    """Returns ring no bell, and nobody calls any more."""
    monkeypatch.setattr(tending, "QUIET", 0.1)
    server = shmrpc.Server("idle")
    server.method(lambda: np.ones(4 * MIB, "u1"), name="make")
    with server:
        client = connect("idle")
        held = client.call("make")
        wait_until(lambda: server.stats()["sleeps"] > 0 and server.stats()["lent_blocks"] == 1)
        sleeps = server.stats()["sleeps"]
        wait_until(lambda: server.stats()["sleeps"] > sleeps)  # it has looked in vain meanwhile
        del held
        wait_until(lambda: server.stats()["arena_bytes"] == 0)


def arenas(client):
    stats = client.stats()
    return stats["arena_bytes"] + stats["peer_arena_bytes"]


def test_many_values_that_die_at_once_go_back(large, connect, monkeypatch):
    """Their returns don't fit into the ring, and then the client makes no more calls."""
    monkeypatch.setattr(tending, "QUIET", 0.1)
    running = large("shm")
    client, other = connect(running.address), connect(running.address)
    received = list(client.stream("stream", 3000, 20_000))
    assert other.call("stats")["lent_blocks"] == 3000
    running.pause()
    received.clear()
    assert client.stats()["pinned_blocks"] == 0
    assert client.stats()["outbox_bytes"] > 0
    running.resume()
    wait_until(lambda: other.call("stats")["lent_blocks"] == 0)


def test_descriptors_do_not_grow(shm_client):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    held = [shm_client.call("echo", np.ones(2 * MIB, "u1")) for _ in range(10)]
    assert descriptors() == before
    del held


def test_threads(client):
    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(25):
            array = rng.integers(0, 255, int(rng.integers(10, 200_000)), "u1")
            assert same(array, client.call("echo", array))
        return number

    assert in_threads(6, work) == list(range(6))


def test_many_futures(client):
    arrays = [np.full(30_000 + number, number, "u1") for number in range(60)]
    futures = [client.submit("echo", array) for array in arrays]
    for array, future in zip(arrays, futures, strict=True):
        assert same(array, future.result(20))
    future = client.submit("echo", arrays[0])
    assert concurrent.futures.wait([future], timeout=20).done == {future}


# ---- ends ----


def test_views_outlive_the_client(large, connect):
    running = large("shm")
    client = connect(running.address)
    array = client.call("echo", np.arange(50_000))
    client.close()
    del client
    gc.collect()
    assert array.sum() == sum(range(50_000))
    running.kill()
    assert array[49_999] == 49_999


def test_views_outlive_a_killed_server(large, connect):
    running = large("shm")
    client = connect(running.address)
    arrays = [client.call("echo", np.full(MIB, number, "u1")) for number in range(5)]
    future = client.submit("keep", np.ones(MIB))
    future.result()
    running.kill()
    with pytest.raises((shmrpc.ConnectionLost, shmrpc.ConnectError)):
        client.call("echo", np.ones(MIB), timeout=1)
    gc.collect()
    assert [int(array.sum()) for array in arrays] == [MIB * number for number in range(5)]


def test_views_outlive_a_killed_client(large, connect):
    running = large("shm")
    watcher = connect(running.address)
    child = os.fork()
    if child == 0:
        try:
            with shmrpc.connect(running.address) as client:
                client.call("keep", np.full(MIB, 3, "u1"))
                os.kill(os.getpid(), 9)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    wait_until(lambda: watcher.call("stats")["conns"] == 1)
    assert watcher.call("kept_sums") == [3 * MIB]
    watcher.call("drop")


def test_a_forked_child_reads_and_returns_nothing(shm_client):
    array = shm_client.call("add", np.full(MIB, 5, "u1"), 0)
    child = os.fork()
    if child == 0:
        good = array.sum() == 5 * MIB
        del array
        gc.collect()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shm_client.call("stats")["lent_blocks"] == 1
    assert array.sum() == 5 * MIB
    del array
    wait_until(settled(shm_client))


def test_reconnecting(large, connect):
    first = large("shm")
    client = connect(first.address)
    array = client.call("echo", np.ones(MIB))
    address = first.address
    first.stop()
    large(address)
    assert client.call("echo", array).sum() == MIB  # of the old server's memory, copied
    assert client.stats()["pinned_blocks"] == 0


# ---- limits ----


def test_longer_than_the_peer_accepts(large, connect, transport):
    client = connect(large(transport, max_message_bytes=MIB).address)
    with pytest.raises(shmrpc.MessageTooLarge, match="1048576"):
        client.call("echo", np.ones(MIB, "u1"))
    with client.open("sums") as call:
        with pytest.raises(shmrpc.MessageTooLarge):
            call.send(np.ones(MIB, "u1"))
        call.send(np.ones(MIB // 2, "u1"))
        assert next(call) == MIB // 2
    assert client.call("echo", np.ones(MIB - 200, "u1")).sum() == MIB - 200


def test_longer_than_we_accept(common, transport, connect):
    client = connect(common.addresses[TRANSPORTS.index(transport)], max_message_bytes=MIB)
    with pytest.raises(shmrpc.MessageTooLarge):
        client.call("make", 2, MIB)
    assert len(client.call("make", 2, MIB // 4)) == 2
    wait_until(settled(client))


@pytest.mark.parametrize("ours", [True, False])
def test_no_shared_memory_at_all(large, connect, ours):
    """What does not fit goes with the message, in pieces."""
    none = {"max_memory_bytes": 0}
    client = connect(large("shm", **({} if ours else none)).address, **(none if ours else {}))
    array = client.call("echo", np.arange(MIB))
    assert array.sum() == sum(range(MIB))
    assert client.stats()["arena_bytes"] == 0
    assert client.stats()["peer_arena_bytes"] == 0


def test_a_value_larger_than_all_shared_memory(large, connect):
    client = connect(large("shm").address, max_memory_bytes=MIB)
    assert client.call("echo", np.ones(3 * MIB, "u1")).sum() == 3 * MIB
    assert client.call("echo", np.ones(MIB // 2, "u1")).sum() == MIB // 2
    assert 0 < client.stats()["arena_bytes"] <= MIB


def test_waits_until_the_deadline_and_says_who_holds_it(large, connect):
    running = large("shm")
    client = connect(running.address, max_memory_bytes=4 * MIB)
    for _ in range(3):
        client.call("keep", np.ones(MIB, "u1"))
    with pytest.raises(shmrpc.DeadlineExceeded) as raised:
        client.call("keep", np.ones(2 * MIB, "u1"), timeout=0.3)
    text = str(raised.value)
    assert "3 blocks of 3145728 bytes" in text
    assert "max_memory_bytes" in text
    assert f"pid {running.pid}" in text
    assert client.call("add", 1, 2) == 3  # what needs no room goes on
    client.call("drop_later", 0.2)
    client.call("keep", np.ones(2 * MIB, "u1"), timeout=20)  # woken by what comes back


def test_without_a_deadline_it_does_not_wait_for_ever(large, connect, monkeypatch):
    monkeypatch.setattr(lending, "PATIENCE", 0.3)
    client = connect(large("shm").address, max_memory_bytes=4 * MIB)
    for _ in range(3):
        client.call("keep", np.ones(MIB, "u1"))
    with pytest.raises(shmrpc.Overloaded, match="3 blocks of 3145728 bytes"):
        client.call("keep", np.ones(2 * MIB, "u1"))
    with client.open("sums") as call, pytest.raises(shmrpc.Overloaded, match="a message"):
        call.send(np.ones(2 * MIB, "u1"))
    client.call("drop", 3)
    assert client.call("echo", np.ones(2 * MIB, "u1")).sum() == 2 * MIB


def test_a_server_without_room_for_its_result(directory, connect, monkeypatch):
    monkeypatch.setattr(lending, "PATIENCE", 0.3)
    server = shmrpc.Server("here", max_memory_bytes=4 * MIB)

    @server.method
    def make(count, size):
        return [np.ones(size, "u1") for _ in range(count)]

    @server.method
    def stream(size):
        yield np.ones(size, "u1")

    with server:
        client = connect("here")
        held = client.call("make", 3, MIB)
        with pytest.raises(shmrpc.RemoteError, match="3 blocks of 3145728 bytes") as raised:
            client.call("make", 1, 2 * MIB)
        assert raised.value.code == "RESOURCE_EXHAUSTED"
        with pytest.raises(shmrpc.RemoteError, match="an item of 'stream' needs a block"):
            next(client.stream("stream", 2 * MIB))
        del held
        assert client.call("make", 1, 2 * MIB)[0].size == 2 * MIB
        client.close()


def test_a_flood_of_notifications_waits_for_the_server(large, connect):
    client = connect(large("shm", workers=1).address, max_memory_bytes=8 * MIB)
    for _ in range(200):
        client.notify("add", memoryview(b"x" * MIB), 1)
    assert client.call("add", 1, 2) == 3
    assert client.stats()["arena_bytes"] <= 8 * MIB
    wait_until(settled(client))


# ---- loans ----


def test_loans_are_sent_without_a_copy(shm_client):
    array = shm_client.empty((1000, 100), "f4")
    assert array.shape == (1000, 100)
    assert array.dtype == np.float32
    array[:] = 3
    used = shm_client.stats()["arena_used_bytes"]
    assert used >= array.nbytes
    shm_client.call("keep", array)
    assert shm_client.stats()["arena_used_bytes"] == used
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    shm_client.call("keep", array)  # again: the same block
    shm_client.call("keep", array[500:])  # and a part of it
    assert shm_client.stats()["arena_used_bytes"] == used
    assert shm_client.call("kept_sums") == [300_000, 300_000, 150_000]
    del array
    gc.collect()
    stats = shm_client.stats()
    assert (stats["loans"], stats["arena_used_bytes"]) == (0, used)  # the server has it still
    shm_client.call("drop", 2)
    assert shm_client.call("kept_sums") == [150_000]
    shm_client.call("drop")
    wait_until(settled(shm_client))


def test_loaned_bytes(shm_client):
    view = shm_client.loan(200_000)
    assert len(view) == 200_000
    assert not view.readonly
    view[:] = b"ab" * 100_000
    used = shm_client.stats()["arena_used_bytes"]
    shm_client.notify("keep", np.frombuffer(view, "u1"))
    assert shm_client.call("echo", view[50_000:]) == view[50_000:]
    assert shm_client.stats()["arena_used_bytes"] == used
    wait_until(lambda: shm_client.call("kept_sums") != [])  # or dropping could overtake it
    shm_client.call("drop")
    view.release()
    wait_until(settled(shm_client))


def test_a_loan_that_is_never_sent_goes_back(shm_client):
    for _ in range(50):
        shm_client.empty(10 * MIB, "u1")
        shm_client.loan(10 * MIB)
    assert shm_client.stats()["arena_bytes"] <= 64 * MIB
    assert shm_client.stats()["loans"] == 0


def test_loans_over_every_transport(client):
    array = client.empty(50_000, "i4")
    array[:] = np.arange(50_000)
    assert same(array, client.call("echo", array))
    view = client.loan(50_000)
    view[:] = bytes(50_000)
    assert client.call("echo", view) == bytes(50_000)
    for shape in (0, (3, 0)):
        assert client.empty(shape).size == 0
    assert client.empty(()).shape == ()
    assert len(client.loan(0)) == 0
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="number of bytes"):
            client.loan(wrong)
    with pytest.raises(ValueError, match="negative"):
        client.empty((3, -1))
    with pytest.raises(TypeError, match="objects"):
        client.empty(3, object)


def test_loans_outlive_their_client(large, connect):
    client = connect(large("shm").address)
    array, view = client.empty(100_000, "u1"), client.loan(100_000)
    array[:] = 7
    client.close()
    view[:] = array.data
    assert view == b"\7" * 100_000
    with pytest.raises(shmrpc.Cancelled):
        client.empty(3)


def test_a_loan_of_another_connection_is_copied(large, connect, common):
    first, second = connect(large("shm").address), connect(common.addresses[0])
    array = first.empty(100_000, "u1")
    array[:] = 9
    assert second.call("total", array) == 900_000
    array[:] = 1  # it was not sent by its own client
    first.close()
    assert second.call("total", array) == 100_000


def test_loans_in_handlers(directory, connect):
    server = shmrpc.Server("here")
    held = []

    @server.method
    def fill(count, number):
        array = shmrpc.current_call().empty(count, "u1")
        array[:] = number
        held.append(array)
        return array

    @server.method
    def stream(count):
        for number in range(count):
            view = shmrpc.current_call().loan(100_000)
            view[:] = bytes([number]) * 100_000
            yield view

    with server:
        client = connect("here")
        result = client.call("fill", 100_000, 5)
        assert result.sum() == 500_000
        assert not held[0].flags.writeable
        assert server.stats()["arena_used_bytes"] < 101_000  # one block for both
        for number, item in enumerate(client.stream("stream", 10)):
            assert item == bytes([number]) * 100_000
        client.close()


def test_loans_wait_for_room_and_say_who_has_it(large, connect, monkeypatch):
    monkeypatch.setattr(lending, "PATIENCE", 0.2)
    client = connect(large("shm").address, max_memory_bytes=4 * MIB)
    first = client.loan(3 * MIB)
    with pytest.raises(shmrpc.Overloaded, match="3145728 bytes are loans of this process"):
        client.loan(2 * MIB)
    first.release()
    assert len(client.loan(2 * MIB)) == 2 * MIB
