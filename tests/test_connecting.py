"""Finding each other, or saying why not."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import (
    SERVICES,
    SLACK,
    Service,
    address_of,
    as_root,
    in_mount_namespace,
    wait_until,
)

import shmrpc
from shmrpc import aio

# docs/protocol.md: magic, version, kind, transport, pid, ring, max message, reason, zero
HANDSHAKE = struct.Struct("<8sHBBIIIII32x")
MAGIC = b"shmrpc\r\n"
TRANSPORT_NUMBER = {"shm": 1, "unix": 2, "tcp": 3}
HELLO, WELCOME, REFUSE = 1, 2, 5
OTHER_UID = 54321


def refused(address, match, **options):
    with pytest.raises(shmrpc.ConnectError, match=match) as caught:
        shmrpc.connect(address, **options)
    assert caught.value.code == "UNAVAILABLE"
    return str(caught.value)


def raw_socket(address):
    scheme, _, place = address.partition("://")
    if scheme == "tcp":
        host, _, port = place.rpartition(":")
        return socket.create_connection((host, int(port)))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(place)
    return sock


def listening(transport, directory):
    """A listener of ours, which is no server, and its address."""
    if transport == "tcp":
        sock = socket.create_server(("127.0.0.1", 0))
        return sock, f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    path = os.path.join(directory, "raw.sock")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    return sock, f"{transport}://{path}"


def message(kind, transport, version=1, magic=MAGIC, reason=b""):
    number = TRANSPORT_NUMBER[transport]
    return HANDSHAKE.pack(magic, version, kind, number, 1, 65536, 1 << 20, len(reason), 0) + reason


def run_python(code, *arguments, timeout=60):
    """Run a program in a process of its own; what it prints."""
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=SERVICES.parent,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ---- nobody there, or nobody we know ----


def test_nobody_there(directory):
    text = refused("nobody", "no server has made")
    assert "nobody" in text
    refused(f"unix://{directory}/nobody.sock", "no server has made")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    refused(f"tcp://127.0.0.1:{port}", "nobody listens")
    refused("tcp://no-such-host.invalid:1", "no-such-host.invalid", timeout=20)


def test_connection_refused(directory):
    """The socket file is there, and nobody listens."""
    path = os.path.join(directory, "dead.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    for scheme in ("shm", "unix"):
        refused(f"{scheme}://{path}", "nobody listens there")


@pytest.mark.parametrize(
    "address, text",
    [
        ("", "expected a name"),
        (None, "expected a name"),
        ("a name", "64 letters"),
        ("../x", "64 letters"),
        ("x" * 65, "64 letters"),
        ("shm://", "64 letters"),
        ("unix://relative", "absolute path"),
        ("http://host", "unknown scheme 'http'"),
        ("tcp://host", "HOST:PORT"),
        ("tcp://host:65536", "HOST:PORT"),
        ("tcp://:1", "HOST:PORT"),
        ("tcp://::1:80", "HOST:PORT"),
        ("tcp://host:-1", "HOST:PORT"),
        ("unix:///" + "x" * 200, "longer than 107"),
        ("shm:///nul\0byte", "nul|null"),
        ("tcp://nul\0byte:80", "."),
        ("tcp://a..b:80", "."),
        ("tcp://" + "x" * 300 + ":80", "."),
        ("tcp://\udc80:80", "."),
    ],
)
def test_bad_addresses(directory, address, text):
    refused(address, text)
    with pytest.raises(shmrpc.ConnectError, match=text):
        shmrpc.Server(address).start()


def test_addresses_that_cannot_be_listened_at(directory):
    for address in (
        f"unix://{directory}",
        f"unix://{directory}/no/such/directory.sock",
        "unix:///proc/x.sock",
        "tcp://192.0.2.1:80",
    ):
        with pytest.raises(shmrpc.ConnectError, match="can't listen"):
            shmrpc.Server(address).start()
    file = Path(directory, "file")
    file.write_text("precious")
    with pytest.raises(shmrpc.ConnectError, match="not a socket"):
        shmrpc.Server(f"unix://{file}").start()
    assert file.read_text() == "precious"


def test_one_bad_address_of_several(directory):
    """The server does not start, and the good one is free again."""
    server = shmrpc.Server("good", "unix:///proc/x.sock")
    with pytest.raises(shmrpc.ConnectError):
        server.start()
    assert not [name for name in os.listdir(directory) if name.endswith(".sock")]
    with shmrpc.Server("good"), shmrpc.connect("good") as client:
        assert client.ping() > 0


def test_rendezvous_directory(monkeypatch, directory):
    monkeypatch.setenv("SHMRPC_DIR", f"{directory}/new/deep")
    with shmrpc.Server("calc") as server:
        assert server.addresses == ["shm://calc"]
        assert stat.S_IMODE(os.stat(f"{directory}/new/deep").st_mode) == 0o700
    monkeypatch.delenv("SHMRPC_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
    with shmrpc.Server("calc"), shmrpc.connect("calc") as client:
        assert client.ping() > 0
        assert os.path.exists(f"{directory}/shmrpc/calc.sock")
        assert stat.S_IMODE(os.stat(f"{directory}/shmrpc").st_mode) == 0o700
    Path(directory, "file").touch()
    monkeypatch.setenv("SHMRPC_DIR", f"{directory}/file")
    with pytest.raises(shmrpc.ConnectError, match="SHMRPC_DIR"):
        shmrpc.Server("calc").start()


# ---- something else there ----


@pytest.mark.parametrize(
    "answer, text",
    [
        (b"HTTP/1.1 400 Bad Request\r\n" * 9, "does not speak shmrpc"),
        (b"", "closed the connection"),
        (b"short", "closed the connection"),
        ("version", "version 77"),
        ("kind", "message 4 instead of 2"),
        ("refuse", "refused by the peer: because"),
        ("refuse-garbage", "refused by the peer"),
        ("transport", "serves"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_the_server_says(transport, directory, answer, text):
    other = "unix" if transport != "unix" else "tcp"
    answers = {
        "version": message(WELCOME, transport, version=77),
        "kind": message(4, transport),
        "refuse": message(REFUSE, transport, reason=b"because"),
        "refuse-garbage": message(REFUSE, transport, reason=b"\xff\xfe"),
        "transport": message(WELCOME, other),
    }
    sock, address = listening(transport, directory)

    def serve():
        connection, _ = sock.accept()
        with connection:
            connection.recv(64)
            connection.sendall(answers.get(answer, answer))

    thread = threading.Thread(target=serve)
    thread.start()
    with sock:
        refused(address, text)
        thread.join()


def test_server_that_says_nothing(transport, directory):
    sock, address = listening(transport, directory)
    with sock:
        start = time.monotonic()
        refused(address, "did not answer in time|no answer", timeout=0.3)
        assert 0.29 < time.monotonic() - start < 0.3 + 0.2 * SLACK


@pytest.mark.parametrize(
    "hello, text",
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, b"does not speak shmrpc"),
        ("version", b"version 77"),
        ("kind", b"message 4 instead of 1"),
    ],
    ids=["http", "version", "kind"],
)
def test_what_the_client_says(transport, service, connect, hello, text):
    """The server refuses with a sentence, and serves the others."""
    running = service(transport)
    hellos = {"version": message(HELLO, transport, version=77), "kind": message(4, transport)}
    for _ in range(3):
        with raw_socket(running.address) as sock:
            sock.settimeout(5)
            sock.sendall(hellos.get(hello, hello))
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(4096):
                    answer += part
        assert HANDSHAKE.unpack(answer[:64])[2] == REFUSE
        assert text in answer[64:]
    assert connect(running.address).call("add", 1, 2) == 3


def test_silent_clients_hold_up_nobody(transport, service, connect):
    running = service(transport)
    connect(running.address).call("add", 1, 2)
    before = running.fds()
    with contextlib.ExitStack() as stack:
        for number in range(50):
            sock = stack.enter_context(raw_socket(running.address))
            sock.sendall(message(HELLO, transport)[: number % 64])
        start = time.monotonic()
        client = connect(running.address)
        assert client.call("add", 1, 2) == 3
        assert time.monotonic() - start < 1 * SLACK
    wait_until(lambda: running.fds() <= before + 4)


@pytest.mark.slow
def test_silent_client_is_hung_up_on(transport, service):
    running = service(transport)
    with raw_socket(running.address) as sock:
        sock.settimeout(5 * SLACK)
        start = time.monotonic()
        while sock.recv(4096):
            pass
        assert time.monotonic() - start > 4


def test_wrong_transport(service, directory):
    running = service("shm", "unix")
    shm, unix = (address.partition("://")[2] for address in running.addresses)
    refused(f"unix://{shm}", "shm://")
    refused(f"shm://{unix}", "unix://")


# ---- one server to a name ----


def test_stale_socket_does_not_block_a_restart(transport, service, connect, directory):
    running = service(transport)
    address = running.address
    running.kill()
    if transport != "tcp":
        assert os.path.exists(address.partition("://")[2])
    refused(address, "nobody listens")
    assert connect(service(address).address).call("add", 1, 2) == 3


def test_second_server_is_told_who_has_the_name(transport, service, connect):
    running = service(transport)
    match = "in use" if transport == "tcp" else f"in use by a live server, pid {running.pid}"
    with pytest.raises(shmrpc.ConnectError, match=f"(?i){match}"):
        shmrpc.Server(running.address).start()
    with pytest.raises(shmrpc.ConnectError, match=f"(?i){match}"):
        Service(running.address)
    assert connect(running.address).call("pid") == running.pid


def test_clean_stop_leaves_no_files(service, directory):
    running = service("shm", "unix", "tcp", "named")
    assert len(os.listdir(directory)) == 6  # three sockets and their locks
    assert running.stop() == 0
    assert os.listdir(directory) == []
    for address in running.addresses:
        refused(address, "no server has made|nobody listens")


@pytest.mark.parametrize("transport", ["shm", "unix"])  # whose a port is the kernel knows
def test_many_servers_race_for_one_name(transport, directory):
    address = address_of(transport, directory)
    services = [Service(address, wait=False) for _ in range(4)]
    winners = []
    for candidate in services:
        with contextlib.suppress(shmrpc.ConnectError):
            winners.append(candidate.wait_ready())
    assert len(winners) == 1
    with shmrpc.connect(address) as client:
        assert client.call("pid") == winners[0].pid
    winners[0].close()


def test_tcp_port_zero(service):
    running = service("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "tcp://localhost:0")
    ports = {int(address.rpartition(":")[2]) for address in running.addresses}
    assert len(ports) == 3
    assert 0 not in ports


def test_ipv6(service, connect):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback")
    running = service("tcp://[::1]:0")
    assert running.address.startswith("tcp://[::1]:")
    assert connect(running.address).call("add", 1, 2) == 3


# ---- other users ----

CLIENT = """
import os, sys, shmrpc, services
address, uid, allow = sys.argv[1], int(sys.argv[2]), [int(u) for u in sys.argv[3].split()]
services.drop_privileges(uid)
try:
    with shmrpc.connect(address, allow_uids=allow) as client:
        print(client.call("add", 40, 2), client.call("context")["peer"][1:], end=" ")
        big = b"x" * 3_000_000
        print(client.call("echo", big) == big, end=" ")
        maps = [line for line in open("/proc/self/maps") if "/shmrpc-" in line or "memfd:" in line]
        print("memfd" if maps and all("memfd:shmrpc" in line for line in maps) else maps, end=" ")
        try:
            client.call("raise_error", "ValueError", "x")
        except shmrpc.RemoteError as error:
            print(repr(error.remote_traceback))
