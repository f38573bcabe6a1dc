"""A server gives its listening sockets to its successor: a restart refuses nobody."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import address_of, in_threads, wait_until
from restarting import (
    Load,
    call,
    connect_again,
    files,
    is_gone,
    listening,
    lock_owner,
    stop,
)
from test_connecting import HANDSHAKE, HELLO, WELCOME, message, raw_socket

import shmrpc
from shmrpc.acceptor import Acceptor

OTHER_UID = 54321


def stale_watches(pid):
    """What this process's epolls watch though it is closed there: it is open in a successor."""
    found = []
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        for fd, inode in re.findall(r"^tfd: *(\d+).* ino:(\w+)", info.read_text(), re.MULTILINE):
            place = Path(f"/proc/{pid}/fd/{fd}")
            if not place.exists() or place.stat().st_ino != int(inode, 16):
                found.append((fd, inode))
    return found


def test_chain_of_successors(transport, generations, connect, directory):
    """Five of them, one after the other, under load: nobody is refused, nobody hangs."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    before = files(directory)
    pid = first.pid
    fds = []
    with Load(address, clients=4) as load:
        for _ in range(5):
            load.await_progress()
            old = shmrpc.connect(address)
            successor = old.call("hand_over", {"addresses": [address]}, timeout=20)
            assert first.hear() == {"addresses": [address], "pid": successor}
            with shmrpc.connect(address) as new, pytest.raises(shmrpc.MethodNotFound) as caught:
                assert new.call("pid") == successor  # who comes now, comes to the new one
                new.call("nothing")
            assert f"pid {successor}" in str(caught.value)
            assert old.call("pid") == pid  # who was there, is served on
            if transport != "tcp":
                assert lock_owner(address) == successor
            old.call("stop")
            wait_until(lambda pid=pid: is_gone(pid), 20)
            assert connect_again(old) == successor
            old.close()
            pid = successor
            fds.append(len(os.listdir(f"/proc/{pid}/fd")))
        load.await_progress()
        assert pid in load.pids
    assert len(load.pids) == 6
    assert load.repeated
    assert first.process.wait(20) == 0
    assert files(directory) == before
    # They hold what they serve: a number that goes up and down with the load, but does not grow.
    assert max(fds) - min(fds) < 60
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < min(fds))
    stop(address)
    assert files(directory) == []
    with pytest.raises(shmrpc.ConnectError):
        shmrpc.connect(address)


def test_who_is_being_let_in_during_the_switch(transport, generations, directory):
    """Whichever of the two has accepted a connection, finishes its handshake."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    with raw_socket(address) as sock, shmrpc.connect(address) as client:
        sock.settimeout(20)
        hello = message(HELLO, transport)
        sock.sendall(hello[:10])
        successor = client.call("hand_over", {"addresses": [address]})
        assert call(address, "pid") == successor
        sock.sendall(hello[10:])
        welcome = HANDSHAKE.unpack(sock.recv(64))
        assert welcome[2] == WELCOME
        assert welcome[4] == first.pid


