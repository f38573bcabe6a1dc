"""``connect(connections=N)``: several connections as one client."""

import asyncio
import collections
import contextlib
import gc
import os
import threading

import pytest
from conftest import TRANSPORTS, address_of, in_threads, wait_until

import shmrpc
from shmrpc import aio


class Served:
    """A server in this process that says which connection a call came by."""

    def __init__(self, address):
        self.server = shmrpc.Server(address)
        self.release = threading.Event()
        self.held = threading.Semaphore(0)
        for function in (self.who, self.hold, self.count, self.note, self.fail, self.ask):
            self.server.method(function)
        self.server.method(self.echo, requests=True)
        self.noted = []

    @property
    def address(self):
        return self.server.addresses[0]

    def who(self):
        return shmrpc.current_call().conn_id

    def hold(self):
        self.held.release()
        self.release.wait()
        return self.who()

    def count(self, n):
        for _ in range(n):
            yield self.who()

    def echo(self, requests):
        for _ in requests:
            yield self.who()

    def note(self, what):
        self.noted.append(what)

    def fail(self):
        raise LookupError("no")

    def ask(self):
        return shmrpc.current_call().caller.call("answer")


@pytest.fixture
def served(directory, transport):
    made = Served(address_of(transport, directory))
    with made.server:
        yield made
        made.release.set()


@pytest.fixture
def only_shm(directory):
    made = Served(address_of("shm", directory))
    with made.server:
        yield made
        made.release.set()


def loads(pool):
    return [len(lane.calls) for lane in pool._lanes]


def test_calls_at_the_same_time_spread_and_others_do_not(served):
    with shmrpc.connect(served.address, connections=3) as pool:
        assert len({pool.call("who") for _ in range(10)}) == 1
        calls = [pool.submit("hold") for _ in range(6)]
        for _ in calls:
            assert served.held.acquire(timeout=20)
        assert loads(pool) == [2, 2, 2]
        served.release.set()
        assert sorted(collections.Counter(call.result(20) for call in calls).values()) == [2, 2, 2]
        wait_until(lambda: loads(pool) == [0, 0, 0])
        assert "3 connections" in repr(pool)
    assert pool.closed
    with pytest.raises(shmrpc.Cancelled, match="closed"):
        pool.call("who")
    pool.close()


def test_every_kind_of_call_counts_until_its_end(only_shm):
    with shmrpc.connect(only_shm.address, connections=2) as pool:
        stream = pool.stream("count", 2)
        assert loads(pool) == [1, 0]
        other = pool.open("echo")
        assert loads(pool) == [1, 1]
        other.send(1)
        assert next(other) != next(stream)
        other.close()
        assert loads(pool) == [1, 0]
        assert len(list(stream)) == 1
        assert loads(pool) == [0, 0]
        pool.stream("count", 100_000)  # dropped at once
        gc.collect()
        assert loads(pool) == [0, 0]
        pool.notify("note", 1)
        wait_until(lambda: only_shm.noted == [1])
        assert pool.ping() > 0
        for failing in (
            lambda: pool.call("fail"),
            lambda: pool.call("no such"),
            lambda: pool.call("who", object()),
            lambda: pool.submit("who", object()),
            lambda: pool.notify("who", object()),
            lambda: pool.stream(""),
            lambda: list(pool.stream("fail")),
            lambda: pool.submit("fail").result(20),
        ):
            with pytest.raises((shmrpc.Error, TypeError, ValueError)):
                failing()
            assert loads(pool) == [0, 0]


def test_the_rest_of_a_client(only_shm):
    with shmrpc.connect(only_shm.address, connections=2) as pool:
        assert pool.proxy().who() == pool.call("who")

        @pool.method
        def answer():
            return "from the pool"

        assert pool.call("ask") == "from the pool"
        assert pool.submit("ask").result(20) == "from the pool"
        assert pool.stats()["reconnects"] == 0
        assert pool.stats()["frames_received"] > 0


