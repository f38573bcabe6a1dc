"""Spans of calls, with OpenTelemetry's own SDK."""

import itertools
from concurrent.futures import Future

import pytest
from chains import Script, call_info, finished, intercepted
from conftest import in_threads
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from tracing import Traces, current, is_child

import shmrpc
from shmrpc.otel import OpenTelemetry
from shmrpc.retries import Retries


@pytest.fixture
def traces():
    with Traces() as kept:
        yield kept


def serve(traces, handler, kind="unary"):
    """A connection to a server whose handler takes the CallInfo."""

    def final(call):
        served = call_info(
            call.method, kind, "server", *call.args, metadata=dict(call.metadata), peer="pid 7"
        )
        return intercepted([traces.interceptor], served, handler)

    return final


# ---- one call ----


def test_both_sides_of_a_call(traces):
    call = call_info("math.add", "unary", "client", 1, 2, peer="shm://calc (pid 12)")
    assert intercepted([traces.interceptor], call, serve(traces, lambda c: sum(c.args))) == 3
    server, client = traces.spans()
    assert (client.name, client.kind) == ("math.add", SpanKind.CLIENT)
    assert (server.name, server.kind) == ("math.add", SpanKind.SERVER)
    assert is_child(server, client)
    assert server.parent.is_remote
    assert dict(client.attributes) == {
        "rpc.system.name": "shmrpc",
        "rpc.method": "math.add",
        "rpc.response.status_code": "OK",
        "server.address": "calc",
    }
    assert dict(server.attributes) == {
        "rpc.system.name": "shmrpc",
        "rpc.method": "math.add",
        "rpc.response.status_code": "OK",
    }
    for span in (client, server):
        assert span.status.status_code is StatusCode.UNSET
        assert span.instrumentation_scope.name == "shmrpc"
    traceparent = call.metadata["traceparent"]
    assert traceparent.split("-")[1] == trace.format_trace_id(client.context.trace_id)


@pytest.mark.parametrize(
    "peer, attributes",
    [
        ("shm://calc (pid 12)", {"server.address": "calc"}),
        ("shm:///run/calc.sock (pid 12)", {"server.address": "/run/calc.sock"}),
        ("unix:///run/calc.sock", {"server.address": "/run/calc.sock"}),
        ("tcp://127.0.0.1:7001", {"server.address": "127.0.0.1", "server.port": 7001}),
        ("tcp://[::1]:7001 (pid 12)", {"server.address": "::1", "server.port": 7001}),
        ("", {}),
        ("?", {}),
    ],
)
def test_where_the_server_is(traces, peer, attributes):
    intercepted([traces.interceptor], call_info(peer=peer), lambda _: None)
    found = traces.only().attributes
    assert {key: found[key] for key in found if key.startswith("server.")} == attributes


def test_the_callers_span_is_the_parent(traces):
    with traces.tracer.start_as_current_span("outer") as outer:
        intercepted([traces.interceptor], call_info("add"), lambda _: None)
        assert trace.get_current_span() is outer
    assert is_child(traces["add"], traces["outer"])


def test_tracestate_travels(traces):
    metadata = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=value",
    }
    call = call_info("add", side="server", metadata=metadata)
    onward = []

    def handler(_):
        further = call_info("next")
        intercepted([traces.interceptor], further, lambda c: onward.append(dict(c.metadata)))

    intercepted([traces.interceptor], call, handler)
    assert onward[0]["tracestate"] == "vendor=value"
    assert onward[0]["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")


def test_two_hops(traces):
    """Client, a handler that calls another server, that one's handler with a span of its own."""

    def inner(_):
        with traces.tracer.start_as_current_span("work"):
            return "done"

    def outer(_):
        return intercepted([traces.interceptor], call_info("inner"), serve(traces, inner))

    with traces.tracer.start_as_current_span("root"):
        call = call_info("outer")
        assert intercepted([traces.interceptor], call, serve(traces, outer)) == "done"
    chain = [
        traces["root"],
        *(s for s in traces.spans(SpanKind.CLIENT) if s.name == "outer"),
        *(s for s in traces.spans(SpanKind.SERVER) if s.name == "outer"),
        *(s for s in traces.spans(SpanKind.CLIENT) if s.name == "inner"),
        *(s for s in traces.spans(SpanKind.SERVER) if s.name == "inner"),
        traces["work"],
    ]
    assert len(chain) == 6
    assert all(is_child(child, parent) for parent, child in itertools.pairwise(chain))


