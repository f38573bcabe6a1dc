"""Interceptors around real calls: each kind of call, both sides, three transports."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading

import pytest
from conftest import address_of, in_threads, wait_until
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry
from tracing import Traces, is_child

import shmrpc
from shmrpc.prometheus import Prometheus


class Recorder:
    """Keeps the calls it saw, and how each ended."""

    def __init__(self):
        self.calls = []
        self.ends = []

    def intercept(self, call, proceed):
        self.calls.append(call)
        call.add_done_callback(lambda ended: self.ends.append((ended.method, ended.code)))
        return proceed(call)


class Interceptor:
    """One of a function."""

    def __init__(self, function):
        self.intercept = function


def offer(server, released):
    """The methods of these tests."""

    @server.method(idempotent=True)
    def add(a, b=10):
        return a + b

    @server.method
    def count(n, fail=False):
        yield from range(n)
        if fail:
            raise ValueError("at the end")

    @server.method
    def endless():
        yield from itertools.count()

    @server.method(requests=True)
    def total(requests):
        return sum(requests)

    @server.method(requests=True)
    def doubled(requests):
        for number in requests:
            yield 2 * number

    @server.method
    def divide(a, b):
        return a / b

    @server.method
    def abort(code):
        raise shmrpc.Abort(code, "as wanted")

    @server.method
    def metadata():
        return shmrpc.current_call().metadata

    @server.method
    def respond():
        call = shmrpc.current_call()
        call.send_initial_metadata({"initial": "handler"})
        call.set_trailing_metadata({"trailing": b"handler"})
        return "responded"

    @server.method
    def hold():
        call = shmrpc.current_call()
        while not released.wait(0.005) and not call.cancelled:
            pass
        released.wait(0.05)  # if its deadline has passed, let the caller notice first
        return "held"


@pytest.fixture
def serve(directory, transport):
    """``serve(interceptor, ...)`` starts a server of this process; returns its address."""
    released = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(released.set)

        def started(*interceptors, **options):
            address = address_of(transport, directory)
            server = shmrpc.Server(address, interceptors=list(interceptors), **options)
            offer(server, released)
            stack.enter_context(server)
            stack.callback(released.set)
            return server.addresses[0]

        yield started


def by_call(client):
    return client.call("add", 1, b=2)


def by_submit(client):
    return client.submit("add", 1, b=2).result(10)


def by_notify(client):
    return client.notify("add", 1, b=2)


def by_stream(client):
    return list(client.stream("count", 3, fail=False))


def by_open(client):
    with client.open("total") as call:
        call.send(1)
        call.send(2)
        call.close_send()
        return call.result()


def by_open_both_ways(client):
    with client.open("doubled") as call:
        call.send(1)
        call.send(2)
        call.close_send()
        return list(call)


# What is called, its result, its kind on the client and on the server, its method.
KINDS = [
    (by_call, 3, "unary", "unary", "add"),
    (by_submit, 3, "submit", "unary", "add"),
    (by_notify, None, "notify", "notify", "add"),
    (by_stream, [0, 1, 2], "stream", "stream", "count"),
    (by_open, 3, "stream", "stream", "total"),
    (by_open_both_ways, [2, 4], "stream", "stream", "doubled"),
]
each_kind = pytest.mark.parametrize(
    "run, result, kind, served_kind, method", KINDS, ids=[run.__name__ for run, *_ in KINDS]
)


@each_kind
def test_both_sides_see_each_kind(serve, connect, run, result, kind, served_kind, method):
    served, called = Recorder(), Recorder()
    address = serve(served)
    client = connect(address, interceptors=[called])
    assert run(client) == result
    wait_until(lambda: served.ends and called.ends)
    assert called.ends == served.ends == [(method, "OK")]
    (call,), (handled,) = called.calls, served.calls
    assert (call.method, call.kind, call.side) == (method, kind, "client")
    assert (handled.method, handled.kind, handled.side) == (method, served_kind, "server")
    assert call.timeout is None
    assert handled.deadline is None
    assert call.error is None
    assert str(os.getpid()) in call.peer
    assert str(os.getpid()) in handled.peer
    if method == "add":
        assert (call.args, call.kwargs) == ((1,), {"b": 2})
        assert (tuple(handled.args), handled.kwargs) == ((1,), {"b": 2})


def test_the_first_is_outermost(serve, connect):
    log = []

    def noting(name):
        def intercept(call, proceed):
            log.append(f"{name} in")
            try:
                return proceed(call)
            finally:
                log.append(f"{name} out")

        return Interceptor(intercept)

    address = serve(noting("server 1"), noting("server 2"))
    client = connect(address, interceptors=[noting("client 1"), noting("client 2")])
    assert client.call("add", 1, 2) == 3
    assert log[:4] == ["client 1 in", "client 2 in", "server 1 in", "server 2 in"]
    assert log[4:6] == ["server 2 out", "server 1 out"]
    assert log[6:] == ["client 2 out", "client 1 out"]


def test_without_interceptors_nothing_changes(serve, connect):
    client = connect(serve())
    assert [run(client) for run, *_ in KINDS] == [result for _, result, *_ in KINDS]


def test_timeouts_and_deadlines(serve, connect):
    served = Recorder()
    seen = []

    def limit(call, proceed):
        seen.append(call.timeout)
        call.timeout = 0.1 if call.method == "hold" else call.timeout
        return proceed(call)

    client = connect(serve(served), interceptors=[Interceptor(limit)])
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("hold")
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.submit("hold", timeout=50.0).result(10)
    assert client.call("add", 1, 2, timeout=60.0) == 3
    assert seen == [None, 50.0, 60.0]
    assert [call.timeout for call in served.calls] == [None] * len(served.calls)
    assert all(call.deadline is not None for call in served.calls)


def test_an_ended_call_has_its_error(serve, connect):
    served, called = Recorder(), Recorder()
    client = connect(serve(served), interceptors=[called])
    with pytest.raises(shmrpc.RemoteError):
        client.call("abort", "NOT_FOUND")
    with pytest.raises(shmrpc.RemoteError):
        client.submit("abort", "DATA_LOSS").result(10)
    with pytest.raises(shmrpc.RemoteError, match="at the end"):
        list(client.stream("count", 2, fail=True))
    with pytest.raises(shmrpc.RemoteError, match="unexpected keyword"):
        client.call("add", 1, c=2)
    with pytest.raises(TypeError):
        client.call("add", object())  # never sent
    codes = ["NOT_FOUND", "DATA_LOSS", "UNKNOWN", "INVALID_ARGUMENT"]
    wait_until(lambda: len(served.ends) == 4 and len(called.ends) == 5)
    assert [code for _, code in served.ends] == codes
    assert [code for _, code in called.ends] == [*codes, "UNKNOWN"]
    assert isinstance(served.calls[0].error, shmrpc.Abort)
    assert isinstance(called.calls[0].error, shmrpc.RemoteError)
    assert isinstance(called.calls[4].error, TypeError)


def test_cancelled_streams_and_futures_end_on_both_sides(serve, connect):
    served, called = Recorder(), Recorder()
    client = connect(serve(served), interceptors=[called])
    stream = client.stream("endless")
    assert next(iter(stream)) == 0
    stream.close()
    wait_until(lambda: served.ends and called.ends)
    assert called.ends == served.ends == [("endless", "CANCELLED")]
    future = client.submit("hold")
    wait_until(lambda: len(served.calls) == 2)
    assert future.cancel()
    wait_until(lambda: len(served.ends) == 2 and len(called.ends) == 2)
    assert called.ends[1] == ("hold", "CANCELLED")


def test_unknown_methods_do_not_get_to_the_servers_interceptors(serve, connect):
    served = Recorder()
    client = connect(serve(served))
    for use in (client.call, lambda name: client.submit(name).result(10)):
        with pytest.raises(shmrpc.MethodNotFound):
            use("no_such_method")
    assert client.call("add", 1, 2) == 3
    assert [call.method for call in served.calls] == ["add"]


# ---- metadata ----


def test_metadata_of_the_request(serve, connect):
    served = Recorder()
    given = {"from": "caller"}

    def stamp(call, proceed):
        call.metadata["by"] = b"interceptor"
        return proceed(call)

    client = connect(serve(served), interceptors=[Interceptor(stamp)])
    expected = {"from": "caller", "by": b"interceptor"}
    assert client.call("metadata", metadata=given) == expected
    assert client.submit("metadata", metadata=given).result(10) == expected
    assert client.call("metadata") == {"by": b"interceptor"}
    assert [call.metadata for call in served.calls] == [expected, expected, {"by": b"interceptor"}]
    assert given == {"from": "caller"}  # the caller's own stays as it is


def test_metadata_of_the_response(serve, connect):
    called = Recorder()

    def stamp(call, proceed):
        call.initial_metadata["server"] = "first"
        result = proceed(call)
        call.trailing_metadata["server"] = b"last"
        return result

    client = connect(serve(Interceptor(stamp)), interceptors=[called])
    assert client.call("respond") == "responded"
    call = called.calls[0]
    assert call.initial_metadata == {"initial": "handler", "server": "first"}
    assert call.trailing_metadata == {"trailing": b"handler", "server": b"last"}
    assert client.submit("respond").result(10) == "responded"
    wait_until(lambda: len(called.ends) == 2)
    assert called.calls[1].trailing_metadata == call.trailing_metadata
    assert client.call("add", 1, 2) == 3
    assert called.calls[2].trailing_metadata == {"server": b"last"}


def test_metadata_of_a_failed_response(serve, connect):
    """Trailing metadata goes with errors too."""
    called = Recorder()

    def stamp(call, proceed):
        call.trailing_metadata["retry-after"] = "5"
        return proceed(call)

    client = connect(serve(Interceptor(stamp)), interceptors=[called])
    with pytest.raises(shmrpc.RemoteError):
        client.call("abort", "RESOURCE_EXHAUSTED")
    assert called.calls[0].trailing_metadata == {"retry-after": "5"}


# ---- changing and replacing ----


@pytest.mark.parametrize("side", ["client", "server"])
def test_the_request_may_be_replaced(serve, connect, side):
    def double(call, proceed):
        if call.method == "add":
            call.args = tuple(2 * arg for arg in call.args)
            call.kwargs = {key: 3 * value for key, value in call.kwargs.items()}
        return proceed(call)

    on_client = [Interceptor(double)] if side == "client" else []
    on_server = [Interceptor(double)] if side == "server" else []
    client = connect(serve(*on_server), interceptors=on_client)
    assert client.call("add", 1, b=2) == 8
    assert client.submit("add", 1, b=2).result(10) == 8
    assert client.call("add", 1, 2) == 6


@pytest.mark.parametrize("side", ["client", "server"])
def test_the_response_may_be_replaced(serve, connect, side):
    def negative(call, proceed):
        result = proceed(call)
        if call.kind == "stream":
            return (-item for item in result)
        return -result if call.kind == "unary" else result

    on_client = [Interceptor(negative)] if side == "client" else []
    on_server = [Interceptor(negative)] if side == "server" else []
    client = connect(serve(*on_server), interceptors=on_client)
    assert client.call("add", 1, 2) == -3
    assert list(client.stream("count", 3)) == [0, -1, -2]


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_call_need_not_happen(serve, connect, side):
    def cached(call, proceed):
        return "cached" if call.method == "divide" else proceed(call)

    recorder = Recorder()
    on_client = [recorder, Interceptor(cached)] if side == "client" else []
    on_server = [recorder, Interceptor(cached)] if side == "server" else []
    client = connect(serve(*on_server), interceptors=on_client)
    assert client.call("divide", 1, 0) == "cached"
    assert client.call("add", 1, 2) == 3
    wait_until(lambda: len(recorder.ends) == 2)
    assert recorder.ends == [("divide", "OK"), ("add", "OK")]


def test_a_stream_need_not_happen(serve, connect):
    served = Recorder()
    client = connect(
        serve(served), interceptors=[Interceptor(lambda call, proceed: iter(["cached"]))]
    )
    assert list(client.stream("count", 3)) == ["cached"]
    assert not served.calls


def test_a_client_may_proceed_again(serve, connect):
    served = Recorder()

    def twice(call, proceed):
        return [proceed(call), proceed(call)]

    client = connect(serve(served), interceptors=[Interceptor(twice)])
    assert client.call("add", 1, 2) == [3, 3]
    assert len(served.calls) == 2


# ---- errors in interceptors ----


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_a_clients_interceptor(serve, connect, when):
    class Broken(Exception):
        pass

    def broken(call, proceed):
        if when == "after":
            proceed(call)
        raise Broken(call.method)

    recorder = Recorder()
    address = serve()
    client = connect(address, interceptors=[recorder, Interceptor(broken)])
    for use in (client.call, client.notify, client.submit):
        with pytest.raises(Broken, match="add"):
            use("add", 1, 2)
    with pytest.raises(Broken):
        list(client.stream("count", 3))
    assert [code for _, code in recorder.ends][:3] == ["UNKNOWN"] * 3
    assert connect(address).call("add", 1, 2) == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_a_servers_interceptor(serve, connect, when, caplog):
    def broken(call, proceed):
        if call.metadata.get("fail") is None:
            return proceed(call)
        if when == "after":
            proceed(call)
        if call.metadata["fail"] == "abort":
            raise shmrpc.Abort("PERMISSION_DENIED", "not you", details=[call.method])
        raise ValueError("a broken interceptor")

    client = connect(serve(Interceptor(broken)))
    with pytest.raises(shmrpc.RemoteError, match="not you") as caught:
        client.call("add", 1, 2, metadata={"fail": "abort"})
    assert (caught.value.code, caught.value.details) == ("PERMISSION_DENIED", ["add"])
    with pytest.raises(shmrpc.RemoteError, match="a broken interceptor") as caught:
        client.call("add", 1, 2, metadata={"fail": "value"})
    assert (caught.value.code, caught.value.type) == ("UNKNOWN", "ValueError")
    with pytest.raises(shmrpc.RemoteError, match="not you"):
        list(client.stream("count", 3, metadata={"fail": "abort"}))
    client.notify("add", 1, 2, metadata={"fail": "value"})
    wait_until(lambda: "notification 'add' failed" in caplog.text)
    caplog.clear()  # its traceback keeps the worker's frames
    assert client.call("add", 1, 2) == 3


def test_what_is_no_interceptor_is_refused(directory):
    with pytest.raises(TypeError, match="interceptor"):
        shmrpc.Server("calc", interceptors=[print])
    with shmrpc.Server("calc"), pytest.raises(TypeError, match="interceptor"):
        shmrpc.connect("calc", interceptors=[object()])


def test_many_threads(serve, connect):
    served, called = Recorder(), Recorder()
    client = connect(serve(served), interceptors=[called])

    def work(number):
        for i in range(50):
            assert client.call("add", number, i) == number + i
            assert client.submit("add", number, i).result(20) == number + i
            assert list(client.stream("count", 2)) == [0, 1]

    in_threads(4, work)
    wait_until(lambda: len(served.ends) == len(called.ends) == 600)
    assert {code for _, code in served.ends + called.ends} == {"OK"}


# ---- metrics ----


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        self.interceptor = Prometheus(self.registry)

    def __call__(self, name, **labels):
        return self.registry.get_sample_value(f"shmrpc_{name}", labels) or 0

    def under_way(self):
        samples = [
            sample.value
            for metric in self.registry.collect()
            if metric.name == "shmrpc_calls_in_flight"
            for sample in metric.samples
        ]
        return sum(samples)


def test_metrics_after_errors(serve, connect):
    metrics = Metrics()
    client = connect(serve(metrics.interceptor), interceptors=[metrics.interceptor])
    for run, *_ in KINDS:
        run(client)
    with pytest.raises(shmrpc.RemoteError):
        client.call("divide", 1, 0)
    with pytest.raises(shmrpc.RemoteError):
        client.submit("abort", "NOT_FOUND").result(10)
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("hold", timeout=0.05)
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("no_such_method")
    client.submit("hold").cancel()
    stream = client.stream("endless")
    next(iter(stream))
    stream.close()
    wait_until(lambda: metrics.under_way() == 0)
    for side in ("client", "server"):
        divide = {"side": side, "method": "divide", "kind": "unary"}
        assert metrics("calls_started_total", **divide) == 1
        assert metrics("calls_handled_total", code="UNKNOWN", **divide) == 1
        assert metrics("calls_handled_total", code="OK", **divide) == 0
        assert metrics("call_seconds_count", **divide) == 1
        endless = {"side": side, "method": "endless", "kind": "stream"}
        assert metrics("calls_handled_total", code="CANCELLED", **endless) == 1
    abort = {"method": "abort", "code": "NOT_FOUND"}
    assert metrics("calls_handled_total", side="client", kind="submit", **abort) == 1
    assert metrics("calls_handled_total", side="server", kind="unary", **abort) == 1
    unknown = {"method": "no_such_method", "kind": "unary"}
    assert metrics("calls_started_total", side="client", **unknown) == 1
    assert metrics("calls_started_total", side="server", **unknown) == 0


def test_calls_of_a_client_that_is_killed_end(serve):
    metrics = Metrics()
    address = serve(metrics.interceptor)
    code = (
        "import shmrpc, sys\n"
        "client = shmrpc.connect(sys.argv[1])\n"
        "stream = iter(client.stream('endless'))\n"
        "client.submit('hold')\n"
        "print(next(stream), flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"0\n"
        wait_until(lambda: metrics.under_way() == 2)
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: metrics.under_way() == 0)


# ---- traces ----

# The last of three processes: it has an SDK of its own, and says which span its handler runs in.
LAST_HOP = """
import sys
import shmrpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from shmrpc.otel import OpenTelemetry

