"""Forks: what was inherited says so, the child connects anew, the parent notices nothing."""

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback

import pytest
from conftest import SLACK, in_threads, wait_until

import shmrpc
from shmrpc._native import ffi

# Python 3.12 and newer warn of forks with threads; that they work here is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(work, timeout=50):
    """Run it in a forked child and return the text that it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            os.close(reader)
            text = str(work())
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode()[-4000:])
            os._exit(0)
    os.close(writer)
    killer = threading.Timer(timeout, os.kill, (child, 9))
    killer.start()
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    killer.cancel()
    killer.join()
    return text or "the child hung and was killed"


def kinds_of_errors(*actions):
    found = []
    for action in actions:
        try:
            action()
            found.append("no error")
        except Exception as error:
            found.append(type(error).__name__)
    return " ".join(found)


def test_inherited_client_and_future(client):
    pending = client.submit("sleep", 0.3, "parent's")
    finished = client.submit("add", 1, 2)
    assert finished.result(5) == 3
    found = in_child(
        lambda: kinds_of_errors(
            lambda: client.call("add", 1, 2),
            lambda: client.call("add", 1, 2, timeout=1),
            lambda: client.notify("add", 1, 2),
            lambda: client.submit("add", 1, 2),
            client.ping,
            client.stats,
            lambda: pending.result(1),
            lambda: pending.exception(1),
            lambda: client.proxy().add(1, 2),
        )
    )
    assert found == " ".join(["ForkedError"] * 9)
    assert in_child(lambda: finished.result(0)) == "3"
    assert in_child(client.close) == "None"
    assert pending.result(10) == "parent's"
    assert client.call("add", 1, 2) == 3
    assert client.stats()["reconnects"] == 0


def test_child_connects_anew(client, common, transport):
    address = common.addresses[["shm", "unix", "tcp"].index(transport)]

    def work():
        with shmrpc.connect(address) as own:
            return own.call("context")["peer"][0] == os.getpid(), own.call("add", 1, 2)

    for _ in range(5):
        assert in_child(work) == "(True, 3)"
        assert client.call("add", 1, 2) == 3
    assert client.stats()["reconnects"] == 0


def test_child_collects_what_it_inherited(common, transport):
    """The descriptors that it lets go of may have been given out again by then."""
    address = common.addresses[["shm", "unix", "tcp"].index(transport)]
    inherited = [shmrpc.connect(address)]
    server = [shmrpc.Server("tcp://127.0.0.1:0")]
    server[0].start()
    assert inherited[0].call("add", 1, 2) == 3

    def work():
        own = [shmrpc.connect(address) for _ in range(3)]
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(30)]
        inherited.clear()
        server.clear()
        gc.collect()
        results = [client.call("echo", b"x" * 100_000) == b"x" * 100_000 for client in own]
        for file in files:
            os.close(file)  # OSError if somebody else has
        for client in own:
            client.close()
        return results

    try:
        assert in_child(work) == "[True, True, True]"
        assert inherited[0].call("add", 1, 2) == 3
    finally:
        inherited[0].close()
        server[0].stop()


@pytest.fixture
def core_lock(client):
    """The mutex of the client's poller in the core, as if another thread held it at a fork."""
    assert client.call("add", 1, 2) == 3  # there is a slot now that nobody uses
    libc = ctypes.CDLL(None)
    lock = ctypes.c_void_p(int(ffi.cast("uintptr_t", client._link.poller.c)))  # its first member
    assert libc.pthread_mutex_lock(lock) == 0
    yield
    assert libc.pthread_mutex_unlock(lock) == 0


def test_child_that_collects_while_a_thread_of_its_parent_holds_a_lock(client, core_lock):
    """Slots that nobody uses are freed at the fork, others whenever the child lets go of them."""
    assert in_child(lambda: client.__dict__.clear() or gc.collect() >= 0, timeout=10) == "True"


def interrupt_soon():
    def interrupt(*_):
        raise InterruptedError

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)


def test_signal_interrupts_the_child_of_a_thread(common, transport, tmp_path):
    """The thread that forked is the main thread of the child, which runs signal handlers."""
    address = common.addresses[["shm", "unix", "tcp"].index(transport)]

    def work():
        with shmrpc.connect(address) as own:
            own.call("add", 1, 2)
            interrupt_soon()
            return kinds_of_errors(lambda: own.call("hold", str(tmp_path / "end")))

    def fork(_):
        with shmrpc.connect(address) as own:
            own.call("sleep", 0.05)  # now the core knows that this is not the main thread
            return in_child(work, timeout=10)

    assert in_threads(1, fork) == ["InterruptedError"]
    (tmp_path / "end").touch()


