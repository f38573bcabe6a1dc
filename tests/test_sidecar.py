"""A sidecar between real processes: every kind of call, its end, its policies, reloads, drains."""

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import in_threads, wait_until
from sidecars import Command, fds, pairs_of, starter

import shmrpc

run = starter()


@pytest.fixture
def configured(run, directory):
    """Start ``shmrpc sidecar`` with this file."""

    def start(text, **options):
        path = f"{directory}/sidecar.toml"
        with open(path, "w") as file:
            file.write(text)
        return run("sidecar", path, **options)

    return start


def rewrite(directory, text):
    path = f"{directory}/sidecar.toml"
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def health(sidecar):
    with urllib.request.urlopen(f"{sidecar.http}/health", timeout=20) as answer:
        return json.load(answer)


def metrics(sidecar):
    with urllib.request.urlopen(f"{sidecar.http}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"
    }


# ---- one sidecar that all kinds of calls go through, for each pair of transports ----

PAIRS = [("shm", "shm"), ("shm", "tcp"), ("unix", "shm"), ("tcp", "unix")]


between = pairs_of(PAIRS)


@pytest.fixture
def client(between, connect):
    return connect(between[1].address)


def test_unary_calls(client, between):
    assert client.call("echo", "x") == "x"
    assert client.call("add", 1, b=2) == 3  # with keywords
    assert client.call("keywords", 1, a=[2], b=None) == [[1], {"a": [2], "b": None}]
    assert client.call("nothing") is None
    assert client.call("pid") == between[0].pid
    assert client.submit("add", 1, 2).result() == 3
    assert client.call("context")["method"] == "context"


@pytest.mark.parametrize("size", [0, 1, 4000, 65536, 3_000_000])
def test_large_messages(client, size):
    data = os.urandom(size)
    assert client.call("echo", data) == data
    assert client.call("keywords", data, key=data) == [[data], {"key": data}]


def test_values_with_buffers(client):
    array = np.arange(300_000, dtype="i4").reshape(1000, 300)
    value = {"a": array, "b": bytes(70_000), "c": [array[5], "text", np.float32(2)]}

    def same(got):
        assert got["a"].dtype == array.dtype
        assert (got["a"] == array).all()
        assert got["b"] == value["b"]
        assert (got["c"][0] == array[5]).all()
        assert got["c"][1:] == ["text", 2]

    for _ in range(3):
        same(client.call("echo", value))
    same(client.submit("echo", value).result())
    with client.open("parrot", "tag") as call:
        for _ in range(3):
            call.send(value)
            same(next(call))
            call.send(1)
            assert next(call) == 1


def test_calls_at_the_same_time(client):
    results = in_threads(16, lambda n: [client.call("add", n, i) for i in range(40)])
    assert results == [[n + i for i in range(40)] for n in range(16)]
    futures = [client.submit("echo", n) for n in range(500)]
    assert [future.result() for future in futures] == list(range(500))


def test_slow_calls_hold_up_nobody(client):
    held = [client.submit("hold") for _ in range(12)]
    wait_until(lambda: client.call("running") == 12)
    assert client.call("echo", 1, timeout=20) == 1
    client.call("release")
    for future in held:
        assert future.result(20) is None


def test_notifications(client):
    tag = f"note {time.monotonic()}"
    client.notify("remember", tag)
    client.notify("remember", item=tag)
    wait_until(lambda: client.call("remembered").count(tag) == 2)


def test_metadata_both_ways(client):
    assert client.call("metadata", metadata={"a": "1", "b": b"\xff"}) == {"a": "1", "b": b"\xff"}
    with client.stream("described", [1], {"end": "trailing"}, metadata={"m": "2"}) as call:
        assert call.initial_metadata == {"first": "initial", "m": "2"}
        assert list(call) == [1]
        assert call.trailing_metadata == {"end": "trailing"}
    client.notify("remember_metadata", metadata={"way": "one"})
    wait_until(lambda: {"way": "one"} in client.call("metadata_remembered"))


def test_initial_metadata_does_not_wait_for_the_first_item(client):
    tag = f"meta {time.monotonic()}"
    with client.open("quiet", tag, timeout=40) as call:
        assert call.initial_metadata == {"early": "yes"}
        client.call("go", tag)
        assert call.result() == "done"


