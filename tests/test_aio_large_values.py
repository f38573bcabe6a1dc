"""Large values under asyncio, by each transport, on both loops: tasks wait, the loop does not."""

import asyncio
import contextlib
import gc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import TRANSPORTS, Service, address_of, short_directory

import shmrpc
from shmrpc import aio, tending

PROGRAM = Path(__file__).with_name("async_large_services.py")
MIB = 1 << 20


@pytest.fixture(scope="module")
def common():
    """One server at all three transports, for tests that leave it as it was."""
    with short_directory() as path:
        running = Service(
            *(address_of(transport, path) for transport in TRANSPORTS), program=PROGRAM
        )
        yield running
        assert running.process.poll() is None, "the server died"
        running.close()


@pytest.fixture
def address(common, transport):
    return common.addresses[TRANSPORTS.index(transport)]


@pytest.fixture
def small(directory):
    """Start a server of this process's loop, with 2 MiB of shared memory for values."""

    @contextlib.asynccontextmanager
    async def start(**options):
        server = aio.Server("small", **{"max_memory_bytes": 2 * MIB, **options})
        server.held = []
        server.may_end = asyncio.Event()

        @server.method
        async def hold(value):
            server.held.append(int(value[0]))
            await server.may_end.wait()
            return len(value)

        @server.method
        async def make(size):
            return np.ones(size, "u1")

        @server.method(inline=True)
        def make_inline(size):
            return np.ones(size, "u1")

        @server.method
        async def items(count, size):
            for number in range(count):
                yield np.full(size, number, "u1")

        async with server:
            yield server

    return start


async def until(condition, what, seconds=10):
    """Let the loop run until it is true."""
    for _ in range(seconds * 200):
        if condition():
            return
        gc.collect()
        await asyncio.sleep(0.005)
    pytest.fail(f"{what} did not come true")


async def settled(client):
    """Nothing that was sent is held any more."""
    for _ in range(2000):
        gc.collect()
        stats = await client.stats()
        if not stats["lent_blocks"] and not stats["pinned_blocks"]:
            return
        await client.ping()
        await asyncio.sleep(0.005)
    pytest.fail(f"blocks are left: {stats}")


# ---- what arrives ----


@pytest.mark.parametrize("size", [100, 50_000])
def test_views_with_gaps_are_copied(run, address, size):
    view, data = memoryview(b"ab" * size)[::2], b"a" * size

    async def main():
        async with aio.connect(address) as client:
            assert await client.call("echo", view) == data
            assert await client.call("echo", value=[view]) == [data]
            assert await client.call("gaps", size) == data
            assert await client.call("gaps_inline", size) == data
            assert [item async for item in client.stream("gaps_streamed", size, size)] == [data] * 2
            async with client.open("doubled") as call:
                await call.send([view])
                assert await anext(call) == [data] * 2

    run(main)


@pytest.mark.parametrize("method", ["echo", "inline", "plain"])
def test_values_arrive(run, address, method):
    async def main():
        async with aio.connect(address) as client:
            array = np.arange(300_000).reshape(300, 1000)
            table = pa.table({"n": range(50_000), "s": ["text"] * 50_000})
            value = [array, {"deep": (array.T, b"b" * 20_000)}, memoryview(b"m" * 20_000), 7]
            same, nested, view, number = await client.call(method, value)
            np.testing.assert_array_equal(same, array)
            np.testing.assert_array_equal(nested["deep"][0], array.T)
            assert nested["deep"][1] == b"b" * 20_000
            assert (view.readonly, bytes(view), number) == (True, b"m" * 20_000, 7)
            assert not same.flags.writeable
            assert (await client.call(method, value=table)).equals(table)
            del same, nested, view
            await settled(client)

    run(main)


def test_many_at_once(run, address):
    async def main():
        async with aio.connect(address) as client:
            calls = [client.call("echo", np.full(30_000 + n, n)) for n in range(100)]
            for n, array in enumerate(await asyncio.gather(*calls)):
                assert (array.size, array[0], array[-1]) == (30_000 + n, n, n)
            del calls, array
            await settled(client)

    run(main)


