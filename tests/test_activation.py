"""Listening sockets from systemd, and what it is told: by its two protocols."""

import contextlib
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import address_of, wait_until
from restarting import (
    ACTIVATE,
    Load,
    call,
    connect_again,
    files,
    is_gone,
    listening,
    lock_owner,
    stop,
)

import shmrpc

OTHER_UID = 54321


@pytest.fixture
def supervised(transport, directory):
    """A supervisor's socket at an address."""
    sock, address = listening(address_of(transport, directory))
    with sock:
        yield sock, address


# ---- sockets from systemd ----


def test_socket_of_a_supervisor(supervised, transport, generations, connect, directory):
    """It is served, and left alone at the end; who comes in between waits for the next server."""
    sock, address = supervised
    first = generations(address, sockets=[sock])
    assert first.addresses == [address]
    client = connect(address)
    assert client.call("pid") == first.pid
    if transport != "tcp":
        assert lock_owner(address) == first.pid
    stop(address)
    assert first.process.wait(20) == 0
    assert files(directory) == ([] if transport == "tcp" else [Path(sock.getsockname()).name])
    pids = []
    waiting = threading.Thread(target=lambda: pids.append(client.call("pid")))
    waiting.start()
    second = generations(address, sockets=[sock])
    waiting.join(20)
    assert pids == [second.pid]


def test_restarts_by_a_supervisor_refuse_nobody(supervised, generations, connect):
    """Clients call all the time while server after server is stopped and the next one started."""
    sock, address = supervised
    running = generations(address, sockets=[sock])
    with Load(address, clients=3) as load:
        for _ in range(3):
            load.await_progress()
            os.kill(running.pid, signal.SIGTERM)
            assert running.process.wait(20) == 0
            running = generations(address, sockets=[sock])
        load.await_progress()
        assert running.pid in load.pids
    assert len(load.pids) == 4


def test_socket_of_a_name(generations, connect, directory, monkeypatch):
    with listening(f"unix://{directory}/calc.sock")[0] as sock:
        running = generations("calc", sockets=[sock])
        assert running.addresses == ["shm://calc"]
        assert connect("calc").call("pid") == running.pid


def test_several_sockets_in_any_order(generations, connect, directory):
    places = [address_of(transport, directory) for transport in ("shm", "unix", "tcp")]
    with contextlib.ExitStack() as stack:
        pairs = [listening(place) for place in places]
        socks = [stack.enter_context(sock) for sock, _ in pairs]
        addresses = [address for _, address in pairs]
        running = generations(*addresses, "extra", sockets=socks[::-1])
        assert running.addresses == [*addresses, "shm://extra"]
        for address in running.addresses:
            assert connect(address).call("pid") == running.pid
        stop("extra")
        assert files(directory) == ["calc-unix.sock", "calc.sock"]


def test_port_0_is_any_inherited_port(generations, connect):
    with listening("tcp://")[0] as sock:
        port = sock.getsockname()[1]
        running = generations("tcp://127.0.0.1:0", "tcp://localhost:0", sockets=[sock])
        assert running.addresses[0] == f"tcp://127.0.0.1:{port}"
        assert connect(running.addresses[0]).call("pid") == running.pid


def test_children_do_not_inherit(supervised, generations, connect):
    """Neither the variables nor the descriptors."""
    sock, address = supervised
    generations(address, sockets=[sock])
    client = connect(address)
    assert client.call("environment") == {}
    assert client.call("inheritable") == []


def test_variables_for_another_process(monkeypatch, directory):
    """As a child of the process that they were meant for sees them."""
    for value in (str(os.getppid()), "", "nonsense"):
        monkeypatch.setenv("LISTEN_PID", value)
        monkeypatch.setenv("LISTEN_FDS", "1")
        with shmrpc.Server("calc") as server, shmrpc.connect("calc") as client:
            assert client.ping() > 0
        assert server.addresses == []
        assert os.environ["LISTEN_FDS"] == "1"
        assert files(directory) == []


