"""``shmrpc.aio``: calls, streams, cancellation, loop rules, on asyncio and uvloop."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import (
    ASYNC_SERVICES,
    LOOPS,
    TRANSPORTS,
    Process,
    Service,
    address_of,
    short_directory,
)

import shmrpc
from shmrpc import aio


@pytest.fixture(scope="module", params=["async", "sync"])
def servers(request):
    """An aio server and a sync one, at all three transports."""
    with short_directory() as path:
        where = [address_of(transport, path) for transport in TRANSPORTS]
        options = {"program": ASYNC_SERVICES} if request.param == "async" else {}
        running = Service(*where, **options)
        yield running
        assert running.process.poll() is None, "the server died"
        running.close()


@pytest.fixture(scope="module")
def async_server():
    with short_directory() as path:
        where = [address_of(transport, path) for transport in TRANSPORTS]
        running = Service(*where, program=ASYNC_SERVICES)
        yield running
        assert running.process.poll() is None, "the server died"
        running.close()


@pytest.fixture
def address(async_server, transport):
    return async_server.addresses[TRANSPORTS.index(transport)]


async def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# ---- calls ----


def test_calls_with_either_server(servers, transport, run):
    async def main():
        async with aio.connect(servers.addresses[TRANSPORTS.index(transport)]) as client:
            assert await client.call("add", 1, 2) == 3
            assert await client.call("add", 1, b=5) == 6
            assert await client.call("echo", b"x" * 300_000) == b"x" * 300_000
            assert await client.proxy().add(4, 5) == 9
            await client.notify("echo", 1)
            assert await client.ping() > 0
            assert (await client.stats())["reconnects"] == 0
            numbers = await asyncio.gather(*[client.call("add", n, 1) for n in range(500)])
            assert numbers == list(range(1, 501))
            with pytest.raises(shmrpc.MethodNotFound):
                await client.call("no such method")
            with pytest.raises(TypeError, match="argument 1 of 'echo'"):
                await client.call("echo", object())
            with pytest.raises(shmrpc.DeadlineExceeded):
                await client.call("sleep", 5, timeout=0.02)
            with pytest.raises(ValueError, match="timeout"):
                await client.call("echo", 1, timeout=-1)
            assert await client.call("add", 1) == 2

    run(main)


def test_sync_client_with_async_server(address, connect):
    client = connect(address)
    assert client.call("add", 1, 2) == 3
    assert client.call("plain", 7) == [7, False]
    assert client.call("inline", 7) == [7, True]
    assert [f.result() for f in [client.submit("add", n) for n in range(100)]] == list(
        range(1, 101)
    )
    assert list(client.stream("count", 2000)) == list(range(2000))
    assert list(client.stream("plain_count", 20)) == list(range(20))
    with client.open("total") as call:
        for number in range(1000):
            call.send(number)
        assert call.result() == sum(range(1000))
    with client.open("plain_total") as call:
        for number in range(100):
            call.send(number)
        assert call.result() == sum(range(100))
    with client.open("double") as call:
        for number in range(5):
            call.send(number)
            assert next(call) == 2 * number
    client.method(name="answer")(lambda value: value + 1)
    assert client.call("call_back", "answer", 41) == 42


def test_both_in_one_process(directory, transport, run, connect):
    async def main():
        server = aio.Server(address_of(transport, directory))

        @server.method
        async def add(a, b):
            return a + b

        async with server:
            with pytest.raises(shmrpc.Error, match="running already"):
                await server.start()
            async with aio.connect(server.addresses[0]) as client:
                assert await client.call("add", 1, 2) == 3
                sync = await asyncio.to_thread(connect, server.addresses[0])
                assert await asyncio.to_thread(sync.call, "add", 3, 4) == 7
                await asyncio.to_thread(sync.close)
        assert server.addresses == []

    run(main)


def test_errors_of_handlers(address, run):
    async def main():
        async with aio.connect(address) as client:
            with pytest.raises(shmrpc.RemoteError) as caught:
                await client.call("fail")
            assert (caught.value.type, caught.value.message) == ("ValueError", "on purpose")
            shown = "in fail" in caught.value.remote_traceback
            assert shown == (not address.startswith("tcp"))
            with pytest.raises(shmrpc.RemoteError) as caught:
                await client.call("fail", "Abort", "gone")
            assert (caught.value.code, caught.value.details) == ("NOT_FOUND", {"a": 1})
            for method in ("add", "plain", "inline"):
                with pytest.raises(shmrpc.RemoteError) as caught:
                    await client.call(method, 1, 2, 3)
                assert caught.value.code == "INVALID_ARGUMENT"
            with pytest.raises(shmrpc.RemoteError, match=r"stream\(\) or open\(\)"):
                await client.call("count", 3)

    run(main)


def test_context(address, run):
    async def main():
        async with aio.connect(address) as client:
            method, pid, metadata, remaining, tag = await client.call(
                "context", timeout=20, metadata={"a": "b"}
            )
            assert (method, metadata, tag) == ("context", {"a": "b"}, "mine")
            assert pid == os.getpid()
            assert 0 < remaining <= 20
            assert await client.call("context_on_thread") == "context_on_thread"
            async with client.open("context") as call:
                assert (await call.result())[0] == "context"
                assert await call.initial_metadata == {}
                assert call.trailing_metadata == {"trailing": "yes"}
            nested = await client.call("remaining_of_nested", address, timeout=20)
            assert 0 < nested <= 20

    run(main)


# ---- streams ----


def test_streams(address, run):
    async def main():
        async with aio.connect(address) as client:
            assert [n async for n in client.stream("count", 3000)] == list(range(3000))
            assert [n async for n in client.stream("plain_count", 30)] == list(range(30))
            async with client.open("total", 5) as call:
                for number in range(3000):
                    await call.send(number)
                assert await call.result() == 5 + sum(range(3000))
            async with client.open("double") as call:
                for number in range(20):
                    await call.send(number)
                    assert await call.__anext__() == 2 * number
                await call.close_send()
                assert [n async for n in call] == []
                with pytest.raises(shmrpc.Error, match="close_send"):
                    await call.send(1)
            items = []
            with pytest.raises(shmrpc.RemoteError, match="after the items"):
                async for item in client.stream("count_and_fail", 5):
                    items.append(item)  # noqa: PERF401 - those before the error count
            assert items == list(range(5))
            stream = client.stream("count", 5)
            assert [n async for n in stream] == list(range(5))
            with pytest.raises(shmrpc.Error, match="iterated to their end"):
                [n async for n in stream]

    run(main)


def test_a_stream_that_is_closed_cancels_its_handler(address, run):
    async def main():
        async with aio.connect(address) as client:
            for number, end in enumerate(("break", "aclose", "cancel", "delete", "task")):
                n = 10**6 + number
                stream = client.stream("count", n, 0.0001)
                assert await stream.__anext__() == 0
                if end == "aclose":
                    await stream.aclose()
                    with pytest.raises(StopAsyncIteration):
                        await stream.__anext__()
                elif end == "cancel":
                    assert stream.cancel()
                    with pytest.raises(shmrpc.Cancelled):
                        await stream.__anext__()
                elif end == "task":

                    async def read(stream=stream):
                        async for _ in stream:
                            pass

                    task = asyncio.ensure_future(read())
                    await asyncio.sleep(0.01)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                elif end == "break":
                    async with stream:
                        pass
                stream = None
                gc.collect()

                async def told(n=n):
                    return f"count {n} ended early" in await client.call("recall")

                await until(told)

    run(main)


def test_a_slow_reader_stops_its_writer(address, run):
    async def main():
        async with aio.connect(address) as client:
            stream = client.stream("count", 10**9)
            assert await stream.__anext__() == 0
            before = (await client.call("stats"))["outbox_bytes"]
            for _ in range(50):
                assert await client.call("add", 1, 2) == 3
                await asyncio.sleep(0.002)
            assert (await client.call("stats"))["outbox_bytes"] <= before + (1 << 20)
            for expected in range(1, 3000):
                assert await stream.__anext__() == expected
            await stream.aclose()

    run(main)


# ---- both directions ----


def test_client_methods(address, run):
    async def main():
        async with aio.connect(address) as client:

            @client.method
            async def answer(value):
                return value + 1

            @client.method
            async def deep(n):
                return await client.call("deep", n)

            assert await client.call("call_back", "answer", 1) == 2
            assert await client.call("deep", 20) == "bottom"
            with pytest.raises(shmrpc.RemoteError, match="has no method"):
                await client.call("call_back", "missing")

    run(main)


# ---- cancellation ----


def test_cancelling_a_task_cancels_the_handler(address, run):
    async def main():
        async with aio.connect(address) as client:
            seconds = 1000 + time.monotonic()

            async def seen(what):
                return what in await client.call("recall")

            task = asyncio.ensure_future(client.call("sleep", seconds))
            await until(lambda: seen(f"sleep {seconds}"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            task = asyncio.ensure_future(client.call("sleep", seconds + 1))
            await until(lambda: seen(f"sleep {seconds + 1}"))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.05)
            await until(lambda: seen(f"cancelled sleep {seconds}"))
            await until(lambda: seen(f"cancelled sleep {seconds + 1}"))
            assert await client.call("add", 1, 2) == 3

    run(main)


async def cancel_after(steps, coroutine):
    """Step a coroutine in a task, and cancel it after so many iterations of the loop."""
    task = asyncio.ensure_future(coroutine)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


@pytest.mark.parametrize("kind", ["call", "stream", "total", "double", "notify", "connect"])
def test_cancel_at_every_await_point(address, run, kind):
    async def use(client):
        if kind == "call":
            await client.call("sleep", 0.002)
        elif kind == "stream":
            async for _ in client.stream("count", 50, 0.0002):
                pass
        elif kind == "total":
            async with client.open("total") as call:
                for number in range(600):
                    await call.send(number)
                await call.result()
        elif kind == "double":
            async with client.open("double") as call:
                await call.send(1)
                await call.__anext__()
                await call.close_send()
                async for _ in call:
                    pass
        elif kind == "notify":
            await client.notify("echo", b"x" * 200_000)
        else:
            async with aio.connect(address) as other:
                await other.call("add", 1)

    async def main():
        async with aio.connect(address) as client:
            for steps in range(40):
                await cancel_after(steps, use(client))
                assert await client.call("add", steps, 1) == steps + 1

            async def quiet():
                stats = await client.call("stats")
                return stats["running"] <= 1 and stats["conns"] <= 2

            await until(quiet)
            assert len(client._link.session.calls) == 0

    run(main, debug=False)


# ---- ends ----


def test_server_dies(transport, service, run):
    running = service(transport, program=ASYNC_SERVICES)

    async def main():
        async with aio.connect(running.address) as client:
            calls = [asyncio.ensure_future(client.call("sleep", 30)) for _ in range(3)]
            stream = client.stream("count", 10**9, 0.001)
            assert await stream.__anext__() == 0
            running.kill()
            for call in calls:
                with pytest.raises(shmrpc.ConnectionLost):
                    await call
            with pytest.raises(shmrpc.ConnectionLost):
                async for _ in stream:
                    pass
            with pytest.raises(shmrpc.ConnectError):
                async with aio.connect(running.address, timeout=0.2):
                    pass

    run(main)


def test_reconnects(directory, run):
    address = address_of("shm", directory)

    async def main():
        first = Service(address, program=ASYNC_SERVICES)
        client = await aio.connect(address, retries=5)
        assert await client.call("add", 1) == 2
        first.kill()
        first.close()
        second = await asyncio.to_thread(Service, address, program=ASYNC_SERVICES)
        assert await client.call("add", 2) == 3
        assert (await client.stats())["reconnects"] == 1
        assert [n async for n in client.stream("count", 3)] == [0, 1, 2]
        await client.close()
        await client.close()
        with pytest.raises(shmrpc.Cancelled, match="closed"):
            await client.call("add", 1)
        second.close()

    run(main)


def test_close_ends_what_waits(address, run):
    async def main():
        client = await aio.connect(address)
        calls = [asyncio.ensure_future(client.call("sleep", 30)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await client.close()
        for call in calls:
            with pytest.raises(shmrpc.Cancelled):
                await call

    run(main)


def test_stop_with_grace(directory, transport, run):
    async def main():
        server = aio.Server(address_of(transport, directory))
        ended = []

        @server.method
        async def sleep(seconds):
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                ended.append(seconds)
                raise
            return seconds

        release = asyncio.Event()
        server.method(name="short")(release.wait)

        async def both_run():
            return server.stats()["running"] == 2

        async def refused():
            try:
                await client.call("sleep", 0)
            except shmrpc.Error as error:
                return error.code == "UNAVAILABLE"

        await server.start()
        async with aio.connect(server.addresses[0]) as client:
            short = asyncio.ensure_future(client.call("short"))
            long = asyncio.ensure_future(client.call("sleep", 60))
            await until(both_run)
            stopping = asyncio.ensure_future(server.stop(1.0))
            await until(refused)
            release.set()
            assert await short is True
            await stopping
            with pytest.raises((shmrpc.ConnectionLost, shmrpc.Cancelled)):
                await long
            assert ended == [60]
        await server.stop()

    run(main)


# ---- loop rules ----


def test_foreign_loops_and_threads(address, run):
    async def use(client):
        return await client.call("add", 1)

    async def main():
        async with aio.connect(address) as client:
            for coroutine in (client.call("add", 1), client.close(), client.notify("echo", 1)):
                with pytest.raises(RuntimeError, match="belongs to the event loop"):
                    await asyncio.to_thread(asyncio.run, coroutine)
            assert await client.call("add", 1) == 2

    run(main)


def test_loops_in_threads(address):
    """Each thread a loop and a client of its own."""
    failures = []

    async def main():
        async with aio.connect(address) as client:
            for n in range(200):
                assert await client.call("add", n, 1) == n + 1

    def work(make):
        loop = make()
        try:
            loop.run_until_complete(main())
            loop.run_until_complete(loop.shutdown_default_executor())
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            loop.close()

    threads = [threading.Thread(target=work, args=(make,)) for make in [*LOOPS.values()] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


ABRUPT = """
import asyncio, sys
from shmrpc import aio

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # other work may run beside us
    client = await aio.connect(sys.argv[1])
    asyncio.ensure_future(client.call("sleep", 30))
    stream = client.stream("count", 10**9, 0.001)
    await stream.__anext__()
    print("ready", flush=True)
    if sys.argv[2] == "leave":
        return
    await asyncio.sleep(30)

