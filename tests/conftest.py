"""What all tests share: servers in processes of their own, and a check that nothing is left."""

import asyncio
import contextlib
import faulthandler
import gc
import glob
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest
import uvloop

import shmrpc

ASYNC_SERVICES = Path(__file__).parent / "async_services.py"
SERVICES = Path(__file__).resolve().parent / "services.py"
TRANSPORTS = ("shm", "unix", "tcp")
# How much longer than named something may take where other work runs on the same CPUs.
SLACK = 20
FAILED = pytest.StashKey()
# A user namespace that anybody may make has one user in it: who made it.
as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="becoming another user takes root, as which .ci/run runs this"
)

faulthandler.enable()

# A run starts thousands of Pythons: what they import is compiled once, whatever the environment
# says. This module is imported before the other tests' and before pytest-xdist starts its workers.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def wait_until(condition, timeout=40.0, what="the condition"):
    """Poll until it is true, and return what it returned."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what} did not come true within {timeout} s"
        time.sleep(0.005)


def in_threads(count, work, timeout=40):
    """Run ``work(number)`` in so many threads and return the results; errors are raised here.

    Threads that hang are left behind (they are daemons), so that the test fails and does not.
    """
    results, errors = {}, []

    def run(number):
        try:
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    if errors:
        raise errors[0]
    assert len(results) == count, f"{count - len(results)} threads hang"
    return [results[number] for number in range(count)]


def pause(pid):
    """SIGSTOP, and wait until none of its threads runs."""

    def states():
        stats = Path(f"/proc/{pid}/task").glob("*/stat")
        return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}

    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: states() == {"T"})


class Process(subprocess.Popen):
    """Killed where its block is left by an error: Popen's would wait for what may hang."""

    def __exit__(self, kind, *rest):
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


class Service:
    """A server in a process of its own."""

    def __init__(self, *addresses, env=None, prefix=(), wait=True, program=SERVICES, **options):
        setup = json.dumps({"addresses": addresses, "options": options})
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(program), setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=None if env is None else {**os.environ, **env},
        )
        self.addresses = []
        if wait:
            self.wait_ready()

    def wait_ready(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the server died at once"}
        if "error" in answer:
            self.close()
            raise shmrpc.ConnectError(answer["error"])
        self.addresses = answer["addresses"]
        return self

    @property
    def address(self):
        return self.addresses[0]

    @property
    def pid(self):
        return self.process.pid

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def signal(self, number):
        self.process.send_signal(number)

    def pause(self):
        pause(self.pid)

    def resume(self):
        self.signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self, timeout=40):
        """SIGTERM, and its exit status."""
        self.process.terminate()
        return self.process.wait(timeout)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def in_mount_namespace(command):
    """The prefix of a command before which this one mounts what nobody else sees."""
    script = f'{command} && exec "$0" "$@"'
    failures = []
    for options in ("-m", "-rm"):  # as root; else as one in a user namespace of its own
        prefix = ("unshare", options, "sh", "-c", script)
        tried = subprocess.run([*prefix, "true"], capture_output=True, check=False, text=True)
        if tried.returncode == 0:
            return prefix
        failures.append(tried.stderr.strip())
    return pytest.skip(f"needs a mount namespace, by root or in a user namespace: {failures}")


def address_of(transport, directory, name="calc"):
    """A fresh address to listen at."""
    return {
        "shm": f"shm://{directory}/{name}.sock",
        "unix": f"unix://{directory}/{name}-unix.sock",
        "tcp": "tcp://127.0.0.1:0",
    }[transport]


def free_port():
    """A TCP port for a server that comes later or comes again.

    None of those that the kernel gives to connections: one of them might take it meanwhile.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(max(1024, first - 20_000), first)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def short_directory():
    """A directory for sockets: tmp_path may be longer than a socket's path can be."""
    path = tempfile.mkdtemp(prefix="rpc-", dir="/tmp")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# ---- what `make test` leaves to `make thorough` ----

# unix and tcp share all code but the making of the socket: these files have many cases of it.
ALIKE = {
    "activation",
    "aio",
    "cancellation",
    "death",
    "flow_control",
    "handover",
    "interceptors_live",
    "kept_errors",
    "metadata",
    "retries_live",
    "stopping",
    "streams",
    "symmetry",
    "threads",
}


# Many processes each, or long ways to their end.
LONG = {
    "bench",
    "cli_more",
    "deploy",
    "processes",
    "sidecar_grpc",
    "sidecar_hosts",
    "stream_ends",
    "tunnel",
}


def is_left_out(name, said):
    """Whether `make test` does without a test of this file with these parameters."""
    if name in LONG or (name in ALIKE and "[tcp" in said):
        return True
    if name == "sidecar":
        return "[" in said and "[shm[shm" not in said and ("[tcp" in said or "[unix" in said)
    if name == "byte_streams":
        return "[unix" in said or "[tcp" in said
    if name == "integrations":
        return "[uvloop" in said
    return "ten_restarts" in said and "[unix" in said


