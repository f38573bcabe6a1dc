"""The server process of test_aio_large_values.py; started as async_services.py is."""

import async_services
import numpy as np

import shmrpc
from shmrpc import aio

remembered = []


def make_server(addresses, options):
    server = aio.Server(*addresses, **options)

    @server.method
    async def echo(value):
        return value

    @server.method(inline=True)
    def inline(value):
        return value

    @server.method
    def plain(value):
        return value

    @server.method
    async def gaps(size):
        return memoryview(b"ab" * size)[::2]

    @server.method(inline=True)
    def gaps_inline(size):
        return memoryview(b"ab" * size)[::2]

    @server.method
    async def gaps_streamed(*sizes):
        for size in sizes:
            yield memoryview(b"ab" * size)[::2]

    @server.method
    async def objects():
        return np.array([object()])

    @server.method
    async def items(count, size):
        for number in range(count):
            yield np.full(size, number, "u1")

    @server.method
    def plain_items(count, size):
        for number in range(count):
            yield np.full(size, number, "u1")

    @server.method(requests=True)
    async def total(arrays):
        return sum([int(array.sum()) async for array in arrays])

    @server.method(requests=True)
    def plain_total(arrays):
        return sum(int(array.sum()) for array in arrays)

    @server.method(requests=True)
    async def doubled(values):
        async for value in values:
            yield 2 * value

    @server.method
    async def call_back(method, value):
        return await shmrpc.current_call().caller.call(method, value)

    @server.method
    async def lent(size):
        array = await shmrpc.current_call().empty(size, "u1")
        array[:] = 9
        return array

    @server.method(inline=True)
    def lent_inline(size):
        array = shmrpc.current_call().empty(size, "u1")
        array[:] = 9
        return array

    @server.method
    def lent_on_thread(size):
        array = shmrpc.current_call().empty(size, "u1")
        array[:] = 9
        return array

    @server.method
    async def lent_items(count, size):
        for _ in range(count):
            array = await shmrpc.current_call().empty(size, "u1")
            array[:] = 9
            yield array

    @server.method
    async def remember(array):
        remembered.append(int(array.sum()))

    @server.method
    async def recall():
        return remembered.pop()

    return server


if __name__ == "__main__":
    async_services.make_server = make_server
    async_services.main()