if sys.argv[2] == "close":
    loop = asyncio.new_event_loop()
    loop.slow_callback_duration = 60
    client = loop.run_until_complete(aio.connect(sys.argv[1]).__aenter__())
    pending = loop.create_task(client.call("sleep", 0.01))
    loop.run_until_complete(asyncio.sleep(0))
    pending.cancel()
    loop.run_until_complete(asyncio.gather(pending, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    print("ready", flush=True)
else:
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(7)
"""


@pytest.mark.parametrize("how, status", [("interrupt", 7), ("leave", 0), ("close", 0)])
def test_abrupt_ends_are_silent(address, how, status):
    """A loop that is closed with calls pending, Ctrl-C: no report, no warning."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", ABRUPT, address, how]
    with Process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        if how == "interrupt":
            process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=40)
    assert complaints == ""
    assert process.returncode == status


def test_idle_uses_no_cpu(address, run):
    async def main():
        async with aio.connect(address) as client:
            await client.call("add", 1)
            await asyncio.sleep(0.2)  # for spinning and standing by to end
            before = time.process_time()
            await asyncio.sleep(1)
            assert time.process_time() - before < 0.05

    run(main, debug=False)


def test_calls_do_not_starve_the_loop(address, run):
    """A task that calls without end lets timers and others run."""

    async def main():
        async with aio.connect(address) as client:

            async def tick():
                for _ in range(20):
                    await asyncio.sleep(0.01)

            ticking = asyncio.ensure_future(tick())
            while not ticking.done():
                await client.call("add", 1)

    run(main, debug=False)


