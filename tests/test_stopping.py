"""What stop() promises: who is served ends, who is not can call again, and nothing is left."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import SLACK, address_of, in_threads, wait_until
from restarting import SAFE
from test_connecting import HANDSHAKE, HELLO, WELCOME, message, raw_socket

import shmrpc


def end_of(future):
    error = future.exception(20)
    assert isinstance(error, shmrpc.ConnectionLost), error
    return error


def call_until_refused(client):
    """Call until the server stops; the error that says so."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            client.call("pid")
        except shmrpc.ConnectionLost as error:
            return error
    raise AssertionError("the server goes on")


def test_who_runs_ends_and_who_comes_is_refused(transport, generations, connect, directory):
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    running, idle = connect(address), connect(address, timeout=1)
    release = f"{directory}/release"
    future = running.submit("hold", release)
    wait_until(lambda: os.path.exists(f"{release}.running"))
    idle.call("stop", 20.0)
    error = call_until_refused(idle)
    assert error.outcome == "not_started"
    assert error.code == "UNAVAILABLE"
    assert "is stopping" in str(error)
    assert f"pid {first.pid}" in str(error)
    with pytest.raises(shmrpc.ConnectError):
        idle.call("pid")  # it looks for another server instead of asking this one again
    with pytest.raises(shmrpc.ConnectError):
        shmrpc.connect(address)
    assert first.process.poll() is None
    Path(release).touch()
    assert future.result(20) == first.pid
    assert first.process.wait(20) == 0


def test_who_is_refused_leaves_its_other_calls_alone(transport, generations, connect, directory):
    """Calls of the same client that run go on while it is refused new ones."""
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address, timeout=1)
    release = f"{directory}/release"
    futures = [client.submit("hold", release) for _ in range(3)]
    waiting = threading.Thread(target=lambda: results.append(client.call("hold", release)))
    results = []
    waiting.start()
    running = Path(f"{release}.running")
    wait_until(lambda: running.exists() and len(running.read_text().split()) == 4)
    client.call("stop", 20.0)
    assert call_until_refused(client).outcome == "not_started"
    assert isinstance(client_error(client.submit, "pid"), shmrpc.ConnectError)
    Path(release).touch()
    assert [future.result(20) for future in futures] == [first.pid] * 3
    waiting.join(20)
    assert results == [first.pid]
    assert first.process.wait(20) == 0


def client_error(function, *args):
    with pytest.raises(shmrpc.Error) as caught:
        function(*args)
    return caught.value


def test_after_the_grace_connections_are_cut(transport, generations, connect, directory):
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    future = client.submit("hold", f"{directory}/never")
    wait_until(lambda: os.path.exists(f"{directory}/never.running"))
    start = time.monotonic()
    client.call("stop", 0.3)
    assert end_of(future).outcome == "unknown"
    assert time.monotonic() - start > 0.29
    assert first.process.wait(20) == 0


def test_after_the_grace_handlers_are_cancelled(transport, generations, connect, directory):
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    path = f"{directory}/cancelled"
    future = client.submit("hold_until_cancelled", path)
    wait_until(lambda: os.path.exists(f"{path}.running"))
    client.call("stop", 0.1)
    assert future.result(20) is None  # it noticed, and there was time to say so
    assert Path(path).read_text() == "cancelled\n"
    assert first.process.wait(20) == 0


def test_queued_calls_end_within_the_grace(transport, generations, connect, directory):
    first = generations(address_of(transport, directory), options={"workers": 1})
    (address,) = first.addresses
    client = connect(address)
    release = f"{directory}/release"
    futures = [client.submit("hold", release) for _ in range(5)]
    wait_until(lambda: os.path.exists(f"{release}.running"))
    client.ping()
    first.process.terminate()
    assert call_until_refused_by_stop(client).outcome == "not_started"
    Path(release).touch()
    assert [future.result(20) for future in futures] == [first.pid] * 5
    assert first.process.wait(20) == 0


