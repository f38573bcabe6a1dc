"""Smoke test of an installed shmrpc: a server and a client in two processes, some calls."""

import asyncio
import os
import subprocess
import sys
import tempfile

import shmrpc
from shmrpc import aio

SERVER = """
import sys, shmrpc
server = shmrpc.Server("smoke")
@server.method
def add(a, b): return a + b
@server.method
def count(n): yield from range(n)
with server:
    print("ready", flush=True)
    sys.stdin.read()
"""


async def add() -> int:
    async with aio.connect("smoke", timeout=10) as client:
        return await client.call("add", 1, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["SHMRPC_DIR"] = directory
        with subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise SystemExit("smoke: the server did not start")
            with shmrpc.connect("smoke", timeout=10) as client:
                replies = client.call("add", 1, 2), list(client.stream("count", 3))
            replies = *replies, asyncio.run(add())
            process.communicate(timeout=30)
    if replies != (3, [0, 1, 2], 3) or process.returncode != 0:
        raise SystemExit(f"smoke: replies {replies}, server ended with {process.returncode}")
    print(f"smoke: ok, {shmrpc.__file__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