except shmrpc.ConnectError as error:
    print(error)
"""


def run_client(address, uid=OTHER_UID, allow="0"):
    return run_python(CLIENT, address, uid, allow)


@as_root
def test_permission_denied(service, directory):
    running = service("calc")
    os.chmod(directory, 0o700)
    assert "permission denied" in run_client(f"shm://{directory}/calc.sock")
    assert running.process.poll() is None


@as_root
def test_uid_that_is_not_allowed(service, directory):
    os.chmod(directory, 0o755)
    running = service("shm", "unix", umask=0)
    for address in running.addresses:
        for _ in range(2):
            text = run_client(address)
            assert f"uid {OTHER_UID}" in text or "permission denied" in text
        text = run_client(address, allow="")
        assert "not in allow_uids" in text or "permission denied" in text
    with shmrpc.connect(running.address) as client:
        assert client.call("add", 1, 2) == 3


@as_root
@pytest.mark.parametrize("where", ["shm", "unix"])
def test_uid_that_is_allowed(service, directory, where):
    """Sealed memory, and no tracebacks. The socket is open to whom allow_uids names."""
    os.chmod(directory, 0o755)
    running = service(where, allow_uids=[OTHER_UID])
    expected = f"42 [{OTHER_UID}, {OTHER_UID}] True {'memfd' if where == 'shm' else '[]'} ''"
    assert run_client(running.address) == expected
    assert f"uid {OTHER_UID + 1}" in run_client(running.address, uid=OTHER_UID + 1)
    refused_text = run_client(running.address, allow="")
    assert "uid 0" in refused_text


@as_root
def test_server_of_another_user(service, directory, connect):
    os.chmod(directory, 0o755)
    home = os.path.join(directory, "home")
    os.mkdir(home)
    os.chown(home, OTHER_UID, OTHER_UID)
    running = service(f"shm://{home}/calc.sock", uid=OTHER_UID, allow_uids=[0])
    refused(running.address, f"uid {OTHER_UID}.*not in allow_uids")
    client = connect(running.address, allow_uids=[OTHER_UID])
    assert client.call("context")["peer"] == [os.getpid(), 0, 0]
    assert client.call("echo", b"x" * 1_000_000) == b"x" * 1_000_000
    refused(running.address, "backing='shm' can't be sealed", allow_uids=[OTHER_UID], backing="shm")


@as_root
@pytest.mark.parametrize("trusts", [False, True])
def test_large_values_of_another_user(service, directory, connect, trusts):
    """They are copied before anybody looks at them, unless that user is trusted."""
    os.chmod(directory, 0o755)
    home = os.path.join(directory, "home")
    os.mkdir(home)
    os.chown(home, OTHER_UID, OTHER_UID)
    ours, theirs = ([0], [OTHER_UID]) if trusts else ((), ())
    running = service(f"shm://{home}/calc.sock", uid=OTHER_UID, allow_uids=[0], trust_uids=ours)
    client = connect(running.address, allow_uids=[OTHER_UID], trust_uids=theirs)
    data = memoryview(bytes(range(250)) * 1000)
    view = client.call("echo", data)
    assert view == data
    assert view.readonly
    assert client.stats()["pinned_blocks"] == trusts
    # Another thread may have served the first call, and not have let go of it yet.
    wait_until(lambda: client.call("pinned", data) == trusts)


def test_only_who_is_allowed_can_be_trusted(directory):
    with pytest.raises(ValueError, match=r"trust_uids has \[7\], which allow_uids has not"):
        shmrpc.connect("calc", allow_uids=[8], trust_uids=[7, 8])
    with pytest.raises(ValueError, match="trust_uids"):
        shmrpc.Server("calc", trust_uids=[7])


# ---- where the memory is ----


@pytest.mark.parametrize("ours", ["auto", "shm", "memfd"])
@pytest.mark.parametrize("theirs", ["auto", "shm", "memfd"])
def test_backing(service, connect, ours, theirs):
    with open("/proc/self/maps") as maps:
        before = maps.read()
    running = service("shm", backing=theirs)
    client = connect(running.address, backing=ours)
    data = os.urandom(1_000_000)
    assert client.call("echo", data) == data
    with open("/proc/self/maps") as maps:
        new = [line for line in maps if "shmrpc" in line and line not in before]
    memfds = [line for line in new if "memfd:shmrpc" in line]
    # Two of each side: what the connection began with, and what it got for this value.
    assert len(memfds) == 2 * (ours == "memfd") + 2 * (theirs == "memfd")
    assert len(new) == 4
    assert sum(" rw-s " in line for line in new) == 2  # ours; theirs can only be read
    assert sum(" r--s " in line for line in new) == 2


FULL = """
import os, sys, shmrpc
server = shmrpc.Server("full", backing=sys.argv[1]); server.method(name="one")(lambda: 1)
server.start()
for backing in ("auto", "shm"):
    try:
        with shmrpc.connect("full", backing=backing) as client:
            names = [line.split()[-2:] for line in open("/proc/self/maps")
                     if "/shmrpc-" in line or "memfd:" in line]
            print(client.call("one"), sorted({"memfd" in str(name) for name in names}))
    except shmrpc.ConnectError as error:
        print(error)