def test_who_waits_in_the_queue_is_served(transport, generations, directory):
    """A server that does not get to accepting leaves those who wait to its successor."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    successor = call(address, "hand_over", {"addresses": [address]})
    os.kill(successor, signal.SIGSTOP)
    waiting = [
        threading.Thread(target=lambda: pids.append(call(address, "pid"))) for _ in range(10)
    ]
    pids = []
    for thread in waiting:
        thread.start()
    os.kill(first.pid, signal.SIGTERM)
    assert first.process.wait(20) == 0
    assert not pids
    os.kill(successor, signal.SIGCONT)
    for thread in waiting:
        thread.join(20)
    assert pids == [successor] * 10


def test_calls_that_run_end_where_they_run(transport, generations, connect, directory):
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    release = f"{directory}/release"
    future = client.submit("hold", release)
    wait_until(lambda: os.path.exists(f"{release}.running"))
    successor = client.call("hand_over", {"addresses": [address]})
    assert stale_watches(first.pid) == []
    client.call("stop")
    assert connect_again(client) == successor
    assert not future.done()
    Path(release).touch()
    assert future.result(20) == first.pid
    assert first.process.wait(20) == 0


def test_all_addresses_are_handed_over(generations, connect, directory):
    places = [address_of(transport, directory) for transport in ("shm", "unix", "tcp")]
    first = generations(*places, "named")
    before = files(directory)
    successor = connect("named").call("hand_over", {"addresses": [*places, "named", "more"]})
    connect("named").call("pid")
    assert first.hear()["addresses"] == [*first.addresses, "shm://more"]  # port 0: the same port
    with shmrpc.connect("named") as client:
        assert client.call("pid") == successor
    os.kill(first.pid, signal.SIGTERM)
    assert first.process.wait(20) == 0
    for address in [*first.addresses, "more"]:
        assert call(address, "pid") == successor
    assert files(directory) == sorted([*before, "more.sock", "more.sock.lock"])
    stop("more")
    assert files(directory) == []


def test_supervisors_socket_is_handed_on(transport, generations, directory):
    """Whoever ends last, it is the supervisor's to remove."""
    sock, address = listening(address_of(transport, directory))
    with sock:
        first = generations(address, sockets=[sock])
        for _ in range(2):
            with shmrpc.connect(address) as client:
                pid = client.call("hand_over", {"addresses": [address]})
                client.call("stop")
            assert call(address, "pid") == pid
        assert first.process.wait(20) == 0
        stop(address)
        assert [name for name in files(directory) if name.endswith(".lock")] == []
        generations(address, sockets=[sock])
        assert call(address, "pid") not in {first.pid, pid}


def test_successor_with_other_permissions(generations, directory):
    """The socket's mode is that of who serves, also when a successor has failed."""
    address = f"shm://{directory}/calc.sock"
    first = generations(address)
    shared = {"addresses": [address], "options": {"allow_uids": [OTHER_UID]}}
    mode = lambda: stat.S_IMODE(os.stat(f"{directory}/calc.sock").st_mode)  # noqa: E731
    with pytest.raises(shmrpc.RemoteError):
        call(address, "hand_over", {**shared, "addresses": [address, "unix:///proc/x.sock"]})
    assert mode() == 0o600
    call(address, "hand_over", shared)
    assert mode() == 0o666
    os.kill(first.pid, signal.SIGTERM)
    first.process.wait(20)


# ---- successors that fail ----


def fails(client, method, *args):
    """How a handing over fails that is made in the server."""
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call(method, *args)
    assert caught.value.type == "shmrpc.errors.ConnectError"
    return caught.value.message


@pytest.mark.parametrize(
    "setup, text",
    [
        ({"behaviour": "crash"}, "ended with status 7 instead of serving; this server goes on"),
        ({"addresses": ["unix:///proc/x.sock"]}, "ended with status 4"),
        ({"addresses": []}, "ended with status 1"),
    ],
    ids=["crashes", "takes the socket and fails", "does not know the address"],
)
def test_successor_that_fails(transport, generations, connect, directory, setup, text):
    """All is as before, as often as it happens, and the next one succeeds."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    if "addresses" in setup:
        known = [address] if setup["addresses"] else ["other"]
        setup = {"addresses": [*known, *setup["addresses"]]}
        text = "ended with status 4"
    client = connect(address)
    before = files(directory)
    fds = len(os.listdir(f"/proc/{first.pid}/fd"))
    with Load(address, clients=2) as load:
        for _ in range(3):
            assert text in fails(client, "hand_over", setup)
            if "addresses" in setup:
                assert ("handed over" in first.hear()["error"]) == ("other" in setup["addresses"])
            load.await_progress(5)
        assert load.pids == {first.pid}
        assert not load.repeated
    assert files(directory) == before
    wait_until(lambda: len(os.listdir(f"/proc/{first.pid}/fd")) <= fds)
    if transport != "tcp":
        assert lock_owner(address) == first.pid
    successor = client.call("hand_over", {"addresses": [address]})
    assert call(address, "pid") == successor


def test_successor_that_never_gets_ready(transport, generations, connect, directory):
    """It is killed; who calls meanwhile notices nothing."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    with Load(address, clients=2) as load:
        text = fails(client, "hand_over", {"behaviour": "never ready"}, 0.3)
        assert "was not ready within 0.3 s and was killed; this server goes on" in text
        assert is_gone(int(re.search(r"pid (\d+)", text)[1]))
        load.await_progress(5)
        assert load.pids == {first.pid}
        assert not load.repeated