def test_a_servers_thread_has_no_span_between_calls(traces):
    call = call_info("add", side="server")
    intercepted([traces.interceptor], call, lambda _: None)
    assert not current().is_valid
    assert traces.only().parent is None


def test_notifications(traces):
    call = call_info("log", "notify")
    intercepted([traces.interceptor], call, serve(traces, lambda _: None, "notify"))
    server, client = traces.spans()
    assert is_child(server, client)


@given(
    metadata=st.dictionaries(
        st.sampled_from(["traceparent", "tracestate", "baggage"]) | st.text(max_size=5),
        st.text() | st.binary() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-.{2}"),
    )
)
def test_a_peer_may_send_any_metadata(metadata):
    every = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
    call = call_info("add", side="server", metadata=metadata)
    with Traces() as traces:
        interceptor = OpenTelemetry(traces.provider, every)
        assert intercepted([interceptor], call, lambda _: "result") == "result"
        assert traces.only().name == "add"


def test_another_propagator(traces):
    every = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
    interceptor = OpenTelemetry(traces.provider, every)
    call = call_info("add")

    def served(call):
        inside = call_info("add", side="server", metadata=dict(call.metadata))
        return intercepted([interceptor], inside, lambda _: baggage.get_baggage("user"))

    token = context.attach(baggage.set_baggage("user", "ada"))
    try:
        assert intercepted([interceptor], call, served) == "ada"
    finally:
        context.detach(token)
    assert call.metadata["baggage"] == "user=ada"


def test_without_an_sdk_calls_just_work():
    """The API alone makes spans that are none."""
    interceptor = OpenTelemetry(trace.NoOpTracerProvider())
    call = call_info("add", "unary", "client", 1)
    assert intercepted([interceptor], call, lambda c: c.args[0]) == 1
    assert call.metadata == {}
    served = call_info("add", "stream", "server")
    assert list(intercepted([interceptor], served, lambda _: (n for n in "ab"))) == ["a", "b"]