print(os.listdir("/dev/shm"))
server.stop()
"""


def unshared(mount, *arguments):
    run = subprocess.run(
        [*in_mount_namespace(mount), sys.executable, "-c", FULL, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    "mount",
    [
        "mount -t tmpfs -o size=64k none /dev/shm",
        "mount -t tmpfs -o size=1m none /dev/shm && head -c 1000k /dev/zero > /dev/shm/filler",
        "mount -t tmpfs -o ro none /dev/shm",
    ],
    ids=["tiny", "full", "read-only"],
)
def test_no_room_in_dev_shm(directory, mount):
    """memfd instead; who insists on shm is told how much was missing."""
    lines = unshared(mount, "auto")
    assert lines[0] == "1 [True]"
    assert "69632 bytes" in lines[1]
    assert "/dev/shm" in lines[1]
    assert "shmrpc-" not in lines[2]
    lines = unshared(mount, "shm")
    assert "69632 bytes" in lines[0]
    assert "refused by the peer" in lines[0]


def test_sweep_of_orphaned_names(directory):
    """What a process left that was killed between making a name and removing it."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    orphan = Path(f"/dev/shm/shmrpc-{namespace}-{child.pid}-0123456789abcdef")
    living = Path(f"/dev/shm/shmrpc-{namespace}-{os.getpid()}-0123456789abcdef")
    foreign = Path(f"/dev/shm/shmrpc-1-{child.pid}-0123456789abcdef")
    other = Path(f"/dev/shm/shmrpc-{namespace}-x-0123456789abcdef")
    paths = [orphan, living, foreign, other]
    try:
        for path in paths:
            path.touch()
        with shmrpc.Server("calc"):
            pass
        assert [path.exists() for path in paths] == [False, True, True, True]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