def test_errors_arrive_as_they_were_raised(client, between, connect):
    direct = connect(between[0].address)

    def ended(one, *args, **options):
        with pytest.raises(shmrpc.Error) as caught:
            one.call(*args, **options)
        error = caught.value
        shown = getattr(error, "remote_traceback", "")
        details = getattr(error, "details", None)
        return type(error), error.code, getattr(error, "type", ""), details, shown

    for args in (
        ("abort", "NOT_FOUND", "no such order", {"id": 7}),
        ("inner_type_error",),
        ("raise_error", "ValueError", "text"),
        ("echo",),  # arguments that do not fit
        ("raise_surrogate",),
        ("unpackable", "object"),
        ("count", 3),  # which streams
    ):
        assert ended(client, *args) == ended(direct, *args)
    assert ended(client, "no_such_method")[:2] == (shmrpc.MethodNotFound, "UNIMPLEMENTED")


def test_streams_of_results(client):
    assert list(client.stream("count", 3000)) == list(range(3000))
    assert list(client.stream("count", 3, start=5)) == [5, 6, 7]
    assert [len(item) for item in client.stream("sized", [0, 1, 300_000, 5])] == [0, 1, 300_000, 5]
    received = []
    with pytest.raises(shmrpc.RemoteError, match="late") as caught:
        received.extend(client.stream("fail_after", [1, 2], "abort", "ABORTED", "late", {"x": 1}))
    assert (caught.value.code, caught.value.details) == ("ABORTED", {"x": 1})
    stream = client.stream("fail_after", [1, 2], "ValueError", "late")
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(shmrpc.RemoteError, match="late"):
        next(stream)


def test_streams_of_requests(client):
    with client.open("total", start=5) as call:
        for number in range(2000):
            call.send(number)
        assert call.result() == sum(range(2000)) + 5
    with client.open("lengths") as call:
        for size in (0, 300_000, 7):
            call.send(bytes(size))
        assert call.result() == [0, 300_000, 7]
    with client.open("idle") as call:  # ends before we have said anything
        assert call.result() == "took none"


def test_conversations(client):
    with client.open("parrot", "tag") as call:
        for item in ("a", b"b", None, [1]):
            call.send(item)
            assert next(call) == item
        call.close_send()
        assert list(call) == []
    with client.open("some", 2, "tag") as call:  # the handler ends first
        call.send(1)
        call.send(2)
        assert list(call) == [1, 2]


def test_a_reader_that_stops_stops_its_writer(client):
    tag = f"slow {time.monotonic()}"
    stream = client.stream("endless", tag, 1000)
    assert len(next(stream)) == 1000
    counts = collections.deque(maxlen=20)

    def stands_still():
        counts.append(client.call("trace", tag)["items"])
        return len(counts) == 20 and counts[0] == counts[-1]

    wait_until(stands_still, timeout=20)
    assert counts[0] < 5000  # windows and rings of two connections
    assert client.call("echo", 1) == 1  # others go on
    stream.close()
    wait_until(lambda: client.call("trace", tag)["end"] == "GeneratorExit")


def test_deadlines(client):
    before = client.call("context")
    assert before["deadline"] is None
    within = client.call("context", timeout=30)
    assert 0 < within["remaining"] <= 30
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("hold_until_cancelled", timeout=0.1)
    wait_until(lambda: client.call("running") == 0)  # told by then
    with pytest.raises(shmrpc.DeadlineExceeded):
        list(client.stream("endless", "late", timeout=0.1))
    wait_until(lambda: client.call("trace", "late")["end"] is not None)


def test_cancelling(client):
    future = client.submit("hold_until_cancelled")
    wait_until(lambda: client.call("running") == 1)
    assert future.cancel()
    wait_until(lambda: client.call("running") == 0)
    tag = f"cancel {time.monotonic()}"
    for end in ("close", "cancel"):
        stream = client.stream("patient", tag)
        assert next(stream) == "started"
        getattr(stream, end)()
        wait_until(lambda: (client.call("trace", tag) or {}).get("cancelled"))
        wait_until(lambda: client.call("trace", tag)["end"] is not None)
    with client.open("reluctant", tag) as call:
        call.send(1)
    client.call("go", tag)
    wait_until(lambda: client.call("trace", tag)["end"] == "Cancelled")


