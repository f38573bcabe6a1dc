"""Spans of calls, with OpenTelemetry's own SDK."""

import asyncio
import itertools
import threading
from concurrent.futures import Future

import pytest
from conftest import in_threads
from hypothesis import given
from hypothesis import strategies as st
from intercepted import (
    Script,
    call_info,
    finished,
    intercepted,
    intercepted_async,
    until_end,
)
from opentelemetry import baggage, context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import shmrpc
from shmrpc.otel import OpenTelemetry
from shmrpc.retries import Retries


class Traces:
    """A tracer provider that keeps what has ended, and an interceptor that uses it."""

    def __init__(self, **options):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")
        self.interceptor = OpenTelemetry(self.provider)

    def __getitem__(self, name):
        found = [span for span in self.spans() if span.name == name]
        assert len(found) == 1, f"{len(found)} spans named {name!r}"
        return found[0]

    def spans(self, kind=None):
        return [s for s in self.exporter.get_finished_spans() if kind in {None, s.kind}]

    def only(self):
        (span,) = self.spans()
        return span


@pytest.fixture
def traces():
    made = Traces()
    yield made
    made.provider.shutdown()


def current():
    return trace.get_current_span().get_span_context()


def is_child(child, parent):
    return (
        child.parent is not None
        and child.parent.span_id == parent.context.span_id
        and child.context.trace_id == parent.context.trace_id
    )


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
    traces = Traces()
    every = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
    interceptor = OpenTelemetry(traces.provider, every)
    call = call_info("add", side="server", metadata=metadata)
    assert intercepted([interceptor], call, lambda _: "result") == "result"
    assert traces.only().name == "add"
    traces.provider.shutdown()


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
    traces = Traces(sampler=ALWAYS_OFF)
    call = call_info("add")
    intercepted([traces.interceptor], call, lambda _: None)
    flags = int(call.metadata["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1
    assert not traces.spans()
    traces.provider.shutdown()


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


# ---- streams ----


def test_the_span_of_a_stream_ends_with_it(traces):
    call = call_info("count", "stream")
    stream = intercepted([traces.interceptor], call, lambda _: (n for n in range(3)))
    assert next(stream) == 0
    assert not traces.spans()
    assert not current().is_valid
    assert list(stream) == [1, 2]
    assert traces.only().attributes["rpc.response.status_code"] == "OK"


def test_closing_a_stream_cancels_it(traces):
    call = call_info("count", "stream")
    stream = intercepted([traces.interceptor], call, lambda _: (n for n in range(3)))
    next(stream)
    stream.close()
    assert traces.only().attributes["rpc.response.status_code"] == "CANCELLED"


def test_the_span_is_current_in_a_generators_body(traces):
    seen, closed = [], []

    def count(_):
        try:
            for number in range(3):
                seen.append(current())
                with traces.tracer.start_as_current_span(f"step-{number}"):
                    yield number
        finally:
            closed.append(current())

    call = call_info("count", "stream", "server")
    stream = intercepted([traces.interceptor], call, count)
    with traces.tracer.start_as_current_span("of the server's thread") as other:
        for _ in range(3):
            next(stream)
            assert trace.get_current_span() is other
        assert next(stream, None) is None
    span = traces["count"]
    assert [context.span_id for context in seen + closed] == [span.context.span_id] * 4
    for number in range(3):
        assert is_child(traces[f"step-{number}"], span)


def test_a_span_that_is_open_across_a_yield(traces):
    """It is current again when the body goes on, whoever ran meanwhile."""

    def body(_):
        with traces.tracer.start_as_current_span("open") as opened:
            yield 1
            assert trace.get_current_span() is opened
            with traces.tracer.start_as_current_span("inner"):
                yield 2

    call = call_info("count", "stream", "server")
    assert list(intercepted([traces.interceptor], call, body)) == [1, 2]
    assert is_child(traces["inner"], traces["open"])
    assert is_child(traces["open"], traces["count"])


def test_a_generator_may_run_in_several_threads(traces, caplog):
    def body(_):
        for number in range(4):
            with traces.tracer.start_as_current_span("step"):
                yield number

    stream = intercepted([traces.interceptor], call_info("count", "stream", "server"), body)
    results = []
    for _ in range(5):
        thread = threading.Thread(target=lambda: results.append(next(stream, "end")))
        thread.start()
        thread.join(10)
    assert results == [0, 1, 2, 3, "end"]
    assert all(is_child(s, traces["count"]) for s in traces.spans() if s.name == "step")
    assert not caplog.records


def test_closing_runs_the_body_in_its_context(traces):
    seen = []

    def body(_):
        try:
            yield 1
        finally:
            seen.append(current())

    stream = intercepted([traces.interceptor], call_info("count", "stream", "server"), body)
    next(stream)
    stream.close()
    assert seen[0].span_id == traces["count"].context.span_id


def test_a_generator_that_raises(traces):
    def body(_):
        yield 1
        raise ZeroDivisionError

    stream = intercepted([traces.interceptor], call_info("count", "stream", "server"), body)
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert traces.only().status.status_code is StatusCode.ERROR


def test_what_a_generator_returns_is_kept(traces):
    def body(_):
        yield 1
        return "the end"

    call = call_info("count", "stream", "server")
    stream = traces.interceptor.intercept(call, body)
    next(stream)
    with pytest.raises(StopIteration) as stopped:
        next(stream)
    assert stopped.value.value == "the end"
    assert list(until_end(stream, call)) == []


# ---- asyncio ----


def test_async_calls_at_the_same_time_do_not_mix(traces):
    async def handler(call):
        await asyncio.sleep(0.001 * (call.args[0] % 3))
        with traces.tracer.start_as_current_span(f"work-{call.args[0]}"):
            await asyncio.sleep(0)
        return call.args[0]

    async def final(call):
        served = call_info(call.method, "unary", "server", *call.args, metadata=dict(call.metadata))
        return await intercepted_async([traces.interceptor], served, handler)

    async def main():
        calls = [call_info(f"add-{n}", "unary", "client", n) for n in range(20)]
        return await asyncio.gather(
            *(intercepted_async([traces.interceptor], call, final) for call in calls)
        )

    assert asyncio.run(main()) == list(range(20))
    for number in range(20):
        server, client = (span for span in traces.spans() if span.name == f"add-{number}")
        assert is_child(server, client)
        assert is_child(traces[f"work-{number}"], server)


def test_async_generators(traces, caplog):
    async def body(_):
        with traces.tracer.start_as_current_span("open") as opened:
            yield 1
            await asyncio.sleep(0)
            assert trace.get_current_span() is opened
            yield 2

    async def main():
        async def handler(call):
            return body(call)

        call = call_info("count", "stream", "server")
        results = []
        with traces.tracer.start_as_current_span("other") as other:
            async for item in await intercepted_async([traces.interceptor], call, handler):
                assert trace.get_current_span() is other
                results.append(item)
        return results

    assert asyncio.run(main()) == [1, 2]
    assert is_child(traces["open"], traces["count"])
    assert not caplog.records


def test_async_generators_that_are_closed_or_raise(traces):
    seen = []

    async def body(_):
        try:
            yield 1
            raise ZeroDivisionError
        finally:
            seen.append(current())

    async def handler(call):
        return body(call)

    async def main():
        call = call_info("closed", "stream", "server")
        stream = await intercepted_async([traces.interceptor], call, handler)
        assert await stream.__anext__() == 1
        await stream.aclose()
        call = call_info("raises", "stream", "server")
        stream = await intercepted_async([traces.interceptor], call, handler)
        with pytest.raises(ZeroDivisionError):
            [item async for item in stream]

    asyncio.run(main())
    assert seen[0].span_id == traces["closed"].context.span_id
    assert seen[1].span_id == traces["raises"].context.span_id
    assert traces["closed"].attributes["rpc.response.status_code"] == "CANCELLED"
    assert traces["raises"].attributes["error.type"] == "ZeroDivisionError"


def test_async_errors_and_futures(traces):
    async def main():
        async def lose(_):
            raise shmrpc.ConnectionLost("gone")

        with pytest.raises(shmrpc.ConnectionLost):
            await intercepted_async([traces.interceptor], call_info("lost"), lose)

        future = asyncio.get_running_loop().create_future()

        async def submit(_):
            return future

        call = call_info("later", "submit")
        assert await traces.interceptor.intercept_async(call, submit) is future
        future.cancel()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert traces["lost"].attributes["rpc.response.status_code"] == "UNAVAILABLE"
    assert traces["later"].attributes["rpc.response.status_code"] == "CANCELLED"


def test_a_finished_future(traces):
    call = call_info("add", "submit")
    assert intercepted([traces.interceptor], call, lambda _: finished(3)).result() == 3
    assert traces.only().name == "add"