# ---- descriptors ----

LIMITED = """
import gc, os, resource, sys, shmrpc
address = sys.argv[1]
gc.collect()
shmrpc.connect(address).close(); gc.collect()
base = len(os.listdir("/proc/self/fd"))
outcomes = set()
for spare in range(0, 24):
    resource.setrlimit(resource.RLIMIT_NOFILE, (base - 1 + spare, 4096))
    try:
        client = shmrpc.connect(address, timeout=5)
        assert client.call("add", 40, 2) == 42
        client.close()
        del client
        outcomes.add("connected")
    except shmrpc.ConnectError as error:
        outcomes.add("refused")
        assert any(text in str(error) for text in ("ulimit -n", "files open", "open files")), error
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == base, (spare, os.listdir("/proc/self/fd"), base)
print(*sorted(outcomes))
"""


def test_client_without_descriptors(client, common, transport):
    """At each point where they may run out: a clear error, and none is lost."""
    address = common.addresses[list(TRANSPORT_NUMBER).index(transport)]
    before = common.fds()
    assert run_python(LIMITED, address) == "connected refused"
    wait_until(lambda: common.fds() <= before)


def test_server_without_descriptors(transport, service):
    """It refuses or lets wait who comes too many, and goes on; later ones are served again."""
    running = service(transport)
    before = running.fds()
    first = shmrpc.connect(running.address)
    subprocess.run(
        ["prlimit", f"--pid={running.pid}", f"--nofile={running.fds() + 10}:4096"], check=True
    )
    clients, failures = [], []
    for _ in range(12):
        try:
            clients.append(shmrpc.connect(running.address, timeout=0.5))
        except shmrpc.ConnectError as error:
            failures.append(str(error))
        assert first.call("add", 1, 2) == 3
    assert clients
    assert failures
    for client in clients:
        assert client.call("add", 1, 2) == 3
        client.close()
    wait_until(lambda: running.fds() <= before + 4)
    with shmrpc.connect(running.address) as again:
        assert again.call("add", 1, 2) == 3
    first.close()
    wait_until(lambda: running.fds() <= before)