def test_callers_that_go(between):
    """Who hangs up has cancelled: unary calls and streams end at the server."""
    address = between[1].address
    with shmrpc.connect(address) as watch:
        leaver = shmrpc.connect(address)
        future = leaver.submit("hold_until_cancelled")
        stream = leaver.stream("patient", "gone")
        assert next(stream) == "started"
        wait_until(lambda: watch.call("running") == 1)
        leaver.close()
        assert future.exception() is not None
        wait_until(lambda: watch.call("running") == 0)
        wait_until(lambda: watch.call("trace", "gone")["end"] is not None)


def test_too_long_replies(between, connect):
    small = connect(between[1].address, max_message_bytes=2000)
    with pytest.raises(shmrpc.MessageTooLarge):
        small.call("zeros", 5000)
    with pytest.raises(shmrpc.MessageTooLarge):
        list(small.stream("sized", [1, 5000]))
    assert small.call("echo", 1) == 1


# ---- outcomes ----


@pytest.fixture
def chain(service, run, directory):
    """A server, a sidecar and a client's address."""
    server = service("shm")
    sidecar = run("sidecar", "--listen", "shm://front", "--upstream", server.address)
    return server, sidecar


def test_outcomes_when_the_server_dies(chain, connect, directory):
    server, _ = chain
    client = connect("front")
    running = client.submit("note_and_hold", f"{directory}/ran", "x")
    stream = client.stream("patient", "t")
    assert next(stream) == "started"
    wait_until(lambda: os.path.exists(f"{directory}/ran"))
    server.kill()
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        running.result(20)
    assert caught.value.outcome == "unknown"
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        next(stream)
    assert caught.value.outcome == "unknown"
    for method in (client.call, lambda name: list(client.stream(name))):
        with pytest.raises(shmrpc.ConnectionLost) as caught:
            method("anything")
        assert (caught.value.outcome, caught.value.code) == ("not_started", "UNAVAILABLE")


def test_outcome_of_calls_that_wait_at_a_server_that_dies(service, run, connect, directory):
    """It never took them: its segment shows that, and the sidecar passes it on."""
    server = service("shm", workers=1)
    http = ("--http", "127.0.0.1:0")
    sidecar = run("sidecar", "--listen", "shm://front", "--upstream", server.address, *http)
    client = connect("front")
    running = client.submit("note_and_hold", f"{directory}/ran", "x")
    wait_until(lambda: os.path.exists(f"{directory}/ran"))
    waiting = [client.submit("add", 1) for _ in range(3)]
    wait_until(lambda: health(sidecar)["in_flight"] == {"": 4})
    server.kill()
    assert [future.exception(20).outcome for future in waiting] == ["not_started"] * 3
    assert running.exception(20).outcome == "unknown"


def test_a_server_that_stops_and_comes_back(chain, connect, service):
    server, sidecar = chain
    client = connect("front", retries=5)
    assert client.call("pid") == server.pid
    assert server.stop() == 0
    with pytest.raises((shmrpc.ConnectionLost, shmrpc.ConnectError)) as caught:
        connect("front").call("pid")
    assert caught.value.outcome == "not_started"
    again = service(server.address)
    assert client.call("pid") == again.pid
    assert sidecar.process.poll() is None


def test_outcome_when_the_sidecar_dies(chain, connect, directory):
    _, sidecar = chain
    client = connect("front")
    future = client.submit("note_and_hold", f"{directory}/ran", "x")
    wait_until(lambda: os.path.exists(f"{directory}/ran"))
    sidecar.close()
    assert future.exception(20).outcome == "unknown"


def test_upstream_that_is_not_there_yet(run, service, connect, directory):
    sidecar = run("sidecar", "--listen", "shm://front", "--upstream", f"shm://{directory}/late")
    client = connect("front")
    with pytest.raises(shmrpc.ConnectionLost, match="start it") as caught:
        client.call("add", 1, 2)
    assert caught.value.outcome == "not_started"
    with pytest.raises(shmrpc.ConnectionLost) as described:  # as the command asks first
        client.call("shmrpc.describe", "echo")
    assert described.value.outcome == "not_started"
    service(f"shm://{directory}/late")
    assert client.call("add", 1, 2) == 3
    assert client.stats()["reconnects"] == 0  # that was between the sidecar and the server
    assert sidecar.process.poll() is None


