"""Who keeps an exception, a future or a call keeps no descriptor of a connection that is over."""

import asyncio
import os

import pytest
from conftest import LOOPS, wait_until

import shmrpc
from shmrpc import aio


@pytest.fixture
def descriptors():
    return lambda: len(os.listdir("/proc/self/fd"))


def error_of(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return error
    pytest.fail("no error")


def closed(future):
    return future.cancelled() or future.exception(10)


KINDS = {
    "lost": lambda client: error_of(client.call, "die"),
    "lost with more": lambda client: error_of(client.call, "die", timeout=30),
    "lost future": lambda client: (closed(future := client.submit("die")), future),
    "remote": lambda client: error_of(client.call, "inner_type_error"),
    "remote with more": lambda client: error_of(
        client.call, "inner_type_error", metadata={"a": "b"}
    ),
    "late": lambda client: error_of(client.call, "sleep", 30, timeout=0.05),
    "not packed": lambda client: error_of(client.call, "add", object(), 1),
    "not packed, large": lambda client: error_of(client.call, "add", [bytes(100_000), object()]),
    "no method": lambda client: error_of(client.submit("nobody").result, 30),
    "open": lambda client: client.open("hold"),
    "broken stream": lambda client: error_of(list, client.stream("inner_type_error")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_by_a_client_that_was_closed(transport, service, connect, descriptors, kind):
    running = service(transport)
    before = descriptors()
    client = connect(running.address)
    kept = KINDS[kind](client)
    client.close()
    assert kept is not None
    wait_until(lambda: descriptors() <= before)


@pytest.mark.parametrize("kind", ["lost", "lost with more", "lost future"])
def test_kept_over_many_connections(transport, service, connect, descriptors, kind):
    running = service(transport)
    client = connect(running.address)
    kept, counts = [], []
    for _ in range(4):
        kept.append(KINDS[kind](client))
        running.process.wait()
        running.close()
        counts.append(descriptors())
        running = service(running.address)
    assert len(kept) == 4
    assert counts[-1] <= counts[0] + 1


AWAITED = {
    "lost": lambda client: client.call("die"),
    "lost with more": lambda client: client.call("die", timeout=30),
    "remote": lambda client: client.call("inner_type_error"),
    "late": lambda client: client.call("sleep", 30, timeout=0.05),
    "not packed": lambda client: client.call("add", object(), 1),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", AWAITED)
def test_kept_by_a_loop(transport, service, descriptors, kind, loop):
    running = service(transport)

    async def main():
        async with aio.connect(running.address):  # what the loop itself opens at first
            pass
        before = descriptors()
        client = await aio.connect(running.address)
        try:
            await AWAITED[kind](client)
        except (shmrpc.Error, TypeError) as error:
            kept = error
        await client.close()
        assert kept is not None
        assert descriptors() <= before

    made = LOOPS[loop]()
    try:
        made.run_until_complete(main())
    finally:
        made.run_until_complete(made.shutdown_default_executor())
        made.close()
        asyncio.set_event_loop(None)