def pytest_collection_modifyitems(items):
    for item in items:
        if is_left_out(item.path.stem.removeprefix("test_"), item.name.replace("-", "[")):
            item.add_marker(pytest.mark.thorough)


# ---- event loops ----

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session", autouse=True)
def first_uvloop():
    """The first one of a process makes a pipe that stays."""
    loop = uvloop.new_event_loop()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def in_loop(loop, main, *, debug=True):
    """Run it in this new loop, in debug mode: nothing may be reported or left."""
    loop.set_debug(debug)
    loop.slow_callback_duration = 10
    trouble = []
    loop.set_exception_handler(lambda _loop, context: trouble.append(context))
    asyncio.set_event_loop(loop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = loop.run_until_complete(asyncio.wait_for(main, 40))
            left = [task for task in asyncio.all_tasks(loop) if not task.done()]
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            gc.collect()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    assert not left
    assert not trouble
    assert not hasattr(loop, "_shmrpc_hub"), "byte streams are left open"
    return result


@pytest.fixture(params=LOOPS)
def run(request, no_leaks):
    """Run a coroutine function in a new loop; see ``in_loop``."""

    def run(main, *args, debug=True):
        return in_loop(LOOPS[request.param](), main(*args), debug=debug)

    return run


# ---- nothing may be left over ----


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Collecting garbage twice a test looks at what tests made, not at all that was imported."""
    gc.collect()
    gc.freeze()


def shm_names():
    """Names in /dev/shm that are ours or nobody's: other tests may run beside us."""
    names = glob.glob("/dev/shm/shmrpc-[0-9]*")
    ours = {os.getpid(), *children()} if names else set()

    def is_foreign(name):
        pid = name.split("-")[2]
        if not pid.isdigit():
            return True  # of a benchmark that was killed: segments have a pid there
        pid = int(pid)
        return pid not in ours and psutil.pid_exists(pid)

    return {name for name in names if not is_foreign(name)}


def descriptors():
    """Number -> target of this process's descriptors."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: target for fd, target in found.items() if not target.startswith("/proc/")}


def children():
    return {process.pid for process in psutil.Process().children(recursive=True)}


def shmrpc_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("shmrpc-")}


def what_is_there():
    """What a test must not add to: names in /dev/shm, processes, threads."""
    return shm_names(), children(), shmrpc_threads()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Each test leaves the process, its children and /dev/shm as they were."""
    gc.collect()
    before = what_is_there()
    count = len(descriptors())
    yield
    if request.node.stash.get(FAILED, False):
        # Its traceback keeps everything alive here; what runs elsewhere must not disturb the next.
        for pid in children() - before[1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return
    end = time.monotonic() + 3
    while True:
        gc.collect()
        left = [now - then for now, then in zip(what_is_there(), before, strict=True)]
        fds = descriptors()
        if not any(left) and len(fds) <= count:
            return
        if time.monotonic() > end:
            pytest.fail(
                f"left over: names {left[0]}, processes {left[1]}, threads {left[2]}, "
                f"{len(fds) - count} descriptors more than {count}: {fds}"
            )
        time.sleep(0.02)


# ---- servers and clients ----


@pytest.fixture
def directory(no_leaks, monkeypatch):
    """A rendezvous directory of its own, in $SHMRPC_DIR."""
    with short_directory() as path:
        monkeypatch.setenv("SHMRPC_DIR", path)
        yield path


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


@pytest.fixture
def service(directory):
    """Start server processes: ``service("shm", workers=2)`` or ``service("unix:///x.sock")``."""
    services = []

    def start(*where, **options):
        addresses = [address_of(w, directory) if w in TRANSPORTS else w for w in where]
        started = Service(*addresses, **options)
        services.append(started)
        return started

    yield start
    for started in services:
        started.close()


@pytest.fixture
def generations(directory):
    """Start a server that can have successors; see restarting.py and generations.py."""
    from restarting import Generations  # which needs this module

    with contextlib.ExitStack() as stack:

        def start(*addresses, **setup):
            started = Generations(*addresses, **setup)
            stack.callback(started.end)
            return started

        yield start


@pytest.fixture
def connect(no_leaks):
    """``shmrpc.connect`` whose clients are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connected(address, **options):
            client = shmrpc.connect(address, **options)
            stack.callback(client.close)
            return client

        yield connected


@pytest.fixture(scope="module")
def common():
    """One server at all three transports, for tests that leave it as it was."""
    with short_directory() as path:
        running = Service(*(address_of(transport, path) for transport in TRANSPORTS))
        yield running
        assert running.process.poll() is None, "the server died"
        running.close()


@pytest.fixture
def client(common, transport, connect):
    """A client of the common server, by each transport."""
    return connect(common.addresses[TRANSPORTS.index(transport)])
