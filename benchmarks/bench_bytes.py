"""Bytes one way in writes of 64 KiB, through asyncio's streams: over shm and over Unix sockets.

Both sides on the standard loop, on CPUs of their own. Target: over shm at least 2x the bytes/s of
asyncio's Unix sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import pytest

from shmrpc import aio
from shmrpc.bench.figures import Comparison

if TYPE_CHECKING:
    from shmrpc.bench.harness import Effort

WRITE = bytes(64 << 10)
CONTENDERS = ("shm", "raw-uds")


async def _serve(contender: str, path: str, cpu: str) -> None:
    os.sched_setaffinity(0, {int(cpu)})

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(256 << 10):
            pass
        writer.close()

    if contender == "shm":
        server: asyncio.AbstractServer = await aio.start_server(sink, f"shm://{path}")
    else:
        server = await asyncio.start_unix_server(sink, path)
    print("ready", flush=True)
    await server.serve_forever()


async def _send(contender: str, path: str, seconds: float) -> float:
    if contender == "shm":
        reader, writer = await aio.open_connection(f"shm://{path}")
    else:
        reader, writer = await asyncio.open_unix_connection(path)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        writer.write(WRITE)
        await writer.drain()
        count += 1
    writer.write_eof()
    await reader.read()  # it has taken all
    elapsed = time.perf_counter() - start
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return count * len(WRITE) / elapsed


def bytes_per_second(contender: str, seconds: float = 0.3) -> float:
    """Measure one contender, its server in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="rpc-", dir="/tmp") as directory:
        path = f"{directory}/b.sock"
        command = [sys.executable, "-m", "benchmarks.bench_bytes", contender, path]
        everywhere = os.sched_getaffinity(0)
        first, last = min(everywhere), max(everywhere)
        with subprocess.Popen([*command, str(last)], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                os.sched_setaffinity(0, {first})
                return asyncio.run(_send(contender, path, seconds))
            finally:
                os.sched_setaffinity(0, everywhere)
                process.kill()


def compare(effort: Effort) -> Comparison:
    """Measure them by turns."""
    comparison = Comparison("bytes", "64 KiB writes")
    for _ in range(effort.runs):
        for contender in CONTENDERS:
            rate = bytes_per_second(contender, effort.seconds)
            comparison.runs.setdefault(contender, []).append({"bytes_per_s": rate})
    return comparison


@pytest.mark.parametrize("contender", CONTENDERS)
def test_bytes(contender: str, benchmark: object) -> None:
    benchmark.extra_info["bytes_per_s"] = benchmark.pedantic(  # type: ignore[attr-defined]
        bytes_per_second, args=(contender,), rounds=3
    )


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
