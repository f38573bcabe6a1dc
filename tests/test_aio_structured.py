"""Timeouts, groups of tasks and cancellation: a call is as any awaitable, and leaves nothing."""

import asyncio
import contextlib
import sys

import anyio
import pytest
from conftest import address_of

import shmrpc
from shmrpc import aio

# anyio's for every Python; asyncio's own came with 3.11.
TIMEOUTS = ["anyio", "asyncio"] if hasattr(asyncio, "timeout") else ["anyio"]
GROUPS = ["anyio", "asyncio"] if hasattr(asyncio, "TaskGroup") else ["anyio"]
KINDS = ["call", "deadline", "stream", "send", "reply", "result", "ping", "empty", "nested"]


@pytest.fixture(params=["shm", "unix"])
def stage(run, directory, request):
    """Runs ``main(client, under_way)`` beside a server whose handlers wait for ever."""

    def runs(main):
        async def whole():
            under_way, server = set(), aio.Server(address_of(request.param, directory))

            @server.method
            async def add(a, b):
                return a + b

            @server.method
            async def forever(who):
                under_way.add(who)
                try:
                    await asyncio.Event().wait()
                finally:
                    under_way.discard(who)

            @server.method
            async def items(who):
                yield 0
                await forever(who)

            @server.method(requests=True)
            async def ignore(numbers, who):
                await forever(who)

            @server.method(requests=True)
            async def answer(numbers, who):
                async for number in numbers:
                    yield number
                    await forever(who)

            @server.method
            async def nested(who):
                under_way.add(who)
                try:
                    await shmrpc.current_call().caller.call("wait")
                finally:
                    under_way.discard(who)

            async with server, aio.connect(server.addresses[0]) as client:

                @client.method
                async def wait():
                    await asyncio.Event().wait()

                await main(client, under_way)
                await emptied(under_way)
                assert not client._link.session.calls
                assert await client.call("add", 1, 2) == 3
                assert server.stats()["running"] == 0

        run(whole, debug=sys.version_info >= (3, 11))

    return runs


async def emptied(under_way):
    """The handlers have ended, too."""

    async def empty():
        while under_way:
            await asyncio.sleep(0.001)

    await asyncio.wait_for(empty(), 20)


async def begun(under_way, *who):
    while not under_way.issuperset(who):
        await asyncio.sleep(0.001)


async def wait_in(client, kind, who):
    """Be in the middle of something that does not end by itself."""
    if kind == "call":
        await client.call("forever", who)
    elif kind == "deadline":
        await client.call("forever", who, timeout=60)
    elif kind == "nested":
        await client.call("nested", who)
    elif kind == "stream":
        async for item in client.stream("items", who):
            assert item == 0
    elif kind == "send":
        async with client.open("ignore", who) as call:
            while True:
                await call.send(b"x" * 4096)
    elif kind == "reply":
        async with client.open("answer", who) as call:
            await call.send(1)
            assert await call.__anext__() == 1
            await call.__anext__()
    elif kind == "result":
        async with client.open("ignore", who) as call:
            await call.result()
    elif kind == "ping":
        while True:
            await client.ping()
    else:
        kept = []
        while True:  # until the arena is full; without one each is memory of its own
            kept.append(await client.loan(8 << 20, timeout=60))
            del kept[40:]
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def timeout_of(library, seconds):
    """A block that ends with TimeoutError; says afterwards whether it did."""
    over = []
    if library == "anyio":
        with anyio.fail_after(seconds) as scope:
            try:
                yield over
            finally:
                over.append(scope.cancel_called)
    else:
        async with asyncio.timeout(seconds) as timeout:
            try:
                yield over
            finally:
                over.append(timeout.when() <= asyncio.get_running_loop().time())


@contextlib.asynccontextmanager
async def group_of(library):
    """A group of tasks: ``start(function, *arguments)``."""
    if library == "anyio":
        async with anyio.create_task_group() as group:
            yield group.start_soon
    else:
        async with asyncio.TaskGroup() as group:
            yield lambda function, *arguments: group.create_task(function(*arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_wait_for_ends_it(stage, kind):
    async def main(client, under_way):
        for _ in range(2):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(wait_in(client, kind, "it"), 0.03)
            await emptied(under_way)

    stage(main)


@pytest.mark.parametrize("library", TIMEOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_timeouts_end_it_and_nothing_around_it(stage, kind, library):
    async def main(client, under_way):
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with timeout_of(library, 0.03) as inner:
                    await wait_in(client, kind, "it")
            assert inner == [True]
            if hasattr(asyncio.Task, "cancelling"):
                assert asyncio.current_task().cancelling() == 0
            await emptied(under_way)
        async with timeout_of(library, 60) as outer:
            with pytest.raises(TimeoutError):
                async with timeout_of(library, 0.03):
                    await wait_in(client, kind, "it")
            assert await client.call("add", 1, 1) == 2
        assert outer == [False]

    stage(main)


@pytest.mark.parametrize("library", GROUPS)
def test_a_failing_task_ends_its_group(stage, library):
    async def main(client, under_way):
        async def fail():
            await begun(under_way, *(kind for kind in KINDS if kind not in ("ping", "empty")))
            await client.call("add", 1)  # which takes two

        try:
            async with group_of(library) as start:
                for kind in KINDS:
                    start(wait_in, client, kind, kind)
                start(fail)
        except BaseException as group:  # an ExceptionGroup, of a backport before 3.11
            (error,) = group.exceptions
        assert isinstance(error, shmrpc.RemoteError)
        assert error.type == "TypeError"

    stage(main)


@pytest.mark.parametrize("library", GROUPS)
def test_a_group_that_is_cancelled_ends_its_calls(stage, library):
    async def main(client, under_way):
        async def work():
            async with group_of(library) as start:
                for kind in KINDS:
                    start(wait_in, client, kind, kind)

        task = asyncio.ensure_future(work())
        await begun(under_way, "call", "stream", "send", "reply", "result", "nested")
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    stage(main)


def test_a_result_that_came_is_not_lost_to_a_cancellation_that_comes_later(stage):
    """``wait_for`` gives the result of what has ended, and so does a shield."""

    async def main(client, _under_way):
        for _ in range(50):
            call = asyncio.ensure_future(client.call("add", 1, 2))
            outer = asyncio.shield(call)
            await asyncio.sleep(0)
            outer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await outer
            assert await call == 3
            done = asyncio.ensure_future(client.call("add", 2, 2))
            await asyncio.wait([done])
            assert not done.cancel()
            assert done.result() == 4

    stage(main)


def test_cancelling_twice_and_swallowing_it(stage):
    async def main(client, under_way):
        async def stubborn():
            try:
                await client.call("forever", "first")
            except asyncio.CancelledError:
                return await client.call("add", 2, 3)  # on with the same client

        task = asyncio.ensure_future(stubborn())
        await begun(under_way, "first")
        task.cancel()
        task.cancel()
        assert await task == 5

    stage(main)