def test_streams(run, address):
    async def main():
        async with aio.connect(address) as client:
            for method in ("items", "plain_items"):
                count = 0
                async for item in client.stream(method, 40, 100_000):
                    assert (item.size, item[0], item[-1]) == (100_000, count, count)
                    count += 1
                assert count == 40
            for method in ("total", "plain_total"):
                async with client.open(method) as call:
                    for n in range(40):
                        await call.send(np.full(100_000, n % 5, "u1"))
                    assert await call.result() == 40 * 2 * 100_000
            async with client.open("doubled") as call:
                for n in range(10):
                    await call.send(np.full(20_000, n))
                    assert (await call.__anext__()).sum() == 2 * n * 20_000
                    await call.send(n)  # small ones among them
                    assert await call.__anext__() == 2 * n
            del item
            await settled(client)

    run(main)


def test_a_stream_that_is_left_early_leaves_nothing(run, address):
    async def main():
        async with aio.connect(address) as client:
            async for item in client.stream("items", 1000, 100_000):
                assert item[0] == 0
                break
            del item
            await settled(client)

    run(main)


def test_notifications_and_calls_from_the_server(run, address):
    async def main():
        async with aio.connect(address) as client:

            @client.method
            async def double(array):
                return 2 * array

            assert (await client.call("call_back", "double", np.ones(50_000))).sum() == 100_000
            await client.notify("remember", np.arange(50_000))
            assert await client.call("recall") == 50_000 * 49_999 // 2

    run(main)


def test_what_can_not_be_sent(run, address):
    async def main():
        async with aio.connect(address) as client:
            with pytest.raises(TypeError, match=r"argument 2 of 'echo'.*dtype object"):
                await client.call("echo", np.zeros(9000), np.array([object()]))
            with pytest.raises(TypeError, match="dtype object"):
                async with client.open("total") as call:
                    await call.send(np.array([object()]))
            with pytest.raises(shmrpc.RemoteError, match="dtype object"):
                await client.call("objects")
            assert (await client.call("echo", np.ones(9000))).sum() == 9000
            await settled(client)

    run(main)


# ---- how long it lives ----


def test_views_outlive_the_client_and_a_killed_server(run, service):
    async def main():
        server = service("shm", program=PROGRAM)
        client = await aio.connect(server.address)
        first = await client.call("echo", np.arange(100_000))
        second = await client.call("echo", np.arange(100_000) * 2)
        server.kill()
        with pytest.raises((shmrpc.ConnectionLost, shmrpc.ConnectError)):
            await client.call("echo", np.arange(100_000), timeout=1)
        assert (first * 2 == second).all()
        await client.close()
        del client
        gc.collect()
        assert first.sum() == 100_000 * 99_999 // 2

    run(main)


# ---- no room ----


def test_a_task_waits_for_room_and_the_loop_goes_on(run, small):
    async def main():
        async with small() as server, aio.connect("small", max_memory_bytes=2 * MIB) as client:
            calls = [
                asyncio.create_task(client.call("hold", np.full(600_000, n, "u1")))
                for n in range(6)
            ]
            await until(lambda: len(server.held) >= 2, "two handlers")
            await client.ping()  # the loop goes on, and so does the connection
            assert len(server.held) < 6
            server.may_end.set()
            assert await asyncio.wait_for(asyncio.gather(*calls), 20) == [600_000] * 6
            assert sorted(server.held) == list(range(6))
            await settled(client)

    run(main)


def test_waiting_ends_at_the_deadline_and_says_who_holds_it(run, small):
    async def main():
        async with small() as server, aio.connect("small", max_memory_bytes=2 * MIB) as client:
            held = [
                asyncio.create_task(client.call("hold", np.ones(1_000_000, "u1"))) for _ in range(2)
            ]
            await until(lambda: server.held, "a handler")
            with pytest.raises(shmrpc.DeadlineExceeded, match=r"\d+ blocks of \d+ bytes"):
                await client.call("hold", np.ones(1_900_000, "u1"), timeout=0.2)
            with pytest.raises(shmrpc.DeadlineExceeded, match="max_memory_bytes"):
                await client.notify("hold", np.ones(1_900_000, "u1"), timeout=0.2)
            assert await client.call("shmrpc.describe", "hold") is not None
            server.may_end.set()
            await asyncio.gather(*held)
            assert await client.call("hold", np.ones(1_900_000, "u1")) == 1_900_000
            await settled(client)

    run(main)


