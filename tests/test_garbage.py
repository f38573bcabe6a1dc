"""What the garbage collector finds together is finalized in any order, and may still call."""

import asyncio
import gc
import subprocess
import sys

import pytest
from conftest import ASYNC_SERVICES

import shmrpc
from shmrpc import aio

SCRIPT = """
import asyncio, faulthandler, gc, sys, shmrpc
from shmrpc import aio
faulthandler.enable()

class Holder: pass

class Closer(Holder):
    def __del__(self):
        print(self.client.call("add", 1, 2))
        self.client.close()

server = shmrpc.Server(sys.argv[1])

@server.method
def add(a, b):
    return a + b

@server.method
def count():
    yield from range(100_000)

def cycle(kind, client):
    holder = kind()
    holder.me, holder.client = holder, client
    gc.collect()  # what was made before is in another generation
    return holder

async def one_item():
    client = await aio.connect(sys.argv[1])
    holder = cycle(Holder, client)
    holder.call = client.stream("count")
    print(await holder.call.__anext__())
    if sys.argv[2] == "closed":
        await client.close()
    return holder

with server:
    gc.disable()
    for _ in range(3):
        holder = cycle(Holder, shmrpc.connect(sys.argv[1]))
        holder.call = holder.client.stream("count")
        print(next(holder.call))
        try:
            holder.client.open("add", object())
        except TypeError as error:
            holder.error = error  # whose traceback has a call that was not sent
        if sys.argv[2] == "closed":
            holder.client.close()
        del holder
        gc.collect()
        if sys.argv[2] == "open":
            cycle(Closer, shmrpc.connect(sys.argv[1]))
        gc.collect()
        asyncio.run(one_item())
        gc.collect()
"""


@pytest.mark.parametrize("state", ["open", "closed"])
@pytest.mark.parametrize("where", ["shm", "unix"])
def test_calls_by_finalizers(directory, where, state):
    """Of open calls, and of users who close in ``__del__``."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{where}://{directory}/garbage.sock", state],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == (["0", "3", "0"] if state == "open" else ["0", "0"]) * 3


VIEWS = """
import faulthandler, gc, sys, shmrpc
faulthandler.enable()

server = shmrpc.Server(sys.argv[1])

@server.method
def large():
    return memoryview(b"12" * (1 << 19))

class Reader:
    def __init__(self, views):
        self.me, self.views = self, views

    def __del__(self):
        print(*(bytes(view[-2:]).decode() for view in self.views))

def views(client):
    loan = client.loan(1 << 20)
    loan[-2:] = b"34"
    return [client.call("large"), loan]

gc.disable()
with server:
    for _ in range(3):
        client = shmrpc.connect(sys.argv[1])
        Reader(views(client))
        client.close()
        del client
        gc.collect()
    with shmrpc.connect(sys.argv[1]) as client:
        Reader(views(client))  # collected while the interpreter ends
"""


@pytest.mark.parametrize("where", ["shm", "unix"])
def test_views_in_finalizers(directory, where):
    """The collector finalizes a view and who still reads it in any order."""
    run = subprocess.run(
        [sys.executable, "-c", VIEWS, f"{where}://{directory}/garbage.sock"],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["12", "34"] * 4


def test_open_calls_are_collected_while_their_client_is_closed(run, service):
    running = service("shm", program=ASYNC_SERVICES)

    async def main():
        client = await aio.connect(running.address)
        calls = [asyncio.ensure_future(client.call("sleep", 60)) for _ in range(200)]
        for _ in range(20):
            call = client.stream("count", 100_000)
            assert await call.__anext__() == 0
            call.me = call
            del call
        threshold = gc.get_threshold()
        gc.set_threshold(50)
        try:
            await client.close()
        finally:
            gc.set_threshold(*threshold)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {shmrpc.Cancelled}

    run(main)
