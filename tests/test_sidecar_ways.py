"""What the sidecar's core passes on by itself: as if it were not there, and nothing stays of it."""

import os
import threading

from conftest import in_threads, wait_until
from sidecars import fds, segments_of, starter

import shmrpc

run = starter("sidecar")


class Reversed:
    """A codec that nobody knows: text, backwards."""

    def encoder(self):
        return lambda value: (value[0] if isinstance(value, tuple) else value).encode()[::-1]

    def decode(self, data):
        return [bytes(data)[::-1].decode()]


def test_any_codec(run, directory, connect):
    """Bodies are bytes to it: also those that are no MessagePack."""
    server = shmrpc.Server("odd", codec=Reversed())
    server.method(str.upper, name="upper")
    with server:
        run("--listen", "shm://front", "--upstream", "shm://odd")
        client = connect("front", codec=Reversed())
        for number in range(20):  # also when the core knows its way
            assert client.call("upper", f"text {number}") == [f"TEXT {number}"]


def test_nothing_is_left_of_upstreams_that_were_lost(service, run, connect):
    """Threads that have nothing to do keep no connection, either."""
    server = service("shm")
    sidecar = run("--listen", "shm://front", "--upstream", server.address)
    barrier = threading.Barrier(8)

    def work(_):
        with shmrpc.connect("front", retries=20) as client:
            barrier.wait(20)
            return {client.call("echo", n) == n for n in range(100)}

    def held():
        return fds(sidecar.pid), segments_of(sidecar.pid)

    client = connect("front", retries=20)
    assert in_threads(8, work, timeout=60) == [{True}] * 8
    assert client.call("pid") == server.pid
    before = held()
    for how in ("kill", "stop", "kill"):
        getattr(server, how)()
        server = service(server.address)
        assert in_threads(8, work, timeout=60) == [{True}] * 8
        assert client.call("pid") == server.pid
    wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))


def test_retries_and_reloads_meet_the_next_call(service, run, connect, directory):
    """A changed route is taken by who has passed the method on before, each time."""
    servers = [service(f"shm://{directory}/{name}") for name in "ab"]
    path = f"{directory}/sidecar.toml"

    def write(server, extra=""):
        with open(f"{path}.new", "w") as file:
            file.write(
                f'listen = "shm://front"\n[upstreams.u]\nendpoints = "{server.address}"\n'
                f'[[routes]]\nupstream = "u"\n{extra}'
            )
        os.replace(f"{path}.new", path)

    write(servers[0])
    sidecar = run(path)
    client = connect("front")
    for turn in range(6):
        server = servers[turn % 2]
        write(server, extra="timeout = 20.0\n" if turn % 3 else "")
        sidecar.reload()
        assert {client.call("pid") for _ in range(30)} == {server.pid}
