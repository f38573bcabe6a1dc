"""Peers that break the protocol in every way they can, from real processes.

A hostile process does the real handshake and then writes anything at all into its own segment;
or it does not get that far, because it abuses the handshake. The other side must refuse it with a
reason, end that one connection, serve the others, and lose neither memory nor descriptors.
"""

import array
import contextlib
import os
import random
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import as_root, wait_until

import shmrpc
from shmrpc import address

SEED = int(os.environ.get("SHMRPC_SEED", "0")) or secrets.randbits(32)
SCRIPT = Path(__file__).parent / "hostile.py"
SECONDS = 1.5


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SHMRPC_DIR", str(tmp_path))
    print(f"SHMRPC_SEED={SEED}")
    return tmp_path


@contextlib.contextmanager
def process(*arguments, **options):
    """Run hostile.py in a role until the end of the block; yields it when it says it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        assert started.stdout.readline() == "ready\n"
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


@pytest.fixture
def server():
    with process("server", "good") as running:
        yield running


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def descriptors_at_rest(pid):
    """How many a server has whose standby thread waits, with a timer that it makes then."""

    def has_timer():
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.readlink() == Path("anon_inode:[timerfd]"):
                    return True
        return False

    wait_until(has_timer)
    return descriptors(pid)


def settle(pid, expected, seconds=40.0):
    """Wait until the process has at most this many descriptors; returns how many it has."""
    deadline = time.monotonic() + seconds
    while (count := descriptors(pid)) > expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return count


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_cpu(pid):
    """CPU seconds that a process burns in a second in which nobody wants anything of it."""
    time.sleep(0.1)
    before = cpu_seconds(pid)
    time.sleep(1.0)
    return cpu_seconds(pid) - before


class GoodClient(threading.Thread):
    """Calls all the time, and notes what was wrong with the answers."""

    def __init__(self, client):
        super().__init__()
        self.client = client
        self.calls = 0
        self.failures = []
        self.stopping = threading.Event()

    def run(self):
        while not self.stopping.is_set():
            try:
                result = self.client.call("add", self.calls, 1, timeout=5.0)
            except Exception as error:
                self.failures.append(repr(error))
                return
            if result != self.calls + 1:
                self.failures.append(f"{self.calls} + 1 = {result}")
            self.calls += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join()


# ---- shared memory ----


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["words", "frames", "control", "fill", "streams"])
def test_hostile_client(server, manner):
    with shmrpc.connect("good") as client:
        assert client.call("add", 1, 2) == 3
        before = descriptors_at_rest(server.pid)
        with GoodClient(client) as good:
            done = subprocess.run(
                [sys.executable, str(SCRIPT), "client", "good", manner, str(SEED), str(SECONDS)],
                check=False,
                capture_output=True,
                text=True,
                timeout=40,
            )
            assert done.returncode == 0, done.stderr
            connections = int(re.search(r"(\d+) connections", done.stdout)[1])
            calls = good.calls
        assert not good.failures
        assert calls > 100
        assert connections >= (1 if manner in {"control", "streams"} else 3)
        assert server.poll() is None
        assert settle(server.pid, before) == before
        assert idle_cpu(server.pid) < 0.05
        assert client.call("add", 1, 2) == 3


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["words", "frames", "control", "answers", "items", "silent"])
def test_hostile_server(manner):
    with process("hostile-server", "bad", manner, SEED) as bad:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", str(SCRIPT), "victim", "bad", str(SECONDS)],
            check=False,
            capture_output=True,
            text=True,
            timeout=40,
        )
        assert bad.poll() is None
    assert done.returncode == 0, done.stderr + done.stdout
    print(done.stdout)
    assert not re.search(r"^unexpected", done.stdout, re.MULTILINE), done.stdout
    outcomes = dict(re.findall(r"^(\w+) (\d+)$", done.stdout, re.MULTILINE))
    allowed = {"ProtocolError", "ConnectionLost", "DeadlineExceeded", "ConnectError"}
    if manner == "silent":
        assert set(outcomes) == {"DeadlineExceeded"}
    elif manner in {"answers", "items"}:  # which it may: any status, any result
        assert outcomes
    else:
        assert outcomes
        assert set(outcomes) <= allowed


@pytest.mark.slow
def test_clients_that_connect_and_vanish(server):
    with shmrpc.connect("good") as client:
        client.call("add", 1, 2)
        before = descriptors_at_rest(server.pid)
        for _ in range(100):
            shmrpc.connect("good").close()
        assert settle(server.pid, before) == before
        assert client.call("add", 1, 2) == 3


# ---- the handshake ----

HELLO, WELCOME, ATTACH, READY, REFUSE = range(1, 6)
SHM = 1
RING = 65536


# magic, version, kind, transport, pid, ring bytes, longest message, length of the reason
FORMAT = struct.Struct("<8sHBBIIII36x")


def message(kind, *, version=1, transport=SHM, ring=RING, longest=1 << 20, reason=0):
    return FORMAT.pack(b"shmrpc\r\n", version, kind, transport, 4711, ring, longest, reason)


class Raw:
    """The client's end of a rendezvous socket, to say anything."""

    def __init__(self, name="good"):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(address.parse(name).path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data, fds=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def exactly(self, count):
        data = b""
        while len(data) < count:
            part, ancillary, _, _ = self.socket.recvmsg(count - len(data), 256)
            for _, _, content in ancillary:
                for fd in array.array("i", content):
                    os.close(fd)
            if not part:
                break
            data += part
        return data

    def answer(self):
        """The kind of the next message, and the reason if it is a refusal."""
        data = self.exactly(64)
        if not data:
            return None, ""
        _, _, kind, _, _, _, _, reason = FORMAT.unpack(data)
        return kind, self.exactly(reason).decode() if kind == REFUSE else ""

    def ended(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def unharmed(server):
    """After the test the server must live, serve, and hold as many descriptors as before."""
    with shmrpc.connect("good") as client:
        client.call("add", 1, 2)
        before = descriptors_at_rest(server.pid)
        yield server
        assert server.poll() is None
        started = time.monotonic()
        with shmrpc.connect("good") as other:
            assert other.call("add", 3, 4, timeout=20) == 7
        assert time.monotonic() - started < 4.0  # nobody's handshake was waited for
        assert client.call("add", 1, 2) == 3
        assert settle(server.pid, before) <= before


def test_garbage_on_the_socket(unharmed):
    rng = random.Random(SEED)
    for size in [1, 63, 64, 65, 1000, 100_000]:
        with Raw() as raw:
            raw.socket.setblocking(False)
            with contextlib.suppress(OSError):
                raw.send(rng.randbytes(size))
            raw.socket.settimeout(10)
            if size >= 64:
                kind, reason = raw.answer()
                assert kind == REFUSE
                assert "does not speak shmrpc" in reason
                assert raw.ended()
    assert idle_cpu(unharmed.pid) < 0.05


def test_silence_holds_up_nobody(unharmed):
    silent = [Raw() for _ in range(50)]
    started = time.monotonic()
    with shmrpc.connect("good") as client:
        assert client.call("add", 3, 4, timeout=20) == 7
    assert time.monotonic() - started < 4.0
    assert silent[0].ended()  # and nobody is waited for without end
    for raw in silent:
        raw.socket.close()


def test_truncated_messages(unharmed):
    for cut in range(0, 64, 7):
        with Raw() as raw:
            raw.send(message(HELLO)[: max(cut, 1)])
    for cut in range(0, 64, 7):
        with Raw() as raw:
            raw.send(message(HELLO))
            assert raw.answer()[0] == WELCOME
            if cut:
                raw.send(message(ATTACH)[:cut])


@pytest.mark.parametrize(
    "hello, reason",
    [
        (message(HELLO, version=2), "version 2"),
        (message(HELLO, version=0), "version 0"),
        (message(HELLO, transport=2), "not unix://"),
        (message(HELLO, transport=3), "not tcp://"),
        (message(HELLO, transport=99), "unknown"),
        (message(ATTACH), "handshake message 3 instead of 1"),
        (message(77), "handshake message 77 instead of 1"),
    ],
    ids=["version 2", "version 0", "unix", "tcp", "99", "attach", "77"],
)
def test_wrong_hello(unharmed, hello, reason):
    with Raw() as raw:
        raw.send(hello)
        kind, said = raw.answer()
        assert kind == REFUSE
        assert reason in said
        assert raw.ended()


def test_client_that_refuses(unharmed):
    with Raw() as raw:
        raw.send(message(REFUSE, reason=6) + b"no way")
        assert raw.ended() or True
    with Raw() as raw:
        raw.send(message(HELLO))
        assert raw.answer()[0] == WELCOME
        raw.send(message(REFUSE, reason=0xFFFF_FFFF) + b"x" * 5000)


def memory(size, *, magic=True):
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if magic and size >= 8:
        os.pwrite(fd, (0x31637072).to_bytes(4, "little") + (1).to_bytes(4, "little"), 0)
    return fd


def pipe():
    reader, writer = os.pipe()
    os.close(writer)
    return reader


MEMORY = {
    "right": lambda: memory(4096 + RING),
    "short": lambda: memory(4096 + RING - 1),
    "empty": lambda: memory(0),
    "larger": lambda: memory(4096 + RING + 4096),
    "no magic": lambda: memory(4096 + RING, magic=False),
    "device": lambda: os.open("/dev/null", os.O_RDWR),
    "pipe": pipe,
    "eventfd": lambda: os.eventfd(0),
    "directory": lambda: os.open("/", os.O_RDONLY),
}
BELL = {
    "right": lambda: os.eventfd(0, os.EFD_NONBLOCK),
    "pipe": pipe,
    "device": lambda: os.open("/dev/null", os.O_RDWR),
    "memory": lambda: memory(4096 + RING),
}


def attach(fds, **fields):
    """Handshake up to ATTACH with these descriptors; returns the answer."""
    try:
        with Raw() as raw:
            raw.send(message(HELLO))
            assert raw.answer()[0] == WELCOME
            raw.send(message(ATTACH, **fields), fds)
            return raw.answer()
    finally:
        for fd in fds:
            os.close(fd)


def test_wrong_memory(unharmed):
    for what, make in MEMORY.items():
        kind, reason = attach([make(), BELL["right"]()])
        if what == "right":
            assert kind == READY
        else:
            assert (what, kind) == (what, REFUSE)
            assert "memory" in reason


def test_wrong_bell(unharmed):
    for what, make in BELL.items():
        kind, reason = attach([MEMORY["right"](), make()])
        if what == "right":
            assert kind == READY
        else:
            assert (what, kind) == (what, REFUSE)
            assert "not an eventfd" in reason


def test_wrong_number_of_descriptors(unharmed):
    for count in (0, 1, 3, 4, 20, 200):
        kind, reason = attach([BELL["right"]() for _ in range(count)])
        assert kind == REFUSE
        assert "descriptors" in reason


def test_descriptors_that_nobody_asked_for(unharmed):
    for count in (1, 2, 3, 100):
        fds = [MEMORY["right"]() for _ in range(count)]
        with Raw() as raw:
            raw.send(message(HELLO), fds)
            assert raw.answer()[0] in (WELCOME, REFUSE)
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("ring", [0, 1, 2048, 4097, 1 << 31, 0xFFFF_FFFF])
def test_impossible_rings(unharmed, ring):
    kind, reason = attach([MEMORY["right"](), BELL["right"]()], ring=ring)
    assert kind == REFUSE
    assert f"impossible ring of {ring} bytes" in reason


def test_agreed_and_silent(unharmed):
    """A client that finishes the handshake and sends rubbish on the socket afterwards."""
    fds = [MEMORY["right"](), BELL["right"]()]
    with Raw() as raw:
        raw.send(message(HELLO))
        raw.answer()
        raw.send(message(ATTACH), fds)
        assert raw.answer()[0] == READY
        raw.socket.setblocking(False)
        with contextlib.suppress(OSError):
            raw.send(b"?" * 100_000)
        assert idle_cpu(unharmed.pid) < 0.05
    for fd in fds:
        os.close(fd)


@as_root
@pytest.mark.parametrize("manner, expected", [("unsealed", "memory"), ("sealed", "ready")])
def test_memory_of_another_user(tmp_path, manner, expected):
    """What belongs to somebody else must be sealed."""
    other = 65534
    tmp_path.chmod(0o755)
    path = tmp_path / "open.sock"
    for parent in tmp_path.parents:
        ours = "pytest" in parent.name or parent.name.startswith("popen-")
        if parent.stat().st_uid == 0 and ours:
            parent.chmod(0o755)
    with process("server", f"shm://{path}", "--allow", other) as running:
        path.chmod(0o777)
        before = descriptors_at_rest(running.pid)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "stranger", f"shm://{path}", manner, str(other)],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert settle(running.pid, before) == before