def test_what_is_not_sampled_is_not_sampled_further_on():
    call = call_info("add")
    with Traces(sampler=ALWAYS_OFF) as traces:
        intercepted([traces.interceptor], call, lambda _: None)
    flags = int(call.metadata["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1
    assert not traces.spans()


# ---- errors ----


def failing(error):
    def final(_):
        raise error

    return final


def test_errors_of_a_client(traces):
    error = shmrpc.RemoteError("no order", type="Abort", code="NOT_FOUND", remote_traceback="x\ny")
    with pytest.raises(shmrpc.RemoteError):
        intercepted([traces.interceptor], call_info(), failing(error))
    span = traces.only()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "RemoteError: Abort: no order"
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert span.attributes["error.type"] == "NOT_FOUND"
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "shmrpc.errors.RemoteError"
    assert "no order" in event.attributes["exception.message"]


@pytest.mark.parametrize(
    "error, code, kind",
    [
        (shmrpc.DeadlineExceeded("late"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        (shmrpc.ConnectionLost("gone"), "UNAVAILABLE", "UNAVAILABLE"),
        (KeyboardInterrupt(), "CANCELLED", "CANCELLED"),
        (TypeError("argument 1"), "UNKNOWN", "TypeError"),
    ],
    ids=repr,
)
def test_kinds_of_errors(traces, error, code, kind):
    with pytest.raises(type(error)):
        intercepted([traces.interceptor], call_info(), failing(error))
    attributes = traces.only().attributes
    assert (attributes["rpc.response.status_code"], attributes["error.type"]) == (code, kind)


def test_a_server_that_answers_no_has_not_failed(traces):
    """By the conventions: who asks for what is not there makes a mistake, the server none."""
    call = call_info(side="server")
    with pytest.raises(shmrpc.Abort):
        intercepted([traces.interceptor], call, failing(shmrpc.Abort("NOT_FOUND", "no order")))
    span = traces.only()
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert not span.events


def test_a_handler_that_breaks(traces):
    call = call_info(side="server")
    with pytest.raises(ZeroDivisionError):
        intercepted([traces.interceptor], call, lambda _: 1 / 0)
    span = traces.only()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "ZeroDivisionError"
    assert span.events[0].attributes["exception.type"] == "ZeroDivisionError"


def test_an_error_that_resists_description(traces):
    class Unprintable(Exception):
        def __str__(self):
            raise ValueError("no text")

    with pytest.raises(Unprintable):
        intercepted([traces.interceptor], call_info(side="server"), failing(Unprintable()))
    span = traces.only()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"].endswith("Unprintable")


def test_a_result_that_can_not_be_sent(traces):
    """On a server the call ends after the handler: the span has what came of it."""
    call = call_info(side="server")
    chain_done = OpenTelemetry(traces.provider).intercept(call, lambda _: object())
    assert not traces.spans()
    call.finish(shmrpc.ProtocolError("not packable"))
    assert chain_done is not None
    assert traces.only().attributes["rpc.response.status_code"] == "INTERNAL"


# ---- futures ----


def test_the_span_of_a_future_ends_with_it(traces):
    future = Future()
    call = call_info("add", "submit")
    assert intercepted([traces.interceptor], call, lambda _: future) is future
    assert not traces.spans()
    assert not current().is_valid
    future.set_result(1)
    assert traces.only().attributes["rpc.response.status_code"] == "OK"


def test_a_finished_future(traces):
    call = call_info("add", "submit")
    assert intercepted([traces.interceptor], call, lambda _: finished(3)).result() == 3
    assert traces.only().name == "add"


@pytest.mark.parametrize("how", ["error", "cancel"])
def test_a_future_that_fails(traces, how):
    future = Future()
    intercepted([traces.interceptor], call_info("add", "submit"), lambda _: future)
    if how == "cancel":
        future.cancel()
    else:
        future.set_exception(shmrpc.Overloaded("busy"))
    span = traces.only()
    code = "CANCELLED" if how == "cancel" else "RESOURCE_EXHAUSTED"
    assert span.attributes["rpc.response.status_code"] == code
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_outside_of_retries_there_is_a_span_for_all_attempts(traces, kind):
    script = Script(["connect", "not_started", "result"])
    final = script.submit if kind == "submit" else script.proceed
    call = call_info("add", kind)
    result = intercepted([traces.interceptor, Retries(backoff=0.0)], call, final)
    assert (result.result(10) if kind == "submit" else result) == "result"
    assert traces.only().status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_inside_of_retries_there_is_one_for_each(traces, kind):
    script = Script(["connect", "not_started", "result"])
    final = script.submit if kind == "submit" else script.proceed
    call = call_info("add", kind)
    result = intercepted([Retries(backoff=0.0), traces.interceptor], call, final)
    assert (result.result(10) if kind == "submit" else result) == "result"
    codes = [span.attributes["rpc.response.status_code"] for span in traces.spans()]
    assert codes == ["UNAVAILABLE", "UNAVAILABLE", "OK"]
    last = trace.format_span_id(traces.spans()[-1].context.span_id)
    assert call.metadata["traceparent"].split("-")[2] == last


def test_many_threads(traces):
    def work(number):
        with traces.tracer.start_as_current_span(f"root-{number}"):
            for _ in range(50):
                call = call_info(f"add-{number}")
                intercepted([traces.interceptor], call, serve(traces, lambda _: None))

    in_threads(4, work)
    for number in range(4):
        root = traces[f"root-{number}"]
        clients = [s for s in traces.spans(SpanKind.CLIENT) if s.name == f"add-{number}"]
        assert len(clients) == 50
        assert all(is_child(span, root) for span in clients)