def test_who_else_says_that_it_is_ready(generations, connect):
    """Only the successor's own word counts."""
    generations("calc")
    code = (
        "import os, subprocess, sys\n"
        "say = 'import os, socket; socket.socket(1, 2).sendto(b\"READY=1\", '\n"
        'say += \'os.environ["NOTIFY_SOCKET"].replace("@", chr(0)))\'\n'
        "subprocess.run([sys.executable, '-c', say], check=True)\n"
        "sys.exit(9)\n"
    )
    text = fails(connect("calc"), "run_successor", [sys.executable, "-c", code])
    assert "ended with status 9" in text


def test_successor_that_is_no_shmrpc_server(generations, connect):
    """Any program that speaks the two protocols will do."""
    first = generations("tcp://127.0.0.1:0")
    code = (
        "import os, select, socket\n"
        "assert os.environ['LISTEN_PID'] == str(os.getpid()), os.environ\n"
        "listener = socket.socket(fileno=3)\n"  # non-blocking: two processes have it
        "notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "notify.sendto(b'STATUS=about to serve\\nREADY=1\\n', "
        "os.environ['NOTIFY_SOCKET'].replace('@', chr(0)))\n"
        "select.select([listener], [], [])\n"
        "sock, _ = listener.accept()\n"
        "sock.sendall(os.environ['GREETING'].encode())\n"
    )
    client = connect(first.addresses[0])
    pid = client.call(
        "run_successor", [sys.executable, "-c", code], {**os.environ, "GREETING": "x"}
    )
    port = int(first.addresses[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(20)
        assert sock.recv(10) == b"x"
    assert pid != first.pid


@pytest.mark.parametrize("command", ["", [], "python server.py"])
def test_command_that_is_none(directory, command):
    with shmrpc.Server("calc") as server:
        with pytest.raises(ValueError, match="command must be a program and its arguments"):
            server.hand_over(command)
        with pytest.raises(ValueError, match="timeout"):
            server.hand_over(["true"], timeout=-1)
        with pytest.raises(shmrpc.ConnectError, match=r"'/no/such/program'.* ended with status 1"):
            server.hand_over(["/no/such/program"])
        with shmrpc.connect("calc") as client:
            assert client.ping() > 0


def test_server_that_does_not_listen(directory):
    server = shmrpc.Server("calc")
    with pytest.raises(shmrpc.Error, match="does not listen: it was not started"):
        server.hand_over(["true"])
    with server, subprocess.Popen(["true"]):
        pass
    with pytest.raises(shmrpc.Error, match="does not listen"):
        server.hand_over(["true"])


def test_handler_that_hands_over_while_the_server_still_starts(directory, monkeypatch):
    """It may be called before ``start`` returns, and waits for that."""
    address = address_of("shm", directory)
    called = threading.Event()
    accept = Acceptor.start

    def start(acceptor):
        accept(acceptor)
        assert called.wait(20)

    monkeypatch.setattr(Acceptor, "start", start)
    server = shmrpc.Server(address)

    @server.method
    def hand_over():
        threading.Timer(0.05, called.set).start()
        server.hand_over(["false"])

    starting = threading.Thread(target=server.start)
    starting.start()
    try:
        wait_until(lambda: server.addresses)
        client = shmrpc.connect(address, timeout=20)
        with client, pytest.raises(shmrpc.RemoteError, match="successor"):
            client.call("hand_over")
    finally:
        called.set()
        starting.join(20)
        server.stop()


def test_second_successor(generations, connect):
    """Who has handed over has nothing left to hand over."""
    generations("calc")
    client = connect("calc")
    client.call("hand_over", {"addresses": ["calc"]})
    with pytest.raises(shmrpc.RemoteError, match="has handed over already"):
        client.call("hand_over", {"addresses": ["calc"]})


def test_stop_ends_a_handing_over(generations, directory):
    """The successor is killed before anything is removed that it might already have."""
    started = f"{directory}/started"
    code = f"import os, time; open({started!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    server = shmrpc.Server("calc")
    errors = []

    def hand_over():
        try:
            server.hand_over([sys.executable, "-c", code], timeout=60)
        except shmrpc.Error as error:
            errors.append(error)

    with server:
        thread = threading.Thread(target=hand_over)
        thread.start()
        pid = int(wait_until(lambda: os.path.exists(started) and Path(started).read_text(), 20))
        with pytest.raises(shmrpc.Error, match="handed over by another thread"):
            server.hand_over(["true"])
        server.stop()
        thread.join(20)
    assert len(errors) == 1
    assert "was stopped while the successor" in str(errors[0])
    assert is_gone(pid)
    assert files(directory) == ["started"]


# ---- deaths ----


@pytest.mark.parametrize("moment", ["at once", "while it drains"])
def test_old_server_is_killed(transport, generations, connect, directory, moment):
    """Its clients go to the successor; what ran there may have run."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    future = client.submit("hold", f"{directory}/never")
    wait_until(lambda: os.path.exists(f"{directory}/never.running"))
    successor = client.call("hand_over", {"addresses": [address]})
    if moment == "while it drains":
        client.call("stop")
    os.kill(first.pid, signal.SIGKILL)
    first.process.wait()
    assert future.exception(20).outcome == "unknown"
    assert connect(address).call("pid") == successor
    assert in_threads(4, lambda _: call(address, "pid")) == [successor] * 4
    assert client.call("pid") == successor
    if transport != "tcp":
        assert lock_owner(address) == successor
        with pytest.raises(shmrpc.ConnectError, match=f"in use by a live server, pid {successor}"):
            shmrpc.Server(address).start()
    os.kill(successor, signal.SIGKILL)
    wait_until(lambda: is_gone(successor))
    third = generations(address)
    assert call(address, "pid") == third.pid


def test_old_server_is_killed_while_its_successor_starts(transport, generations, directory):
    """Whoever is left serves: the successor has all that it needs."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    go = f"{directory}/go"
    setup = {"addresses": [address], "behaviour": "wait", "until": go}
    with shmrpc.connect(address) as client:
        future = client.submit("hand_over", setup)
        successor = first.hear()["pid"]
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait()
        assert future.exception(20).outcome == "unknown"
    pids = []
    waiting = threading.Thread(target=lambda: pids.append(call(address, "pid")))
    waiting.start()  # the socket is open, and somebody will come
    Path(go).touch()
    assert first.hear() == {"addresses": [address], "pid": successor}
    waiting.join(20)
    assert pids == [successor]
    stop(address)
    os.unlink(go)
    assert files(directory) == []


def test_successor_is_killed_while_the_old_server_drains(
    transport, generations, connect, directory
):
    """Nothing that is left keeps the next server from starting."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    release = f"{directory}/release"
    future = client.submit("hold", release)
    wait_until(lambda: os.path.exists(f"{release}.running"))
    successor = client.call("hand_over", {"addresses": [address]})
    os.kill(successor, signal.SIGKILL)
    wait_until(lambda: is_gone(successor))
    third = generations(address)
    assert third.addresses == [address]
    assert call(address, "pid") == third.pid
    client.call("stop")
    Path(release).touch()
    assert future.result(20) == first.pid
    assert first.process.wait(20) == 0
    assert call(address, "pid") == third.pid  # it has taken nothing along
