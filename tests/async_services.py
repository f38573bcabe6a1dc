"""The asyncio server process of the tests: ``python async_services.py '{"addresses": [...]}'``.

As services.py: prints its addresses, serves until SIGTERM, ends with its standard input.
"""

import asyncio
import contextvars
import json
import os
import sys
import threading
import time

import shmrpc
from shmrpc import aio

seen = []
tag = contextvars.ContextVar("tag", default="none")


def make_server(addresses, options):
    server = aio.Server(*addresses, **options)

    @server.method
    async def add(a, b=1):
        return a + b

    @server.method
    async def echo(value):
        return value

    @server.method(inline=True)
    def inline(value):
        return [value, threading.current_thread() is threading.main_thread()]

    @server.method
    def plain(value):
        return [value, threading.current_thread() is threading.main_thread()]

    @server.method
    async def sleep(seconds, result=None):
        seen.append(f"sleep {seconds}")
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            seen.append(f"cancelled sleep {seconds}")
            raise
        return result

    @server.method
    def block(seconds):
        time.sleep(seconds)
        return seconds

    @server.method
    async def stall(path, seconds):
        """Block the loop until this file is there: whether it came in time."""
        end = time.monotonic() + seconds
        while not os.path.exists(path):
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    @server.method(inline=True)
    def recall():
        return list(seen)

    @server.method
    async def fail(kind="ValueError", text="on purpose"):
        if kind == "Abort":
            raise shmrpc.Abort("NOT_FOUND", text, details={"a": 1})
        raise getattr(__import__("builtins"), kind)(text)

    @server.method
    async def context():
        call = shmrpc.current_call()
        tag.set("mine")
        await asyncio.sleep(0)
        assert shmrpc.current_call() is call
        call.set_trailing_metadata({"trailing": "yes"})
        remaining = call.time_remaining()
        return [call.method, call.peer.pid, dict(call.metadata), remaining, tag.get()]

    @server.method
    def context_on_thread():
        return shmrpc.current_call().method

    @server.method
    async def count(n, pause=0):
        try:
            for i in range(n):
                if pause:
                    await asyncio.sleep(pause)
                yield i
        except (GeneratorExit, asyncio.CancelledError):
            seen.append(f"count {n} ended early")
            raise

    @server.method
    def plain_count(n):
        yield from range(n)

    @server.method
    async def count_and_fail(n):
        for i in range(n):
            yield i
        raise ValueError("after the items")

    @server.method(requests=True)
    async def total(numbers, start=0):
        async for number in numbers:
            start += number
        return start

    @server.method(requests=True)
    def plain_total(numbers):
        return sum(numbers)

    @server.method(requests=True)
    async def double(numbers):
        async for number in numbers:
            yield 2 * number

    @server.method
    async def call_back(method, *args):
        return await shmrpc.current_call().caller.call(method, *args)

    @server.method
    async def deep(n):
        if n == 0:
            return "bottom"
        return await shmrpc.current_call().caller.call("deep", n - 1)

    @server.method
    async def remaining_of_nested(address):
        async with aio.connect(address) as other:
            return (await other.call("context"))[3]

    @server.method(inline=True)
    def stats():
        return server.stats()

    @server.method(inline=True)
    def die():
        os._exit(1)

    return server


async def serve(setup):
    options = setup.get("options", {})
    loop = asyncio.get_running_loop()

    def watch_stdin():
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch_stdin, daemon=True).start()
    server = make_server(setup["addresses"], options)
    try:
        await server.start()
    except shmrpc.ConnectError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"addresses": server.addresses}), flush=True)
    loop.set_debug(bool(setup.get("debug")))
    await server.serve()


def main():
    setup = json.loads(sys.argv[1])
    if setup.get("options", {}).pop("uvloop", False):
        import uvloop

        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(serve(setup))
    finally:
        loop.close()


if __name__ == "__main__":
    main()