def call_until_refused_by_stop(client):
    """As call_until_refused, where every worker is occupied."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(shmrpc.DeadlineExceeded):
            try:
                client.call("pid", timeout=0.05)
            except shmrpc.ConnectionLost as error:
                return error
    raise AssertionError("the server goes on")


@pytest.mark.parametrize("busy", [False, True], ids=["at once", "after a while"])
def test_each_call_has_run_or_can_be_repeated(transport, generations, connect, directory, busy):
    """Also in the last moment: no call is lost without its caller knowing that it did not run."""
    path = f"{directory}/noted"
    Path(path).touch()
    done, safe = set(), set()
    for turn in range(6):
        first = generations(address_of(transport, directory))
        (address,) = first.addresses
        clients = [connect(address, timeout=2) for _ in range(4)]
        started = threading.Barrier(5)

        def work(number, turn=turn, clients=clients, started=started):
            for i in range(1 << 30):
                name = f"{turn}-{number}-{i}"
                try:
                    clients[number].call("note", path, name)
                    done.add(name)
                except shmrpc.ConnectionLost as error:
                    if error.outcome not in SAFE:
                        raise
                    safe.add(name)
                    return
                except shmrpc.ConnectError:
                    return
                if i == 20:
                    started.wait(20)

        def stop(started=started, first=first, address=address):
            with shmrpc.connect(address) as client:
                started.wait(20)
                if busy:
                    client.submit("sleep", 0.05)
                first.process.terminate()
                assert first.process.wait(20) == 0

        in_threads(5, lambda number, stop=stop, work=work: stop() if number == 4 else work(number))
    assert done
    assert safe
    assert set(Path(path).read_text().split()) == done


def test_a_handshake_under_way_is_finished(transport, generations, connect, directory):
    """Who was let in a moment before is told in the usual way that it has to call again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{directory}/notify")
        notify.settimeout(20)
        first = generations(
            address_of(transport, directory), env={"NOTIFY_SOCKET": f"{directory}/notify"}
        )
        (address,) = first.addresses
        assert notify.recv(100) == b"READY=1"
        client = connect(address)
        with raw_socket(address) as late, raw_socket(address) as silent:
            late.settimeout(20)
            silent.settimeout(20)
            hello = message(HELLO, transport)
            late.sendall(hello[:10])
            connect(address).call("stop")  # it was let in after these two
            assert notify.recv(100) == b"STOPPING=1"
            late.sendall(hello[10:])
            assert HANDSHAKE.unpack(late.recv(64))[2] == WELCOME
            assert not silent.recv(64)  # is not waited for
        assert first.process.wait(20) == 0
        with pytest.raises(shmrpc.ConnectError):
            client.call("pid", timeout=0.1)


def test_stop_twice_and_in_many_threads(transport, directory):
    server = shmrpc.Server(address_of(transport, directory))
    server.stop()  # never started: nothing to do
    for _ in range(3):
        server.start()
        in_threads(8, lambda _: server.stop(grace=1.0))
        assert server.addresses == []
        server.stop()


def test_a_second_stop_waits_for_the_first(directory):
    """Whoever comes back from stop() may end the process."""
    server = shmrpc.Server("calc")
    entered, release = threading.Event(), threading.Event()

    @server.method
    def hold():
        entered.set()
        release.wait(20)

    with server, shmrpc.connect("calc") as client:
        future = client.submit("hold")
        assert entered.wait(20)
        ended = []
        stops = [
            threading.Thread(target=lambda: (server.stop(20), ended.append(time.monotonic())))
            for _ in range(2)
        ]
        for thread in stops:
            thread.start()
        wait_until(lambda: not server.addresses)
        assert not ended
        release.set()
        for thread in stops:
            thread.join(20)
        assert future.result(20) is None
    assert len(ended) == 2


def test_the_name_is_free_right_after_a_stop(transport, directory):
    address = address_of(transport, directory)
    for turn in range(10):
        server = shmrpc.Server(address)
        server.method(name="turn")(lambda turn=turn: turn)
        with server:
            (address,) = server.addresses  # tcp: the same port again
            with shmrpc.connect(address) as client:
                assert client.call("turn") == turn
            start = time.monotonic()
        assert time.monotonic() - start < 1 * SLACK


def test_the_name_is_free_while_the_old_server_drains(transport, generations, connect, directory):
    first = generations(address_of(transport, directory))
    (address,) = first.addresses
    client = connect(address)
    release = f"{directory}/release"
    future = client.submit("hold", release)
    wait_until(lambda: os.path.exists(f"{release}.running"))
    client.call("stop", 20.0)
    call_until_refused(client)
    second = generations(address)
    assert client.call("pid") == second.pid  # the same client, by itself
    Path(release).touch()
    assert future.result(20) == first.pid
    assert first.process.wait(20) == 0
    assert connect(address).call("pid") == second.pid
