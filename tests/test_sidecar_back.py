"""Calls in the other direction through a sidecar: a server calls a client that is behind it."""

import asyncio
import contextlib
import os
import threading
import time

import numpy as np
import pytest
from conftest import in_threads, wait_until
from duplex import nest, remaining
from sidecars import fds, pairs_of, starter

import shmrpc
from shmrpc import aio

HOWS = ("call", "submit", "stream", "items", "result")
PAIRS = [("shm", "shm"), ("tcp", "unix")]


between = pairs_of(PAIRS)


@pytest.fixture
def client(between, connect):
    return connect(between[1].address)


run = starter("sidecar")


def offer(client, *functions):
    for function in functions:
        client.method(function)
    return client


# ---- there and back ----


def test_nested_calls(client):
    offer(client, nest)
    for depth in range(1, 21):
        assert client.call("nest", depth, timeout=40) == depth


def test_each_client_is_called_back_itself(between, connect):
    """Also with several calls of each at the same time: the server never meets another one."""

    def work(number):
        client = connect(between[1].address)
        client.method(name="who")(lambda: number)

        def several(_):
            return {client.call("call_back", "call", "who", timeout=40) for _ in range(20)}

        return in_threads(3, several, timeout=60)

    assert in_threads(4, work, timeout=60) == [[{number}] * 3 for number in range(4)]


@pytest.mark.parametrize("how", HOWS)
def test_every_kind_of_call(client, how):
    @client.method
    def unary(a, b=2):
        return [a, b]

    @client.method
    def streamed(n):
        yield from range(n)

    if how in {"stream", "items"}:
        assert client.call("call_back", how, "streamed", 600) == list(range(600))
    else:
        assert client.call("call_back", how, "unary", 1, b=[None]) == [1, [None]]


def test_streams_of_messages(client):
    @client.method(requests=True)
    def doubled(requests):
        for item in requests:
            yield item * 2

    @client.method(requests=True)
    def summed(requests):
        return sum(requests)

    items = list(range(1000))
    assert client.call("upload_back", "doubled", items, timeout=40) == [2 * i for i in items]
    assert client.call("call_back", "result", "summed", timeout=40) == 0


def test_notifications(client):
    came = []

    @client.method
    def note(*args):
        came.append(args)

    client.call("notify_back", "note", 1, "two")
    wait_until(lambda: came == [(1, "two")])


def test_metadata(client):
    @client.method
    def answer():
        call = shmrpc.current_call()
        call.send_initial_metadata({"first": "1"})
        call.set_trailing_metadata({"last": b"\0"})
        return call.metadata

    found = client.call("metadata_back", "answer", {"key": "value"})
    assert found == [{"key": "value"}, {"first": "1"}, {"last": b"\0"}]


def test_errors(client):
    @client.method
    def refuses():
        raise shmrpc.Abort("NOT_FOUND", "no such order", details={"id": 7})

    name, text, code, *_ = client.call("call_back_outcome", "call", "refuses")
    assert (name, code) == ("RemoteError", "NOT_FOUND")
    assert "no such order" in text
    name, text, *_ = client.call("call_back_outcome", "call", "unknown")
    assert name == "MethodNotFound"


def test_large_values(client):
    array = np.arange(500_000)

    @client.method
    def returned(value):
        assert np.array_equal(value, array)
        return value

    for how in ("call", "submit"):
        assert np.array_equal(client.call("call_back", how, "returned", array), array)


def test_deadlines_and_cancelling(client):
    ended = threading.Event()

    @client.method
    def patient():
        client.notify("begun")
        call = shmrpc.current_call()
        while not call.cancelled:
            ended.wait(0.005)
        ended.set()
        time.sleep(0.5)  # its deadline has passed: let the callers notice first

    offer(client, remaining)
    assert 0 < client.call("call_back", "call", "remaining", timeout=30) <= 30
    with pytest.raises(shmrpc.Error) as caught:
        client.call("call_back", "call", "patient", timeout=0.3)
    assert caught.value.code == "DEADLINE_EXCEEDED"  # here or there, whoever sees it first
    assert ended.wait(20)
    ended.clear()
    client.call("cancel_back", "submit", "patient")
    assert ended.wait(20)


def test_callers_that_are_kept(between, client, connect):
    """The server calls when it likes, until the client has gone: then nothing is left of it."""
    server, sidecar = between
    came = []

    @client.method
    def note(number):
        came.append(number)
        return number

    # The connection that the sidecar makes for a client with methods is there from here on.
    assert client.call("call_back", "call", "note", 7) == 7
    came.clear()
    connect(sidecar.address).call("add", 1, 2)
    before = fds(sidecar.pid), server.fds()
    other = connect(sidecar.address)
    other.method(name="note")(came.append)
    other.call("kept.keep", "other")
    other.call("kept.later", "other", "note", [0, 0.02] * 3)
    wait_until(lambda: came == list(range(6)))
    watch = connect(server.address)
    wait_until(lambda: len(watch.call("kept.outcomes_of", "other")) == 6)
    other.close()
    wait_until(lambda: watch.call("kept.call", "other", "note", 1)[0] == "ConnectionLost")
    watch.close()
    wait_until(lambda: fds(sidecar.pid) <= before[0] and server.fds() <= before[1])