def test_many_threads(only_shm):
    with shmrpc.connect(only_shm.address, connections=3) as pool:
        in_threads(6, lambda _: [pool.call("who") for _ in range(200)])
        assert loads(pool) == [0, 0, 0]


def test_with_interceptors_and_retries(only_shm):
    seen = []

    class Watching:
        def intercept(self, call, proceed):
            seen.append(call.method)
            return proceed(call)

    with shmrpc.connect(
        only_shm.address, connections=2, interceptors=[Watching()], retries=2
    ) as pool:
        pool.call("who")
        pool.submit("who").result(20)
        assert len(list(pool.stream("count", 2))) == 2
        wait_until(lambda: loads(pool) == [0, 0])
    assert seen == ["who", "who", "count"]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_wrong_numbers(only_shm, wrong):
    with pytest.raises(ValueError, match="connections must be a number from 1 on"):
        shmrpc.connect(only_shm.address, connections=wrong)
    with pytest.raises(ValueError, match="connections must be a number from 1 on"):
        aio.connect(only_shm.address, connections=wrong)


def test_nobody_there(directory):
    with pytest.raises(shmrpc.ConnectError):
        shmrpc.connect("calc", connections=3)

    async def main():
        with pytest.raises(shmrpc.ConnectError):
            await aio.connect("calc", connections=3)

    asyncio.run(main())


def test_a_connection_that_is_lost_is_made_again(service):
    first = service("shm")
    with shmrpc.connect(first.address, connections=2, retries=5) as pool:
        assert pool.call("add", 1, 2) == 3
        first.kill()
        service(first.address)
        assert pool.call("add", 1, 2) == 3


def test_in_a_forked_child(only_shm):
    with shmrpc.connect(only_shm.address, connections=2) as pool:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                pool.call("who")
            except shmrpc.ForkedError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert pool.call("who")


# ---- asyncio ----


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_asynchronous_calls_spread(served, transport):
    async def main():
        async with aio.connect(served.address, connections=3) as pool:
            assert len({await pool.call("who") for _ in range(10)}) == 1
            tasks = [asyncio.create_task(pool.call("hold")) for _ in range(6)]
            for _ in tasks:
                assert await asyncio.to_thread(served.held.acquire, timeout=20)
            assert loads(pool) == [2, 2, 2]
            served.release.set()
            found = collections.Counter(await asyncio.gather(*tasks))
            assert sorted(found.values()) == [2, 2, 2]
            assert loads(pool) == [0, 0, 0]
        with pytest.raises(shmrpc.Cancelled, match="closed"):
            await pool.call("who")

    asyncio.run(main())


def test_asynchronous_streams_count_until_their_end(only_shm):
    async def main():
        pool = await aio.connect(only_shm.address, connections=2)
        async with pool:
            stream = pool.stream("count", 2)
            assert loads(pool) == [1, 0]
            async with pool.open("echo") as other:
                assert loads(pool) == [1, 1]
                await other.send(1)
                assert await other.__anext__() != await stream.__anext__()
            assert loads(pool) == [1, 0]
            assert len([item async for item in stream]) == 1
            assert loads(pool) == [0, 0]
            pool.stream("count", 3)  # never awaited, and dropped
            gc.collect()
            assert loads(pool) == [0, 0]
            task = asyncio.create_task(pool.call("hold"))
            assert await asyncio.to_thread(only_shm.held.acquire, timeout=20)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert loads(pool) == [0, 0]
            await pool.notify("note", 1)
            assert await pool.ping() > 0
            with pytest.raises(shmrpc.RemoteError):
                await pool.call("fail")
            with pytest.raises((shmrpc.Error, ValueError)):
                pool.stream("")
                await pool.call("")
            assert (await pool.stats())["reconnects"] == 0

            @pool.method
            async def answer():
                return "from the pool"

            assert await pool.proxy().ask() == "from the pool"
        assert loads(pool) == [0, 0]

    asyncio.run(main())