server = shmrpc.Server(sys.argv[1], interceptors=[OpenTelemetry(TracerProvider())])

@server.method
def where():
    span = trace.get_current_span()
    return [span.context.trace_id.to_bytes(16, "big"), span.parent.span_id.to_bytes(8, "big")]

with server:
    print(server.addresses[0], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def last_hop(directory, transport):
    process = subprocess.Popen(
        [sys.executable, "-c", LAST_HOP, address_of(transport, directory, "last")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def relay_by_call(client):
    return client.call("relay")


def relay_by_submit(client):
    return client.submit("relay").result(10)


def relay_by_stream(client):
    (where,) = client.stream("relay_stream")
    return where


def relay_by_open(client):
    with client.open("relay_requests") as call:
        call.send("go")
        call.close_send()
        return call.result()


@pytest.mark.parametrize("run", [relay_by_call, relay_by_submit, relay_by_stream, relay_by_open])
def test_a_trace_over_two_hops(directory, transport, connect, last_hop, run):
    with Traces() as traces:
        onward = connect(last_hop, interceptors=[traces.interceptor])
        server = shmrpc.Server(
            address_of(transport, directory, "first"), interceptors=[traces.interceptor]
        )

        @server.method
        def relay():
            with traces.tracer.start_as_current_span("work"):
                return onward.call("where")

        @server.method
        def relay_stream():
            yield relay()

        @server.method(requests=True)
        def relay_requests(requests):
            assert list(requests) == ["go"]
            return relay()

        with server:
            client = connect(server.addresses[0], interceptors=[traces.interceptor])
            with traces.tracer.start_as_current_span("root"):
                trace_id, parent_id = run(client)
            wait_until(lambda: len(traces.spans()) == 5)
        root, work = traces["root"], traces["work"]
        (served,) = traces.spans(SpanKind.SERVER)
        called = next(s for s in traces.spans(SpanKind.CLIENT) if s.name == served.name)
        last = traces["where"]
        assert is_child(called, root)
        assert is_child(served, called)
        assert is_child(work, served)
        assert is_child(last, work)
        assert int.from_bytes(trace_id, "big") == root.context.trace_id
        assert int.from_bytes(parent_id, "big") == last.context.span_id
        assert not trace.get_current_span().get_span_context().is_valid


def test_spans_of_failed_calls(serve, connect):
    with Traces() as traces:
        client = connect(serve(traces.interceptor), interceptors=[traces.interceptor])
        with pytest.raises(shmrpc.RemoteError):
            client.call("divide", 1, 0)
        with pytest.raises(shmrpc.RemoteError):
            client.call("abort", "NOT_FOUND")
        wait_until(lambda: len(traces.spans()) == 4)
        for name, served_status in (("divide", StatusCode.ERROR), ("abort", StatusCode.UNSET)):
            spans = {span.kind: span for span in traces.spans() if span.name == name}
            assert spans[SpanKind.CLIENT].status.status_code is StatusCode.ERROR
            assert spans[SpanKind.SERVER].status.status_code is served_status
            assert is_child(spans[SpanKind.SERVER], spans[SpanKind.CLIENT])


def test_the_span_of_a_stream_lasts_as_long(serve, connect):
    with Traces() as traces:
        client = connect(serve(traces.interceptor), interceptors=[traces.interceptor])
        stream = client.stream("endless")
        items = iter(stream)
        assert [next(items) for _ in range(5)] == list(range(5))
        assert not traces.spans()
        stream.close()
        wait_until(lambda: len(traces.spans()) == 2)
        codes = {span.attributes["rpc.response.status_code"] for span in traces.spans()}
        assert codes == {"CANCELLED"}