def test_a_call_back_holds_up_no_other_call(client):
    """Whoever waits for one call is not kept by what comes back for another."""
    reached, go = threading.Event(), threading.Event()

    @client.method
    def slow():
        reached.set()
        return go.wait(20)

    def hold(_):
        return client.call("call_back", "call", "slow", timeout=40)

    def quick(_):
        assert reached.wait(20)
        found = [client.call("echo", n, timeout=20) for n in range(20)]
        go.set()
        return found

    def work(number):
        return (hold, quick)[number](number)

    assert in_threads(2, work, timeout=40) == [True, list(range(20))]


def test_what_is_sent_before_the_end_arrives(between, connect, directory):
    """A caller that has methods, notifies and hangs up at once."""
    path = f"{directory}/notes"
    for number in range(5):
        client = offer(connect(between[1].address), nest)
        client.notify("note", path, f"words {number}")
        client.close()
    expected = {f"words {number}" for number in range(5)}

    def came():
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            return set(file.read().splitlines()) == expected
        return False

    wait_until(came)


# ---- ends ----


def test_ends(service, run, connect):
    """The server goes and comes back; the client goes while it is being called."""
    server = service("shm")
    run("--listen", "shm://front", "--upstream", server.address)
    client = offer(connect("front", retries=5), nest)
    assert client.call("nest", 3) == 3
    server.kill()
    with pytest.raises(shmrpc.ConnectionLost):
        connect("front").call("add", 1, 2)
    again = service(server.address)
    assert client.call("nest", 4, timeout=40) == 4

    reached = threading.Event()
    leaving = connect("front")

    @leaving.method
    def stays():
        reached.set()
        threading.Event().wait(1)

    future = leaving.submit("call_back_outcome", "call", "stays")
    assert reached.wait(20)
    leaving.close()
    assert future.exception(20) is not None
    watch = connect(again.address)
    wait_until(lambda: watch.call("call_back_outcomes"))
    assert watch.call("call_back_outcomes")[0][0] in {"ConnectionLost", "Cancelled"}


def test_a_chain_of_sidecars(service, run, connect):
    server = service("shm")
    run("--listen", "shm://inner", "--upstream", server.address)
    run("--listen", "tcp://127.0.0.1:0", "--upstream", "shm://inner")
    outer = run("--listen", "shm://outer", "--upstream", "shm://inner")
    client = offer(connect("outer"), nest)
    assert client.call("nest", 8, timeout=40) == 8
    client.close()
    assert outer.stop() == 0


def test_by_routes_with_policies(service, run, connect, directory):
    """Endpoints, retries and limits leave a caller its own connection."""
    servers = [service(f"shm://{directory}/{name}") for name in "ab"]
    path = f"{directory}/sidecar.toml"
    with open(path, "w") as file:
        file.write(
            f"""
            listen = ["shm://front"]
            [upstreams.both]
            endpoints = ["{servers[0].address}", "{servers[1].address}"]
            [[routes]]
            upstream = "both"
            retries = 2
            max_concurrency = 8
            """
        )
    run(path)
    client = offer(connect("front"), nest)
    assert {client.call("pid") for _ in range(10)} == {server.pid for server in servers}
    assert [client.call("nest", 3, timeout=40) for _ in range(6)] == [3] * 6


def test_addresses_that_are_removed(service, run, connect, directory):
    """Nothing stays of those who came by one: the server sees them go."""
    server = service("shm")
    path = f"{directory}/sidecar.toml"

    def write(listen):
        with open(f"{path}.new", "w") as file:
            file.write(
                f"listen = {listen}\n[upstreams.u]\nendpoints = '{server.address}'\n"
                "[[routes]]\nupstream = 'u'\n"
            )
        os.replace(f"{path}.new", path)

    write(["shm://front", "shm://other"])
    sidecar = run(path)
    assert offer(connect("other"), nest).call("nest", 3) == 3
    client = offer(connect("front"), nest)
    assert client.call("nest", 3) == 3
    with shmrpc.inspect(server.address) as inspector:
        assert inspector.stats()["conns"] == 2
        write(["shm://front"])
        assert sidecar.reload().startswith("reloaded")
        wait_until(lambda: inspector.stats()["conns"] == 1)
    assert client.call("nest", 3) == 3


def test_an_asynchronous_client(service, run):
    server = service("shm")
    sidecar = run("--listen", "shm://front", "--upstream", server.address)

    async def main():
        async with aio.connect(sidecar.address) as client:
            assert await client.call("echo", 1) == 1

            @client.method
            async def own(x):
                return x + 1

            @client.method
            async def pieces():
                for number in range(3):
                    yield number

            assert await client.call("call_back", "call", "own", 41) == 42
            assert await client.call("call_back", "stream", "pieces") == [0, 1, 2]

    asyncio.run(main())