def test_cancelling_a_task_that_waits_for_room_leaves_nothing(run, small):
    async def main():
        async with small() as server, aio.connect("small", max_memory_bytes=2 * MIB) as client:
            held = asyncio.create_task(client.call("hold", np.ones(1_500_000, "u1")))
            await until(lambda: server.held, "a handler")
            waiting = [
                asyncio.create_task(client.call("hold", np.ones(1_500_000, "u1"))) for _ in range(5)
            ]
            await asyncio.sleep(0.05)
            for task in waiting:
                task.cancel()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends)
            server.may_end.set()
            assert await held == 1_500_000
            assert len(server.held) == 1
            assert await client.call("hold", np.ones(1_500_000, "u1")) == 1_500_000
            await settled(client)

    run(main)


@pytest.mark.parametrize("method", ["make", "make_inline"])
def test_a_result_waits_until_the_client_lets_go(run, small, method):
    async def main():
        async with small(), aio.connect("small", max_memory_bytes=2 * MIB) as client:
            first = await client.call(method, 1_500_000)
            second = asyncio.create_task(client.call(method, 1_500_000, timeout=30))
            await client.ping()
            assert not second.done()
            del first
            gc.collect()
            assert (await second).sum() == 1_500_000
            del second
            await settled(client)

    run(main)


def test_items_wait_until_the_client_lets_go(run, small):
    async def main():
        async with small(), aio.connect("small", max_memory_bytes=2 * MIB) as client:
            kept, count = [], 0
            async for item in client.stream("items", 50, 500_000):
                kept = [*kept[-1:], item]
                count += 1
            assert (count, int(kept[-1][0])) == (50, 49)
            del kept, item
            await settled(client)

    run(main)


def test_closing_the_client_ends_the_wait(run, small):
    async def main():
        async with small() as server:
            client = await aio.connect("small", max_memory_bytes=2 * MIB)
            calls = [
                asyncio.create_task(client.call("hold", np.ones(1_500_000, "u1"))) for _ in range(3)
            ]
            await until(lambda: server.held, "a handler")
            await client.close()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(end, shmrpc.Error) for end in ends), ends

    run(main)


# ---- loans ----


def test_loans_are_sent_as_they_are(run, address):
    async def main():
        async with aio.connect(address) as client:
            array = await client.empty((300, 200), "int32")
            array[:] = 5
            assert (await client.call("echo", array)).sum() == 5 * 60_000
            # The same memory again, and a part of it.
            assert (await client.call("echo", [array, array[100:]]))[1].sum() == 5 * 40_000
            view = await client.loan(50_000)
            view[:] = b"v" * 50_000
            assert bytes(await client.call("echo", view)) == b"v" * 50_000
            for method in ("lent", "lent_inline", "lent_on_thread"):
                result = await client.call(method, 70_000)
                assert (result.size, result.min(), result.flags.writeable) == (70_000, 9, False)
            async for item in client.stream("lent_items", 20, 70_000):
                assert item.sum() == 9 * 70_000
            del array, view, result, item
            await settled(client)
            assert not (await client.stats())["loans"]

    run(main)


def test_a_loan_waits_for_room_too(run, small, monkeypatch):
    monkeypatch.setattr(tending, "QUIET", 1000)  # so that who frees it is the one who tells

    async def main():
        async with small(), aio.connect("small", max_memory_bytes=2 * MIB) as client:
            first = await client.empty(1_500_000, "u1")
            with pytest.raises(shmrpc.DeadlineExceeded, match="loans of this process"):
                await client.empty(1_500_000, "u1", timeout=0.1)
            second = asyncio.create_task(client.empty(1_500_000, "u1", timeout=30))
            await client.ping()
            assert not second.done()
            del first
            gc.collect()
            assert (await second).size == 1_500_000
            with pytest.raises(TypeError, match="Python objects"):
                await client.empty(5, object)
            with pytest.raises(ValueError, match="number of bytes"):
                await client.loan(-1)
            assert (await client.empty((0, 5))).shape == (0, 5)
            assert len(await client.loan(0)) == 0
            # More than there ever is: ordinary memory, copied when it is sent.
            assert (await client.empty(5_000_000, "u1")).flags.writeable

    run(main)