def test_a_chain_of_sidecars(chain, run, connect, directory):
    server, _ = chain
    run("sidecar", "--listen", "tcp://127.0.0.1:0", "--upstream", "shm://front")
    outer = run("sidecar", "--listen", "shm://outer", "--upstream", "shm://front")
    client = connect("outer")
    assert client.call("pid") == server.pid
    assert list(client.stream("count", 10)) == list(range(10))
    server.kill()
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        client.call("pid")
    assert caught.value.outcome == "not_started"
    assert outer.stop() == 0


# ---- clients that behave badly ----


def test_a_client_that_stops_reading(chain, connect, directory):
    """It is not read any more when its replies pile up; others go on, and nothing is kept of it."""
    server, sidecar = chain
    other = connect("front")
    script = (
        "import shmrpc, time; client = shmrpc.connect('front');"
        "futures = [client.submit('zeros', 60000) for _ in range(300)];"
        "print('sent', flush=True); time.sleep(100)"
    )
    stuck = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert stuck.stdout.readline() == b"sent\n"
        for number in range(50):
            assert other.call("echo", number, timeout=20) == number
        while_stuck = fds(sidecar.pid)
    finally:
        stuck.kill()
        stuck.wait()
        stuck.stdout.close()
    wait_until(lambda: fds(sidecar.pid) < while_stuck)
    assert other.call("pid") == server.pid


# ---- routes and policies ----