@pytest.mark.parametrize("count", ["", "-1", "many", "1000000"])
def test_variables_that_lie(monkeypatch, directory, caplog, count):
    """Whoever wrote them, the server serves, and the log says what was wrong."""
    code = (
        "import os, sys, logging, shmrpc\n"
        "logging.basicConfig()\n"
        "os.closerange(3, 1000)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[1])\n"
        "with shmrpc.Server('calc') as server, shmrpc.connect('calc') as client:\n"
        "    print(server.addresses, client.ping() > 0, 'LISTEN_FDS' in os.environ)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, count], check=True, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "['shm://calc'] True False"
    assert f"LISTEN_FDS is {count if count == '1000000' else repr(count)}" in run.stderr


def test_socket_that_nobody_serves(generations, connect, directory):
    """The server's own address works, and the log names the other."""
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(listening(f"unix://{directory}/other.sock")[0])
        datagrams = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        running = generations("calc", sockets=[other, datagrams])
        client = connect("calc")
        assert client.call("pid") == running.pid
        assert set(os.listdir(f"/proc/{running.pid}/fd")) >= {"3", "4"}  # for whoever wants them
        wait_until(lambda: running.log.count(b"WARNING") == 2)
        assert b"inherited descriptor 3 is unix://" in running.log
        assert b"other.sock, which is none of shm://calc" in running.log
        client.call("stop_and_start")
        again = connect_again(client)
        assert again == running.pid
        assert running.log.count(b"WARNING") == 2  # said once


def test_second_start_in_one_process(supervised, generations, connect):
    """A supervisor's socket is there for the next server of the process, too."""
    sock, address = supervised
    running = generations(address, sockets=[sock])
    client = connect(address)
    assert client.call("pid") == running.pid
    for _ in range(3):
        client.call("stop_and_start")
        assert connect_again(client) == running.pid
        client.close()
        client = connect(address)
    with pytest.raises(BlockingIOError):
        sock.setblocking(False)
        sock.accept()  # still the one that is served: nobody waits in its queue


def test_two_servers_of_one_process(directory, tmp_path):
    """Each takes its own sockets; what the second will take is not the first one's to lose."""
    code = (
        "import shmrpc, sys\n"
        "first, second = shmrpc.Server(sys.argv[1]), shmrpc.Server(sys.argv[2])\n"
        "with first, second:\n"
        "    for address in sys.argv[1:]:\n"
        "        with shmrpc.connect(address) as client: print(client.ping() > 0)\n"
    )
    addresses = [f"shm://{directory}/{name}.sock" for name in ("one", "two")]
    with listening(addresses[0])[0] as one, listening(addresses[1])[0] as two:
        fds = [one.fileno(), two.fileno()]
        python = [sys.executable, "-c"]
        run = subprocess.run(
            [*python, ACTIVATE, ",".join(map(str, fds)), *python, code, *addresses],
            check=True,
            capture_output=True,
            pass_fds=fds,
            text=True,
            timeout=60,
        )
    assert run.stdout.split() == ["True", "True"]
    assert files(directory) == ["one.sock", "two.sock"]


def test_second_server_is_told_that_one_lives(generations, directory):
    """Started by hand beside the service, it does not take the supervisor's socket away."""
    address = f"shm://{directory}/calc.sock"
    with listening(address)[0] as sock:
        running = generations(address, sockets=[sock])
        with pytest.raises(shmrpc.ConnectError, match=f"live server, pid {running.pid}"):
            shmrpc.Server(address).start()
        second = generations(address, sockets=[sock])
        assert f"live server, pid {running.pid}" in second.error
        assert call(address, "pid") == running.pid


def test_socket_in_a_directory_of_somebody_else(generations, connect, directory):
    """As in /run: the service can't make a lock there, and needs none."""
    address = f"shm://{directory}/calc.sock"
    with listening(address)[0] as sock:
        os.chmod(directory, 0o555)
        os.chmod(f"{directory}/calc.sock", 0o666)
        setup = {"options": {"allow_uids": [0]}, "uid": OTHER_UID} if os.getuid() == 0 else {}
        running = generations(address, sockets=[sock], **setup)
        client = connect(address, allow_uids=[OTHER_UID])
        assert client.call("pid") == running.pid
        client.call("stop")
        assert running.process.wait(20) == 0
        assert files(directory) == ["calc.sock"]
        assert stat.S_IMODE(os.stat(f"{directory}/calc.sock").st_mode) == 0o666
        os.chmod(directory, 0o700)


# ---- telling the supervisor ----


@pytest.fixture(params=["path", "abstract"])
def supervisor(request, directory):
    """A NOTIFY_SOCKET, and its name as the environment has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"{directory}/notify" if request.param == "path" else f"@{directory}"
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(20)
        yield sock, name


def test_ready_and_stopping(supervisor, generations, connect, directory):
    sock, name = supervisor
    generations("calc", env={"NOTIFY_SOCKET": name})
    assert sock.recv(100) == b"READY=1"
    client = connect("calc")
    assert client.call("environment") == {"NOTIFY_SOCKET": name}
    release = f"{directory}/release"
    future = client.submit("hold", release)
    wait_until(lambda: os.path.exists(f"{release}.running"))
    client.call("stop")
    assert sock.recv(100) == b"STOPPING=1"
    assert not future.done()  # it says so before it waits for anything
    Path(release).touch()
    future.result(20)


def test_nobody_to_tell(directory, monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/nobody")
    with caplog.at_level(logging.WARNING), shmrpc.Server("calc"), shmrpc.connect("calc") as client:
        assert client.ping() > 0
    assert "can't tell READY=1" in caplog.text


def test_supervisor_learns_of_each_successor(supervisor, generations, connect):
    """It is told the pid, or it would end the successor together with us."""
    sock, name = supervisor
    first = generations("calc", env={"NOTIFY_SOCKET": name})
    assert sock.recv(100) == b"READY=1"
    pid = first.pid
    for _ in range(3):
        client = connect("calc")
        successor = client.call("hand_over", {"addresses": ["calc"]})
        assert first.hear()["pid"] == successor
        assert sock.recv(100) == f"MAINPID={successor}".encode()
        client.call("stop")
        wait_until(lambda pid=pid: is_gone(pid))
        pid = successor
        assert call("calc", "environment") == {"NOTIFY_SOCKET": name}
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(100)  # those that have a successor do not say that the service stops
    sock.settimeout(20)
    stop("calc")
    assert sock.recv(100) == b"STOPPING=1"
