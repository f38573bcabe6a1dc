"""What is closed lets go of its descriptors at once, without the garbage collector."""

import asyncio
import gc

import pytest
from conftest import address_of, descriptors

import shmrpc
from shmrpc import aio


@pytest.fixture
def no_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def place(transport, directory, no_collector):
    return address_of(transport, directory)


async def back_to(count):
    """The loop may need some turns: the peer's end, connection_lost."""

    async def fewer():
        while len(descriptors()) > count:
            await asyncio.sleep(0.002)

    await asyncio.wait_for(fewer(), 10)


async def warm_up():
    """What the loop opens for itself when it first needs it."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, lambda: None)
    return len(descriptors())


def test_a_client_and_a_server(place, run):
    async def main():
        before = await warm_up()
        server = aio.Server(place)

        @server.method
        async def echo(value):
            return value

        @server.method
        async def count(n):
            for i in range(n):
                yield i

        await server.start()
        (address,) = server.addresses
        listening = len(descriptors())
        client = await aio.connect(address)
        assert await client.call("echo", 1) == 1
        assert [i async for i in client.stream("count", 3)] == [0, 1, 2]
        connection = client._link
        await client.close()
        del connection
        await back_to(listening)
        await server.stop()
        await back_to(before)
        return client, server  # they were there until now

    run(main)


def test_a_client_that_lost_its_server(transport, no_collector, run, service):
    server = service(transport)

    async def main():
        before = await warm_up()
        client = await aio.connect(server.address, timeout=0.2)
        assert await client.call("add", 1, 2) == 3
        server.kill()
        with pytest.raises(shmrpc.Error):
            await client.call("add", 1, 2)
        await back_to(before)  # it would connect anew
        await client.close()
        return client

    run(main)


def test_byte_streams(place, run):
    async def main():
        before = await warm_up()
        ends = []

        async def echo(reader, writer):
            ends.append((reader, writer))
            writer.write(await reader.readexactly(5))
            writer.close()

        server = await aio.start_server(echo, place)
        (address,) = server.addresses
        for _ in range(2):
            reader, writer = await aio.open_connection(address)
            ends.append((reader, writer))
            writer.write(b"hello")
            assert await reader.read() == b"hello"
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()
        await back_to(before)
        for _, writer in ends:  # a closed transport answers all the same
            assert writer.transport.is_closing()
            assert writer.get_extra_info("peercred").pid > 0
            assert "closed" in repr(writer.transport)
            writer.transport.write(b"nobody reads this")
            writer.transport.abort()
        return server

    run(main)
