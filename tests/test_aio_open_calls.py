"""Open calls under asyncio that begin in unusual ways."""

import asyncio
import os
import signal

import pytest
from conftest import ASYNC_SERVICES, address_of, pause

import shmrpc
from shmrpc import aio


def test_calls_that_are_cancelled_before_they_left_us_leave_nothing(run, service):
    running = service("shm", program=ASYNC_SERVICES)

    async def main():
        async with aio.connect(running.address) as client:
            pause(running.process.pid)
            try:
                calls = [client.open("total", "x" * 30_000) for _ in range(40)]
                tasks = [asyncio.ensure_future(call.send(1)) for call in calls]
                await asyncio.wait(tasks, timeout=0.05)
                assert not all(task.done() for task in tasks), "none waits for room"
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                for call in calls:
                    await call.aclose()
                assert not client._link.session.calls
            finally:
                os.kill(running.process.pid, signal.SIGCONT)
            while (await client.call("shmrpc.stats"))["running"] > 1:
                await asyncio.sleep(0.01)

    run(main)


class Answers:
    """An interceptor that answers streams by itself."""

    def __init__(self, answer):
        self.answer = answer

    async def intercept_async(self, call, proceed):
        return self.answer() if call.kind == "stream" else await proceed(call)


async def three():
    for number in range(3):
        yield number


class Three:
    def __aiter__(self):
        return three()


@pytest.mark.parametrize("answer", [three, Three])
def test_an_interceptor_may_stream_by_itself(run, directory, answer):
    async def main():
        async with (
            aio.Server(address_of("shm", directory)) as server,
            aio.connect(server.addresses[0], interceptors=[Answers(answer)]) as client,
        ):
            assert [number async for number in client.stream("count")] == [0, 1, 2]
            async with client.open("count") as call:
                for attempt in (call.send(1), call.result(), _initial_metadata_of(call)):
                    with pytest.raises(shmrpc.Error, match="an interceptor answered 'count'"):
                        await attempt
                await call.close_send()
                assert [number async for number in call] == [0, 1, 2]

    run(main)


async def _initial_metadata_of(call):
    return await call.initial_metadata


def test_an_interceptor_that_returns_no_stream_is_named(run, directory):
    async def main():
        async with (
            aio.Server(address_of("shm", directory)) as server,
            aio.connect(server.addresses[0], interceptors=[Answers(lambda: 42)]) as client,
        ):
            with pytest.raises(TypeError, match="returned int for 'count', not an async iterator"):
                await anext(client.stream("count"))
            with pytest.raises(TypeError, match="returned int for 'count'"):
                await client.open("count").send(1)

    run(main)