def test_connections_come_and_go(transport, service):
    running = service(transport)
    with shmrpc.connect(running.address) as client:
        client.call("add", 1, 2)
    time.sleep(0.1)
    before = running.fds()
    for number in range(60):
        with shmrpc.connect(running.address) as client:
            assert client.call("add", number, 1) == number + 1
    wait_until(lambda: running.fds() <= before)


def test_at_most_four_descriptors_a_connection(transport, service, connect):
    running = service(transport)
    connect(running.address).call("add", 1, 2)
    before, own = running.fds(), len(os.listdir("/proc/self/fd"))
    clients = [connect(running.address) for _ in range(20)]
    for client in clients:
        client.call("echo", b"x" * 200_000)
    assert (running.fds() - before) / 20 <= 4
    assert (len(os.listdir("/proc/self/fd")) - own) / 20 <= 5  # and an epoll


# ---- reconnecting ----


def test_timeout_of_connecting_is_kept(transport, service, connect):
    running = service(transport)
    client = connect(running.address, timeout=0.4)
    running.kill()
    start = time.monotonic()
    with pytest.raises((shmrpc.ConnectError, shmrpc.ConnectionLost)):
        for _ in range(3):
            client.call("add", 1, 2)
    assert time.monotonic() - start < 0.4 + 0.4 * SLACK