def toml(*routes, listen="shm://front", top="", **upstreams):
    lines = [f'listen = ["{listen}"]', 'http = "127.0.0.1:0"', top]
    for name, endpoints in upstreams.items():
        options = {"endpoints": endpoints} if isinstance(endpoints, list) else endpoints
        lines += [f"[upstreams.{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    for route in routes:
        lines.append("[[routes]]")
        for key, value in route.items():
            inline = (
                ", ".join(f"{k} = {v}" for k, v in value.items()) if isinstance(value, dict) else ""
            )
            lines.append(f"{key} = " + (f"{{ {inline} }}" if inline else json.dumps(value)))
    return "\n".join(lines) + "\n"


def test_routes_by_prefix(service, configured, connect):
    one, two, three = service("shm"), service("tcp"), service("unix")
    configured(
        toml(
            {"prefix": "math.", "upstream": "two"},
            {"prefix": "pi", "upstream": "one"},
            {"prefix": "pid", "upstream": "three"},
            {"prefix": "basket.", "upstream": "one"},
            one=[one.address],
            two=[two.address],
            three=[three.address],
        )
    )
    client = connect("front")
    assert client.call("pid") == three.pid  # the longest prefix
    assert client.call("math.add", 1, 2) == 3
    assert client.call("basket.version") == "1.0"
    with pytest.raises(shmrpc.MethodNotFound, match="no route for 'echo'"):
        client.call("echo", 1)
    with pytest.raises(shmrpc.MethodNotFound, match="no route for 'count'"):
        list(client.stream("count", 1))
    client.notify("echo", 1)  # nobody is told
    assert client.call("pid") == three.pid


def test_least_loaded_endpoint(service, configured, connect):
    servers = [service("shm"), service("tcp")]
    configured(toml({"upstream": "both"}, both=[server.address for server in servers]))
    client = connect("front")
    pids = {server.pid for server in servers}
    assert {client.call("pid") for _ in range(4)} == pids  # takes turns among the equal
    busy = client.submit("hold")
    direct = [connect(server.address) for server in servers]
    wait_until(lambda: sum(one.call("running") for one in direct) == 1)
    idle = next(s.pid for s, one in zip(servers, direct, strict=True) if not one.call("running"))
    assert {client.call("pid") for _ in range(6)} == {idle}
    for one in direct:
        one.call("release")
    assert busy.result(20) is None


def test_weights(service, configured, connect):
    old, new = service("shm"), service("tcp")
    configured(
        toml({"upstream": {"old": 3, "new": 1}}, old=[old.address], new=[new.address]),
    )
    client = connect("front")
    seen = collections.Counter(client.call("pid") for _ in range(800))
    assert 500 < seen[old.pid] < 700  # 600 expected, 8 standard deviations away
    assert seen[new.pid] == 800 - seen[old.pid]


def test_failing_endpoints_are_left_out(service, configured, connect, directory):
    good = service("shm")
    sidecar = configured(
        toml(
            {"upstream": "two", "retries": 1},
            two={
                "endpoints": [good.address, f"shm://{directory}/nobody"],
                "eject_after": 2,
                "eject_seconds": 600,
            },
        )
    )
    client = connect("front")
    assert {client.call("pid") for _ in range(20)} == {good.pid}  # each retried where it has to be
    found = {e["address"]: e["ejected"] for e in health(sidecar)["upstreams"]["two"]}
    assert found == {good.address: False, f"shm://{directory}/nobody": True}
    values = metrics(sidecar)
    name = f'shmrpc_sidecar_endpoint_ejected{{endpoint="{good.address}",upstream="two"}}'
    assert values[name] == 0.0
    good.kill()
    with pytest.raises(shmrpc.ConnectionLost):  # all are bad: none is the last one for ever
        client.call("pid")


def test_timeout_of_a_route(service, configured, connect):
    server = service("shm")
    configured(
        toml(
            {"upstream": "one", "timeout": 30.0},
            {"prefix": "hold", "upstream": "one", "timeout": 0.2},
            {"prefix": "endless", "upstream": "one", "timeout": 0.2},
            one=[server.address],
        )
    )
    client = connect("front")
    assert 0 < client.call("context")["remaining"] <= 30
    assert client.call("context", timeout=5)["remaining"] <= 5
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("hold_until_cancelled")
    wait_until(lambda: client.call("running") == 0)
    with pytest.raises(shmrpc.DeadlineExceeded):
        list(client.stream("endless", "tag"))
    wait_until(lambda: client.call("trace", "tag")["end"] is not None)


def test_concurrency_of_a_route(service, configured, connect):
    server = service("shm")
    configured(
        toml(
            {"upstream": "one"},
            {"prefix": "hold", "upstream": "one", "max_concurrency": 2},
            {"prefix": "patient", "upstream": "one", "max_concurrency": 1},
            one=[server.address],
        )
    )
    client = connect("front")
    held = [client.submit("hold") for _ in range(2)]
    wait_until(lambda: client.call("running") == 2)
    with pytest.raises(shmrpc.Overloaded, match="2 calls run already"):
        client.call("hold")
    client.call("release")
    assert [future.result(20) for future in held] == [None, None]
    assert client.call("hold") is None  # there is room again
    stream = client.stream("patient", "a")
    assert next(stream) == "started"
    with pytest.raises(shmrpc.Overloaded):
        list(client.stream("patient", "b"))
    stream.close()

    def opens():
        with client.stream("patient", "c") as other, contextlib.suppress(shmrpc.Overloaded):
            return next(other) == "started"

    wait_until(opens)


def test_rate_of_a_route(service, configured, connect):
    server = service("shm")
    configured(toml({"upstream": "one", "rate": 0.001, "burst": 3}, one=[server.address]))
    client = connect("front")
    assert [client.call("echo", n) for n in range(3)] == [0, 1, 2]
    with pytest.raises(shmrpc.Overloaded, match="calls a second"):
        client.call("echo", 3)


def test_circuit_breaker(service, configured, connect, directory):
    server = service("shm")
    sidecar = configured(
        toml(
            {"upstream": "one", "break_after": 3, "break_seconds": 2.0},
            one={"endpoints": [server.address]},
        )
    )
    client = connect("front")
    assert client.call("echo", 1) == 1
    server.kill()
    for _ in range(3):
        with pytest.raises(shmrpc.ConnectionLost):
            client.call("echo", 1)
    with pytest.raises(shmrpc.ConnectionLost, match="left alone") as caught:
        client.call("echo", 1)
    assert caught.value.outcome == "not_started"
    assert health(sidecar)["open_breakers"] == [""]
    service(server.address)

    def closed():
        with contextlib.suppress(shmrpc.ConnectionLost):
            return client.call("echo", 1) == 1

    wait_until(closed, timeout=20)
    assert health(sidecar)["open_breakers"] == []
    with pytest.raises(shmrpc.RemoteError):  # answers are no failures
        client.call("abort", "UNAVAILABLE")


def test_retries_of_calls_that_may_have_run(service, configured, connect, directory):
    """Only of methods that say that they may run twice."""
    servers = [service("shm"), service("tcp")]
    configured(
        toml({"upstream": "two", "retries": 2}, two=[server.address for server in servers]),
    )
    client = connect("front")
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        client.call("die")
    assert caught.value.outcome == "unknown"
    left = next(server for server in servers if not gone(server))
    assert {client.call("pid") for _ in range(4)} == {left.pid}  # not_started is safe


def gone(server):
    try:
        server.process.wait(0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_idempotent_methods_are_declared_through_the_sidecar(chain, connect, directory):
    client = connect("front")
    assert client.call("shmrpc.describe", "add")["idempotent"] is False
    assert client.call("shmrpc.describe", "count")["streams"] is True
    assert client.call("shmrpc.describe", "no_such_thing") is None


def test_allowed_users(service, configured, connect):
    server = service("shm")
    configured(
        toml(
            {"upstream": "one", "allow_uids": [os.getuid()]},
            {"prefix": "pid", "upstream": "one", "allow_uids": [os.getuid() + 1]},
            one=[server.address],
        )
    )
    client = connect("front")
    assert client.call("echo", 1) == 1
    with pytest.raises(shmrpc.RemoteError, match=f"uid {os.getuid()} may not call 'pid'") as caught:
        client.call("pid")
    assert caught.value.code == "PERMISSION_DENIED"


# ---- reloading, draining ----


def test_reload_drops_no_call(service, configured, connect, directory):
    old, new = service("shm"), service("tcp")
    before = toml({"upstream": "one"}, one=[old.address])
    after = toml({"upstream": "one"}, one=[new.address])
    sidecar = configured(before)
    client = connect("front")
    running = client.submit("hold", result="from the old one")
    stream = client.stream("stepwise", "steps", 3)
    assert next(stream) == 0
    direct = connect(old.address)
    wait_until(lambda: direct.call("running") == 1)
    failures, seen, stop = [], collections.Counter(), threading.Event()

    def call():
        with shmrpc.connect("front") as mine:
            while not stop.is_set():
                try:
                    seen[mine.call("pid")] += 1
                except shmrpc.Error as error:
                    failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 9):
            rewrite(directory, after if number % 2 else before)
            assert sidecar.reload().startswith("reloaded")
        rewrite(directory, after)
        sidecar.reload()
        wait_until(lambda: seen[new.pid] > 0 and seen[old.pid] > 0)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failures
    assert client.call("pid") == new.pid
    direct.call("release")
    direct.call("go", "steps")
    assert running.result(20) == "from the old one"
    assert list(stream) == [1, 2]
    assert health(sidecar)["reloads"] == 9
    connections = fds(sidecar.pid)
    assert connections < 60


def test_a_bad_file_changes_nothing(service, configured, connect, directory):
    server = service("shm")
    sidecar = configured(toml({"upstream": "one"}, one=[server.address]))
    client = connect("front")
    for text, complaint in (
        ("listen = [", "no TOML"),
        ("surprise = 1", "unknown key"),
        (toml({"upstream": "two"}, one=[server.address]), "there is no upstream 'two'"),
        (toml({"upstream": "one"}, one=[server.address], listen="shm:///no/dir/x"), "/no/dir"),
    ):
        rewrite(directory, text)
        said = sidecar.reload()
        assert said.startswith("stays as it was")
        assert complaint in said
        assert client.call("pid") == server.pid
    rewrite(directory, toml({"upstream": "one"}, one=[server.address], listen="shm://other"))
    assert sidecar.reload().startswith("reloaded")
    assert connect("other").call("pid") == server.pid

    def is_gone():
        with contextlib.suppress(shmrpc.ConnectError):
            connect("front", timeout=0.2)
            return False
        return True

    wait_until(is_gone)


def test_draining(chain, connect):
    server, sidecar = chain
    client = connect("front")
    other = connect("front")
    running = client.submit("hold", result="done")
    stream = client.stream("stepwise", "steps", 2)
    assert next(stream) == 0
    direct = connect(server.address)
    wait_until(lambda: direct.call("running") == 1)
    sidecar.process.terminate()
    with pytest.raises((shmrpc.ConnectionLost, shmrpc.ConnectError)) as caught:
        while True:
            other.call("echo", 1)
    assert getattr(caught.value, "outcome", "not_sent") in {"not_started", "not_sent"}
    direct.call("release")
    direct.call("go", "steps")
    assert running.result(20) == "done"
    assert list(stream) == [1]
    assert sidecar.wait() == 0


def test_drain_ends_what_takes_too_long(service, run, connect):
    server = service("shm")
    where = ("--listen", "shm://front", "--upstream", server.address)
    sidecar = run("sidecar", *where, "--grace", "0.2")
    client = connect("front")
    running = client.submit("hold_until_cancelled")
    stream = client.stream("patient", "drain")
    assert next(stream) == "started"
    direct = connect(server.address)
    wait_until(lambda: direct.call("running") == 1)
    assert sidecar.stop() == 0
    assert isinstance(running.exception(20), shmrpc.Error)
    with pytest.raises(shmrpc.Error):
        next(stream)
    wait_until(lambda: direct.call("running") == 0)
    wait_until(lambda: direct.call("trace", "drain")["end"] is not None)


# ---- health, metrics, starting ----


def test_health_and_metrics(service, run, connect):
    server = service("shm")
    where = ("--listen", "shm://front", "--upstream", server.address)
    sidecar = run("sidecar", *where, "--http", "127.0.0.1:0")
    client = connect("front")
    for _ in range(5):
        client.call("echo", 1)
    with pytest.raises(shmrpc.RemoteError):
        client.call("abort", "NOT_FOUND")
    list(client.stream("count", 3))
    found = health(sidecar)
    assert found["status"] == "ok"
    assert found["listen"] == ["shm://front"]
    assert found["upstreams"]["upstream"][0]["address"] == server.address
    values = wait_until(
        lambda: (
            (v := metrics(sidecar)).get('shmrpc_sidecar_calls_total{code="OK",route=""}') == 6 and v
        )
    )
    assert values['shmrpc_sidecar_calls_total{code="NOT_FOUND",route=""}'] == 1
    assert values['shmrpc_sidecar_call_seconds_count{route=""}'] == 7
    assert values['shmrpc_sidecar_call_seconds_bucket{le="+Inf",route=""}'] == 7
    assert values['shmrpc_sidecar_calls_in_flight{route=""}'] == 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{sidecar.http}/", timeout=20)


def failure(*arguments):
    command = Command("sidecar", *arguments, ready=False)
    try:
        return command.wait(), command.said
    finally:
        command.close()


def test_addresses_in_use(service, directory):
    server = service("shm", "tcp")
    taken = server.addresses[1]
    port = taken.rpartition(":")[2]
    upstream = ("--upstream", "shm://elsewhere")
    for arguments, words in (
        (("--listen", server.address), "in use"),
        (("--listen", taken), port),
        (("--listen", "shm://front", "--http", f"127.0.0.1:{port}"), port),
        (("--listen", "shm://front", "--listen", taken), port),
    ):
        status, said = failure(*arguments, *upstream)
        assert status == 2
        assert said.count("\n") == 1
        assert words in said
    with pytest.raises(shmrpc.ConnectError):  # nothing listens on
        shmrpc.connect("front")


def test_wrong_usage(directory):
    assert failure()[0] == 2
    assert "--listen and --upstream" in failure("--listen", "shm://x")[1]
    assert "does not go with --listen" in failure("x.toml", "--listen", "shm://x")[1]
    assert "No such file" in failure(f"{directory}/none.toml")[1]
    status, said = failure("--listen", "carrier://pigeon", "--upstream", "shm://x")
    assert (status, "carrier" in said) == (2, True)


def test_interrupt_ends_it(run, service, connect):
    server = service("shm")
    sidecar = run("sidecar", "--listen", "shm://front", "--upstream", server.address)
    assert connect("front").call("pid") == server.pid
    sidecar.process.send_signal(signal.SIGINT)
    assert sidecar.wait() == 0


def test_byte_streams_are_for_tunnels(chain):
    from shmrpc.bytestream import connect_bytes

    with pytest.raises(shmrpc.ConnectError, match="no byte streams"):
        connect_bytes("shm://front")


def test_cancelling_at_any_moment(chain, connect):
    """Before it is read, while it is sent on, while its reply is on the way: each call ends."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    client = connect("front")

    def work(number):
        for _ in range(60):
            kind = rng.randrange(3)
            if kind == 0:
                future = client.submit("hold_until_cancelled")
            elif kind == 1:
                future = client.submit("echo", number)
            else:
                future = client.submit("zeros", 200_000)
            for _ in range(rng.choice((0, 1, 50, 2000))):
                pass
            if not future.cancel():
                assert future.result(20) is not None

    in_threads(4, work, timeout=50)
    wait_until(lambda: client.call("running", timeout=20) == 0, timeout=20)
    assert client.call("echo", 1) == 1
