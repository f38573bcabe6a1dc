"""Coroutine handlers run at once, and in a task of their own only if they wait: nobody can tell."""

import asyncio
import contextvars
import gc
import random
import threading
import warnings

import pytest
from conftest import wait_until

import shmrpc
from shmrpc import aio

SEEN = contextvars.ContextVar("seen", default=None)


@pytest.fixture
def pair(run, directory):
    """Runs ``main(server, client)`` with both in one loop."""
    address = f"shm://{directory}/calc.sock"

    def runs(main, **options):
        async def whole():
            server = aio.Server(address, **options)
            await server.start()
            try:
                async with aio.connect(address) as client:
                    await main(server, client)
            finally:
                await server.stop(grace=1)

        run(whole)

    return runs


def test_each_call_has_a_context_of_its_own(pair):
    async def main(server, client):
        @server.method
        async def remember(value, waits):
            before = SEEN.get()
            SEEN.set(value)
            if waits:
                await asyncio.sleep(0)
            return [before, SEEN.get(), shmrpc.current_call().method]

        chosen = random.Random(7)
        for value in range(200):
            found = await client.call("remember", value, chosen.random() < 0.3)
            assert found == [None, value, "remember"]
        many = [client.call("remember", value, value % 3 == 0) for value in range(300)]
        for value, found in enumerate(await asyncio.gather(*many)):
            assert found == [None, value, "remember"]

    pair(main)


def test_tasks_that_a_handler_starts_belong_to_its_call(pair):
    async def main(server, client):
        told = {}
        enough = asyncio.Event()

        async def later(key):
            await asyncio.sleep(0.01)
            told[key] = shmrpc.current_call().metadata
            if len(told) == 50:
                enough.set()

        kept = set()

        @server.method
        async def start(key):
            kept.add(asyncio.create_task(later(key)))

        for key in range(50):
            await client.call("start", key, metadata={"key": str(key)} if key % 2 else None)
        await asyncio.wait_for(enough.wait(), 20)
        assert told == {key: {"key": str(key)} if key % 2 else {} for key in range(50)}

    pair(main)


def test_a_handler_has_a_current_task_and_may_use_it(pair):
    async def main(server, client):
        @server.method
        async def with_timeout(seconds):
            try:
                await asyncio.wait_for(asyncio.sleep(seconds), 0.02)
            except (TimeoutError, asyncio.TimeoutError):
                return "late"
            return "in time"

        @server.method
        async def task_is_the_same():
            before = asyncio.current_task()
            assert before is not None
            await asyncio.sleep(0)
            return asyncio.current_task() is before and before in asyncio.all_tasks()

        @server.method
        async def cancels_itself(waits):
            asyncio.current_task().cancel()
            if waits:
                await asyncio.sleep(10)
            return "went on"

        for _ in range(40):
            assert await client.call("task_is_the_same")
        assert await client.call("with_timeout", 5) == "late"
        assert await client.call("with_timeout", 0) == "in time"
        for _ in range(3):
            with pytest.raises(shmrpc.Error) as ended:
                await client.call("cancels_itself", True)
            assert ended.value.code == "CANCELLED"
        assert await client.call("cancels_itself", False) == "went on"
        assert await client.call("task_is_the_same")

    pair(main)


@pytest.mark.parametrize("waits", [False, True])
def test_errors_say_the_same_with_and_without_waiting(pair, waits):
    async def main(server, client):
        @server.method
        async def fails(waits, how):
            if waits:
                await asyncio.sleep(0)
            if how == "abort":
                raise shmrpc.Abort("NOT_FOUND", "no such order")
            if how == "type":
                raise TypeError("of mine")
            return {"unpackable": object()}

        for _ in range(2):
            with pytest.raises(shmrpc.RemoteError, match="no such order") as raised:
                await client.call("fails", waits, "abort")
            assert raised.value.code == "NOT_FOUND"
            with pytest.raises(shmrpc.RemoteError, match="of mine") as raised:
                await client.call("fails", waits, "type")
            assert raised.value.code == "UNKNOWN"
            assert "in fails" in raised.value.remote_traceback
            assert "shmrpc/aio" not in raised.value.remote_traceback
            with pytest.raises(shmrpc.RemoteError, match="can't be sent") as raised:
                await client.call("fails", waits, "result")
            assert raised.value.code == "INTERNAL"
        with pytest.raises(shmrpc.RemoteError) as raised:
            await client.call("fails")
        assert raised.value.code == "INVALID_ARGUMENT"
        with pytest.raises(shmrpc.RemoteError) as raised:
            await client.call("fails", waits, "type", other=1)
        assert raised.value.code == "INVALID_ARGUMENT"

    pair(main)


def test_keywords_deadlines_and_metadata_of_short_handlers(pair):
    async def main(server, client):
        @server.method
        async def tell(*args, **kwargs):
            call = shmrpc.current_call()
            left = call.time_remaining()
            call.set_trailing_metadata({"left": "yes" if left is not None else "no"})
            return [list(args), kwargs, left is not None and 0 < left <= 30]

        assert await client.call("tell", 1, two=2) == [[1], {"two": 2}, False]
        assert await client.call("tell", 1, timeout=30) == [[1], {}, True]
        assert await client.call("tell", two=2, timeout=30) == [[], {"two": 2}, True]

    pair(main)


