"""What the traceback of an error shows beside it: its cause, and nothing of our insides."""

import contextlib

import pytest
from conftest import Service, address_of, short_directory
from duplex import ask

import shmrpc
from shmrpc import aio

LARGE = memoryview(bytes(100_000))
# What may be named as the direct cause: why a value can't be packed, or what the system said.
CAUSES = (TypeError, ValueError, OverflowError, OSError, shmrpc.ConnectError)


class NeverDecodes:
    """Sends what others understand, and understands nothing."""

    def encoder(self):
        return shmrpc.MsgpackCodec().encoder()

    def decode(self, data):
        raise ValueError("it is meant not to be decoded")


def unexplained(error):
    """What a traceback shows by "During handling of the above exception", or as an odd cause."""
    found = []
    while error is not None:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, CAUSES):
            found.append(cause)
        if cause is None and not error.__suppress_context__ and error.__context__ is not None:
            found.append(error.__context__)
            cause = error.__context__
        error = cause
    return found


# Name -> expected error, method, arguments, options of the call, options of the client.
CALLS = {
    "raised": (shmrpc.RemoteError, "raise_error", ["KeyError", "x"], {}, {}),
    "aborted": (shmrpc.RemoteError, "abort", ["NOT_FOUND", "x", {"a": 1}], {}, {}),
    "wrong arguments": (shmrpc.RemoteError, "add", [1, 2, 3], {}, {}),
    "large": (shmrpc.RemoteError, "raise_error", ["KeyError", LARGE], {}, {}),
    "large bytes": (shmrpc.RemoteError, "raise_error", ["KeyError", bytes(LARGE)], {}, {}),
    "unpackable result": (shmrpc.RemoteError, "unpackable", ["set"], {}, {}),
    "no method": (shmrpc.MethodNotFound, "nothing_like_that", [], {}, {}),
    "keywords": (shmrpc.MethodNotFound, "nothing_like_that", [], {"a": 1}, {}),
    "late": (shmrpc.DeadlineExceeded, "sleep", [0.2], {"timeout": 0.02}, {}),
    "late at once": (shmrpc.DeadlineExceeded, "sleep", [0.2], {"timeout": 0}, {}),
    "long request": (shmrpc.MessageTooLarge, "size", ["x" * 600_000], {}, {}),
    "long result": (
        shmrpc.MessageTooLarge,
        "echo",
        ["x" * 20_000],
        {},
        {"max_message_bytes": 2048},
    ),
    "no value": (TypeError, "echo", [object()], {}, {}),
    "huge": (ValueError, "echo", [1 << 70], {}, {}),
    "large and no value": (TypeError, "echo", [[LARGE, object()]], {}, {}),
    "no name": (TypeError, 5, [], {}, {}),
    "unhashable name": (TypeError, [], [], {}, {}),
    "empty name": (ValueError, "", [], {}, {}),
    "timeout": (ValueError, "echo", [1], {"timeout": "x"}, {}),
    "metadata": (TypeError, "echo", [1], {"metadata": {"a": 1}}, {}),
    "undecodable": (shmrpc.Error, "add", [1], {}, {"codec": NeverDecodes()}),
}


@contextlib.contextmanager
def explained(expected):
    with pytest.raises(expected) as caught:
        yield
    assert unexplained(caught.value) == [], "\n".join(map(repr, unexplained(caught.value)))


@pytest.fixture(scope="module")
def addresses():
    with short_directory() as path:
        where = [address_of(transport, path) for transport in ("shm", "unix")]
        running = Service(*where, max_message_bytes=500_000)
        yield running.addresses
        running.close()


async def ask_async(client, how, method, *args, **options):
    """As ``ask``."""
    if how == "call":
        return await client.call(method, *args, **options)
    async with client.open(method, *args, **options) as call:
        if how == "items":
            return [item async for item in call]
        return await call.result()


@pytest.mark.parametrize("case", CALLS)
def test_errors_of_calls(addresses, connect, case):
    expected, method, arguments, options, of_client = CALLS[case]
    for address in addresses:
        for how in ("call", "submit", "items", "open"):
            client = connect(address, **of_client)  # which has no slot that is free
            with explained(expected):
                ask(client, how, method, *arguments, **options)


@pytest.mark.parametrize("case", CALLS)
def test_errors_of_asynchronous_calls(run, addresses, case):
    expected, method, arguments, options, of_client = CALLS[case]

    async def main():
        for address in addresses:
            for how in ("call", "items", "open"):
                async with aio.connect(address, **of_client) as client:
                    with explained(expected):
                        await ask_async(client, how, method, *arguments, **options)

    run(main)


CLIENTS = {
    "plain": {},
    "retried": {"retries": 2},
    "pool": {"connections": 2},
}


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("where", ["shm", "unix"])
def test_errors_of_connections_that_end(service, connect, where, kind):
    """Lost in the middle of a call, not to be made again, closed."""
    for how in ("call", "submit", "items", "open"):
        running = service(where)
        client = connect(running.address, timeout=0.05, **CLIENTS[kind])
        with explained((shmrpc.ConnectionLost, shmrpc.ConnectError)):
            ask(client, how, "die")
        running.kill()
        for _ in range(3):
            with explained((shmrpc.ConnectionLost, shmrpc.ConnectError)):
                ask(client, how, "add", 1, 2)
        with explained(shmrpc.ConnectError):
            client.notify("add", 1, 2)
        with explained(shmrpc.ConnectError):
            client.ping()
        client.close()
        with explained(shmrpc.Error):
            ask(client, how, "add", 1, 2)


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("where", ["shm", "unix"])
def test_errors_of_asynchronous_connections_that_end(run, service, where, kind):
    async def main():
        for how in ("call", "items", "open"):
            running = service(where)
            client = await aio.connect(running.address, timeout=0.05, **CLIENTS[kind])
            with explained((shmrpc.ConnectionLost, shmrpc.ConnectError)):
                await ask_async(client, how, "die")
            running.kill()
            for _ in range(3):
                with explained((shmrpc.ConnectionLost, shmrpc.ConnectError)):
                    await ask_async(client, how, "add", 1, 2)
            with explained(shmrpc.ConnectError):
                await client.notify("add", 1, 2)
            with explained(shmrpc.ConnectError):
                await client.ping()
            await client.close()
            with explained(shmrpc.Error):
                await ask_async(client, how, "add", 1, 2)

    run(main)


@pytest.mark.parametrize("options", [{}, {"fallback": "tcp://127.0.0.1:1"}], ids=["one", "both"])
def test_errors_of_connecting(run, directory, options):
    with explained(shmrpc.ConnectError):
        shmrpc.connect("nobody", timeout=0.5, **options)

    async def main():
        with explained(shmrpc.ConnectError):
            await aio.connect("nobody", timeout=0.5, **options)

    run(main)


@pytest.mark.parametrize("how", ["call", "submit", "items", "open"])
def test_errors_of_nested_calls(addresses, connect, how):
    """What a handler meets whose caller has no such method."""
    for address in addresses:
        client = connect(address)
        with pytest.raises(shmrpc.RemoteError) as caught:
            client.call("call_back", how, "missing")
        assert "MethodNotFound" in caught.value.remote_traceback
        assert "another exception" not in caught.value.remote_traceback
