"""Spans of streams and under asyncio: what is current while a body runs, and while it does not."""

import asyncio
import threading

import pytest
from chains import call_info, intercepted, intercepted_async, until_end
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from tracing import Traces, current, is_child

import shmrpc


@pytest.fixture
def traces():
    with Traces() as kept:
        yield kept


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