def test_no_more_than_max_concurrency_wait(pair):
    async def main(server, client):
        go = asyncio.Event()

        @server.method
        async def wait():
            await go.wait()
            return "done"

        first = [asyncio.create_task(client.call("wait")) for _ in range(4)]
        wait_for = asyncio.get_running_loop().time() + 20
        while server.stats()["running"] < 4:
            assert asyncio.get_running_loop().time() < wait_for
            await asyncio.sleep(0.005)
        with pytest.raises(shmrpc.Overloaded):
            await client.call("wait")
        go.set()
        assert await asyncio.gather(*first) == ["done"] * 4
        assert await client.call("wait") == "done"

    pair(main, max_concurrency=4)


def test_nested_calls_from_the_first_step(pair):
    """The handler calls its caller, over the same connection, before it has waited for anything."""

    async def main(server, client):
        @client.method
        async def half(number):
            return number // 2

        @server.method
        async def steps(number):
            if number <= 1:
                return 0
            rest = await shmrpc.current_call().caller.call("half", number)
            return 1 + await client.call("steps", rest)

        assert await client.call("steps", 64) == 6
        assert await asyncio.gather(*(client.call("steps", 2**n) for n in range(1, 12))) == list(
            range(1, 12)
        )

    pair(main)


def test_a_cancelled_call_leaves_nothing(pair):
    async def main(server, client):
        ended = []

        @server.method
        async def hold():
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(1)

        for number in range(30):
            task = asyncio.create_task(client.call("hold"))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            if number % 2:
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        until = asyncio.get_running_loop().time() + 20
        while server.stats()["running"]:
            assert asyncio.get_running_loop().time() < until
            await asyncio.sleep(0.005)
        assert not client._link.session.calls

    pair(main)


def test_a_call_that_is_cancelled_before_its_task_begins(pair):
    async def main(server, client):
        begun, calls = [], []

        @server.method
        async def hold(number):
            begun.append(number)
            await asyncio.sleep(0)

        @server.method
        async def fail():
            raise ZeroDivisionError

        @server.method
        async def cancel():
            calls[1].close()

        await client.call("hold", 1)  # from now on it gets a task at once
        calls += [client.call("fail"), client.call("hold", 2), client.call("cancel")]
        # As tasks do it, but at once: so they come in one batch. The failure has the poller look
        # again before it is the turn of the task, and it finds that the call was cancelled.
        for call in calls:
            call.send(None)
        await client.call("hold", 3)
        for call in calls:
            call.close()
        assert begun in ([1, 3], [1, 2, 3])  # where tasks begin at once it was too late
        assert server.stats()["running"] == 0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair(main)
        gc.collect()
    assert not [str(one.message) for one in caught], "such as: coroutine was never awaited"


def test_a_loop_that_ends_early_leaves_no_task(directory, capfd):
    """Nothing is stopped, nothing closed: no warning of the task that is kept ready."""
    address = f"shm://{directory}/calc.sock"

    async def main():
        server = aio.Server(address)

        @server.method
        async def echo(x):
            return x

        await server.start()
        client = await aio.connect(address)
        assert await client.call("echo", 1) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await client.close()
        await server.stop(0)

    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    gc.collect()
    assert capfd.readouterr().err == ""


def test_ctrl_c_in_a_task_of_a_batch(directory):
    """What else was in the batch is there when the loop runs again."""
    address = f"shm://{directory}/calc.sock"
    loop = asyncio.new_event_loop()

    async def begin():
        server = aio.Server(address)

        @server.method
        async def echo(x):
            return x

        await server.start()
        return server, await aio.connect(address)

    server, client = loop.run_until_complete(begin())
    got = []

    async def ask(number):
        got.append(await client.call("echo", number))
        if number == 3:
            raise KeyboardInterrupt

    tasks = [loop.create_task(ask(number)) for number in range(20)]
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.gather(*tasks))

    async def end():
        await asyncio.wait(tasks)
        await client.close()
        await server.stop(0)

    loop.run_until_complete(end())
    loop.close()
    assert sorted(got) == list(range(20))
    with pytest.raises(KeyboardInterrupt):
        tasks[3].result()


def test_a_client_of_another_loop_or_thread_is_refused(directory, service):
    running = service("shm")

    async def begin():
        client = await aio.connect(running.address)
        call = client.open("total")
        await call.send(1)
        return client, call

    async def use(client, call):
        for attempt in (
            client.call("add", 1, 2),
            client.call("add", 1, 2, timeout=1),
            client.notify("add", 1, 2),
            client.stats(),
            client.loan(10),
            anext(client.stream("count", 3)),
            client.open("total").send(1),
            call.send(1),
            call.close_send(),
            call.result(),
            anext(call),
            call.aclose(),
            client.close(),
        ):
            with pytest.raises(RuntimeError, match="belongs to the event loop that made it"):
                await attempt

    async def end(client, call):
        assert await client.call("add", 1, 2) == 3
        await call.send(2)
        assert await call.result() == 3
        await client.close()

    loop = asyncio.new_event_loop()
    client, call = loop.run_until_complete(begin())
    asyncio.run(use(client, call))
    threads = []

    def in_thread():
        asyncio.run(use(client, call))
        threads.append(1)

    thread = threading.Thread(target=in_thread)
    thread.start()
    wait_until(lambda: threads)
    thread.join()
    loop.run_until_complete(end(client, call))
    loop.close()