# ---- interceptors ----


def test_interceptors(directory, run):
    log = []

    class Note:
        def __init__(self, side):
            self.side = side

        async def intercept_async(self, call, proceed):
            log.append((self.side, call.method, call.kind))
            call.add_done_callback(lambda call: log.append((self.side, call.method, call.code)))
            if self.side == "client":
                call.metadata["from"] = "interceptor"
            return await proceed(call)

    async def main():
        server = aio.Server(address_of("shm", directory), interceptors=[Note("server")])

        @server.method
        async def who():
            return shmrpc.current_call().metadata["from"]

        @server.method
        async def count(n):
            for i in range(n):
                yield i

        async with (
            server,
            aio.connect(server.addresses[0], interceptors=[Note("client")]) as client,
        ):
            assert await client.call("who") == "interceptor"
            assert [n async for n in client.stream("count", 3)] == [0, 1, 2]
            with pytest.raises(shmrpc.MethodNotFound):
                await client.call("nothing")
            with pytest.raises(shmrpc.RemoteError, match="unexpected keyword"):
                await client.call("who", unknown=1)

    run(main)
    assert ("server", "who", "INVALID_ARGUMENT") in log
    assert ("client", "who", "INVALID_ARGUMENT") in log
    assert log[:4] == [
        ("client", "who", "unary"),
        ("server", "who", "unary"),
        ("server", "who", "OK"),
        ("client", "who", "OK"),
    ]
    assert {("client", "count", "OK"), ("server", "count", "OK")} <= set(log)
    assert ("client", "nothing", "UNIMPLEMENTED") in log