def test_child_that_exits_normally(client):
    """Exit handlers and destructors of the child leave the parent's connection alone."""
    child = os.fork()
    if child == 0:
        os.execl("/bin/true", "true")
    os.waitpid(child, 0)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=gc.collect)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    process.close()
    assert client.call("add", 1, 2) == 3
    assert client.stats()["reconnects"] == 0


def multiprocessing_child(address, client, results):
    found = kinds_of_errors(lambda: client.call("add", 1, 2))
    with shmrpc.connect(address) as own:
        results.put((found, own.call("add", 40, 2)))


def test_multiprocessing(client, common, transport):
    address = common.addresses[["shm", "unix", "tcp"].index(transport)]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=multiprocessing_child, args=(address, client, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
        process.close()
    assert [results.get() for _ in range(3)] == [("ForkedError", 42)] * 3
    results.close()
    assert client.call("add", 1, 2) == 3


def test_server_death_is_noticed_while_a_child_lives(transport, service, connect):
    """The child holds no copy of the connection's descriptors."""
    running = service(transport)
    client = connect(running.address)
    client.call("add", 1, 2)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        future = client.submit("hold")
        wait_until(lambda: client.call("running") == 1)
        threading.Timer(0.1, running.process.kill).start()
        start = time.monotonic()
        with pytest.raises(shmrpc.ConnectionLost):
            future.result(40)
        assert time.monotonic() - start < 0.2 * SLACK
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    running.process.wait()


def test_client_death_is_noticed_while_its_child_lives(transport, service):
    """The server closes the connection of a client that closed it, whoever was forked."""
    running = service(transport)
    observer = shmrpc.connect(running.address)
    client = shmrpc.connect(running.address)
    client.call("add", 1, 2)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        assert observer.call("stats")["conns"] == 2
        client.close()
        wait_until(lambda: observer.call("stats")["conns"] == 1)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        observer.close()


def test_server_survives_forks_of_its_handlers(transport, service, connect):
    running = service(transport)
    client = connect(running.address)
    expected = "ForkedError ForkedError ForkedError 42"
    for _ in range(5):
        assert client.call("fork_and_connect", running.address, timeout=20) == expected
    assert client.call("add", 1, 2) == 3
    assert client.stats()["reconnects"] == 0
    assert running.stop() == 0


def test_child_can_serve(transport, service, connect, directory):
    """At an address of its own, while the parent's server goes on."""
    with shmrpc.Server("parents") as server, shmrpc.connect("parents") as client:
        server.method(name="who")(lambda: "parent")

        def work():
            with shmrpc.Server("childs") as own:
                own.method(name="who")(lambda: "child")
                with shmrpc.connect("childs") as first, shmrpc.connect("parents") as second:
                    return first.call("who"), second.call("who")

        assert in_child(work) == "('child', 'parent')"
        assert client.call("who") == "parent"
        assert sorted(os.listdir(directory))[-2:] == ["parents.sock", "parents.sock.lock"]


def test_address_is_free_after_the_parents_stop(service, directory):
    """A child that lives on does not keep the name."""
    server = shmrpc.Server("calc")
    server.start()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        server.stop()
        with shmrpc.Server("calc"), shmrpc.connect("calc") as client:
            assert client.ping() > 0
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_forks_while_threads_call(client, common, transport):
    """Whatever lock another thread held at the fork, the child gets going."""
    address = common.addresses[["shm", "unix", "tcp"].index(transport)]
    stop = threading.Event()

    def work():
        found = kinds_of_errors(lambda: client.call("add", 1, 2))
        with shmrpc.connect(address) as own:
            return found, own.call("add", 40, 2)

    def call_on(number):
        while not stop.is_set():
            assert client.call("add", number, 1) == number + 1
            assert client.submit("add", number, 1).result(20) == number + 1

    def fork_on(number):
        if number:
            return call_on(number)
        try:
            return [in_child(work, timeout=10) for _ in range(20)]
        finally:
            stop.set()

    results = in_threads(4, fork_on, timeout=22)
    assert results[0] == ["('ForkedError', 42)"] * 20