def test_drain_refuses_and_finishes(transport, service, connect):
    """SIGTERM: the call that runs gets its reply, and the process ends with status 0."""
    running = service(transport)
    client = connect(running.address)
    future = client.submit("sleep", 0.5, "done")
    wait_until(lambda: client.call("running") == 1)
    running.signal(signal.SIGTERM)
    assert future.result(10) == "done"
    assert running.process.wait(10) == 0


# ---- tcp is for this host ----


@pytest.mark.parametrize("make", [shmrpc.Server, aio.Server])
def test_tcp_for_other_hosts_has_to_be_meant(make, no_leaks):
    async def listens(server):
        started = server.start()
        if started is not None:
            await started
        (found,) = server.addresses
        stopped = server.stop(0.1)
        if stopped is not None:
            await stopped
        return found

    for address in ("tcp://0.0.0.0:0", "tcp://[::]:0"):
        with pytest.raises(shmrpc.ConnectError, match="allow_remote=True"):
            asyncio.run(listens(make(address)))
    found = asyncio.run(listens(make("tcp://0.0.0.0:0", allow_remote=True)))
    assert found.startswith("tcp://0.0.0.0:")


def test_byte_servers_for_other_hosts_have_to_be_meant(no_leaks):
    async def listens(**options):
        server = await aio.create_server(asyncio.Protocol, "tcp://0.0.0.0:0", **options)
        (found,) = server.addresses
        server.close()
        await server.wait_closed()
        return found

    with pytest.raises(shmrpc.ConnectError, match="allow_remote=True"):
        asyncio.run(listens())
    found = asyncio.run(listens(allow_remote=True))
    assert found.startswith("tcp://0.0.0.0:")
