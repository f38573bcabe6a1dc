"""Stopping an asyncio server: what happens to handlers, also when stopping is cancelled."""

import asyncio
import subprocess
import sys
import threading

import pytest

import shmrpc
from shmrpc import aio


class Stage:
    """A server with handlers that don't end by themselves, and clients of it."""

    def __init__(self):
        self.server = aio.Server("stage")
        self.started, self.ended = asyncio.Event(), []
        self.of_thread = threading.Event()

        @self.server.method
        async def stay():
            self.started.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # what is cancelled gets to clean up
                self.ended.append("stay")

        @self.server.method(requests=True)
        def listen(messages):
            try:
                return [*messages]
            except BaseException as error:
                self.ended.append(type(error))
                raise
            finally:
                self.of_thread.set()

    async def call(self, client):
        calling = asyncio.ensure_future(client.call("stay"))
        await asyncio.wait_for(self.started.wait(), 30)
        return calling

    async def check_gone(self, calling):
        with pytest.raises((shmrpc.Cancelled, shmrpc.ConnectionLost)):
            await asyncio.wait_for(calling, 30)
        assert self.ended == ["stay"]
        assert self.server.addresses == []
        with pytest.raises(shmrpc.ConnectError):
            await aio.connect("stage", timeout=0.1)


@pytest.mark.parametrize("when", ["at once", "in the grace"])
def test_cancelling_stop_ends_the_grace(directory, run, when):
    async def main():
        stage = Stage()
        async with stage.server, aio.connect("stage") as client:
            calling = await stage.call(client)
            stopping = asyncio.ensure_future(stage.server.stop(grace=1e6))
            await asyncio.sleep(0)
            while when == "in the grace" and stage.server.stats():
                await asyncio.sleep(0.001)
            stopping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopping
            await stage.check_gone(calling)

    run(main)


def test_cancelling_serve_twice_ends_the_grace(directory, run):
    async def main():
        stage = Stage()
        serving = asyncio.ensure_future(stage.server.serve())
        while not stage.server.addresses:
            await asyncio.sleep(0.001)
        async with aio.connect("stage") as client:
            calling = await stage.call(client)
            serving.cancel()
            while stage.server.addresses:
                await asyncio.sleep(0.001)
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            await stage.check_gone(calling)

    run(main)


def test_a_thread_that_waits_for_messages_is_let_go(directory, run):
    async def main():
        stage = Stage()
        async with stage.server, aio.connect("stage") as client, client.open("listen") as call:
            await call.send(1)
            await stage.server.stop(grace=0.01)
            assert await asyncio.to_thread(stage.of_thread.wait, 30)
            assert stage.ended == [shmrpc.Cancelled]
            with pytest.raises((shmrpc.Cancelled, shmrpc.ConnectionLost)):
                await call.result()

    run(main)


def test_a_client_is_a_context_manager_itself(directory, run):
    async def main():
        async with Stage().server:
            async with await aio.connect("stage") as client:
                assert await client.ping() >= 0
            with pytest.raises(shmrpc.Cancelled, match="is closed"):
                await client.ping()

    run(main)


CLOSES_ITS_LOOP = """
import asyncio, sys, threading
from shmrpc import aio

taken = threading.Event()

async def begin():
    server = aio.Server("stage")

    @server.method(requests=True)
    def listen(messages):
        next(messages)
        taken.set()
        return [*messages]

    await server.start()
    call = (await aio.connect("stage")).open("listen")
    await call.send(1)
    await asyncio.to_thread(taken.wait)
    return server, call

loop = asyncio.new_event_loop()
kept = loop.run_until_complete(begin())
loop.run_until_complete(loop.shutdown_default_executor())
loop.close()
"""


def test_a_closed_loop_does_not_keep_the_interpreter(directory):
    """A thread of it waits for a message that nobody is going to read."""
    command = [sys.executable, "-W", "always", "-c", CLOSES_ITS_LOOP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "never awaited" not in done.stderr


def test_what_is_no_value_is_named(directory, run):
    async def main():
        server = aio.Server("stage")

        @server.method
        async def objects():
            yield 1
            yield object()

        async with server, aio.connect("stage") as client:
            items = client.stream("objects")
            assert await anext(items) == 1
            with pytest.raises(shmrpc.RemoteError, match="'objects' yielded what can't be sent"):
                await anext(items)

    run(main)
