"""Two hosts: applications that speak shm alone, joined by a sidecar on each."""

import contextlib
import os
import secrets
import subprocess
import sys

import pytest
from conftest import SERVICES, Service, wait_until
from sidecars import Command

import shmrpc


def quietly(*command):
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts(directory):
    """For each of two hosts the prefix of commands that run there, and its IP address.

    Network namespaces with a cable between them, where that is allowed; else loopback addresses.
    """
    tag = secrets.token_hex(3)
    names = [f"rpc-{tag}-{side}" for side in "ab"]
    cables = [f"v{tag}{side}" for side in "ab"]
    places = ["10.213.77.1", "10.213.77.2"]
    try:
        made = all(quietly("ip", "netns", "add", name) for name in names) and quietly(
            *("ip", "link", "add", cables[0], "netns", names[0]),
            *("type", "veth", "peer", "name", cables[1], "netns", names[1]),
        )
        for name, cable, place in zip(names, cables, places, strict=True):
            made = made and quietly("ip", "-n", name, "addr", "add", f"{place}/24", "dev", cable)
            made = made and quietly("ip", "-n", name, "link", "set", cable, "up")
        if made:
            yield [(("ip", "netns", "exec", n), p) for n, p in zip(names, places, strict=True)]
        else:
            yield [((), "127.0.0.2"), ((), "127.0.0.3")]
    finally:
        for name in names:
            quietly("ip", "netns", "del", name)


CALLER = """
import shmrpc, sys
with shmrpc.connect("shm://far", timeout=10) as client:
    print(client.call("echo", b"x" * 200_000, timeout=30) == b"x" * 200_000)
    print(client.call("context", timeout=30)["method"], list(client.stream("count", 4)))
    with client.open("total") as call:
        for n in range(1000):
            call.send(n)
        print(call.result())
    try:
        client.call("abort", "NOT_FOUND", "gone", {"id": 1})
    except shmrpc.RemoteError as error:
        print(error.code, error.message, error.details)
    client.notify("remember", "from afar")
    future = client.submit("hold_until_cancelled")
    while not client.call("running"):
        pass
    future.cancel()
    while client.call("running"):
        pass
    print(client.call("remembered"))
"""


def test_two_hosts(hosts, directory):
    (here, _), (there, place) = hosts
    with contextlib.ExitStack() as stack:
        server = Service("shm://near", prefix=there, program=SERVICES)
        stack.callback(server.close)
        far = ("--listen", f"tcp://{place}:0", "--allow-remote", "--upstream", "shm://near")
        inbound = Command("sidecar", *far, prefix=there)
        stack.callback(inbound.close)
        near = ("--listen", "shm://far", "--upstream", inbound.address)
        outbound = Command("sidecar", *near, prefix=here)
        stack.callback(outbound.close)
        caller = subprocess.run(
            [*here, sys.executable, "-c", CALLER],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert caller.stdout.splitlines() == [
            "True",
            "context [0, 1, 2, 3]",
            "499500",
            "NOT_FOUND gone {'id': 1}",
            "['from afar']",
        ], caller.stderr
        if here:  # a real cable: nobody on this host reaches it
            with pytest.raises(shmrpc.ConnectError):
                shmrpc.connect(inbound.address, timeout=0.3)
        inbound.process.kill()
        with shmrpc.connect("far") as client:

            def fails():
                try:
                    client.call("pid", timeout=20)
                except shmrpc.ConnectionLost as error:
                    return error.outcome
                return None

            assert wait_until(fails) in {"not_started", "unknown"}
            assert fails() == "not_started"
        assert outbound.stop() == 0
    assert not os.path.exists(f"{directory}/far.sock")


def test_an_address_of_other_hosts_has_to_be_allowed(directory):
    listen = ("--listen", "tcp://0.0.0.0:0", "--upstream", "shm://x")
    refused = Command("sidecar", *listen, ready=False)
    try:
        assert refused.wait() == 2
        assert "--allow-remote" in refused.said
    finally:
        refused.close()
    allowed = Command("sidecar", *listen, "--allow-remote")
    try:
        assert allowed.address.startswith("tcp://0.0.0.0:")
        assert allowed.stop() == 0
    finally:
        allowed.close()
