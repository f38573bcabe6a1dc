"""Metrics of calls, in a registry of Prometheus' own client."""

import asyncio
import re
from concurrent.futures import Future

import prometheus_client
import pytest
from chains import Script, call_info, intercepted, intercepted_async
from conftest import in_threads
from prometheus_client import CollectorRegistry

import shmrpc
from shmrpc.prometheus import Prometheus
from shmrpc.retries import Retries


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        self.interceptor = Prometheus(self.registry)

    def value(self, name, method="add", kind="unary", side="client", **labels):
        labels = {"side": side, "method": method, "kind": kind, **labels}
        return self.registry.get_sample_value(f"shmrpc_{name}", labels) or 0

    def counts(self, code="OK", **labels):
        """Started, ended with this code, under way, timed."""
        return (
            self.value("calls_started_total", **labels),
            self.value("calls_handled_total", code=code, **labels),
            self.value("calls_in_flight", **labels),
            self.value("call_seconds_count", **labels),
        )


@pytest.fixture
def metrics():
    return Metrics()


def test_a_call_is_counted_and_timed(metrics):
    inside = []

    def final(_):
        inside.append(metrics.counts())

    intercepted([metrics.interceptor], call_info(), final)
    assert inside == [(1, 0, 1, 0)]
    assert metrics.counts() == (1, 1, 0, 1)
    assert 0 < metrics.value("call_seconds_sum") < 10
    intercepted([metrics.interceptor], call_info(), final)
    assert metrics.counts() == (2, 2, 0, 2)


def test_sides_kinds_and_methods_are_counted_apart(metrics):
    for labels in (
        {"side": "server"},
        {"kind": "notify"},
        {"method": "sub"},
        {"method": "sub", "side": "server", "kind": "stream"},
    ):
        call = call_info(**{"method": "add", "kind": "unary", "side": "client", **labels})
        intercepted([metrics.interceptor], call, lambda _: None)
        assert metrics.counts(**labels) == (1, 1, 0, 1)
    assert metrics.counts() == (0, 0, 0, 0)


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize(
    "error, code",
    [
        (shmrpc.ConnectionLost("gone"), "UNAVAILABLE"),
        (shmrpc.Abort("NOT_FOUND", "no order"), "NOT_FOUND"),
        (ZeroDivisionError(), "UNKNOWN"),
        (KeyboardInterrupt(), "CANCELLED"),
    ],
    ids=repr,
)
def test_errors_are_counted_by_code(metrics, side, error, code):
    def final(_):
        raise error

    with pytest.raises(type(error)):
        intercepted([metrics.interceptor], call_info(side=side), final)
    assert metrics.counts(code, side=side) == (1, 1, 0, 1)
    assert metrics.counts(side=side) == (1, 0, 0, 1)


def test_no_error_invents_a_label(metrics):
    """Codes are gRPC's: one more on the wire or in a handler makes no series of its own."""
    for number in range(5):
        error = shmrpc.RemoteError("?", code=f"CODE_{number}")
        future = Future()
        future.set_exception(error)
        intercepted([metrics.interceptor], call_info(kind="submit"), lambda _, f=future: f)
    assert metrics.counts("UNKNOWN", kind="submit") == (5, 5, 0, 5)
    assert b"CODE_" not in prometheus_client.generate_latest(metrics.registry)


def test_futures(metrics):
    future = Future()
    intercepted([metrics.interceptor], call_info(kind="submit"), lambda _: future)
    assert metrics.counts(kind="submit") == (1, 0, 1, 0)
    future.set_result(1)
    assert metrics.counts(kind="submit") == (1, 1, 0, 1)
    cancelled = Future()
    intercepted([metrics.interceptor], call_info(kind="submit"), lambda _: cancelled)
    cancelled.cancel()
    assert metrics.counts("CANCELLED", kind="submit") == (2, 1, 0, 2)


@pytest.mark.parametrize("side", ["client", "server"])
def test_streams_end_when_they_end(metrics, side):
    labels = {"kind": "stream", "side": side}
    call = call_info("add", **labels)
    stream = intercepted([metrics.interceptor], call, lambda _: (n for n in range(2)))
    next(stream)
    assert metrics.counts(**labels) == (1, 0, 1, 0)
    assert list(stream) == [1]
    assert metrics.counts(**labels) == (1, 1, 0, 1)
    call = call_info("add", **labels)
    stream = intercepted([metrics.interceptor], call, lambda _: (n for n in range(2)))
    next(stream)
    stream.close()
    assert metrics.counts("CANCELLED", **labels) == (2, 1, 0, 2)


@pytest.mark.parametrize("outside", [True, False])
def test_with_retries(metrics, outside):
    script = Script(["connect", "not_started", "result"])
    chain = [metrics.interceptor, Retries(backoff=0.0)]
    assert intercepted(chain if outside else chain[::-1], call_info(), script.proceed) == "result"
    assert metrics.counts() == ((1, 1, 0, 1) if outside else (3, 1, 0, 3))


def test_buckets_are_from_a_microsecond_to_ten_seconds(metrics):
    intercepted([metrics.interceptor], call_info(), lambda _: None)
    text = prometheus_client.generate_latest(metrics.registry).decode()
    bounds = [float(bound) for bound in re.findall(r'le="([^"]+)"', text)]
    assert bounds[:4] == [1e-6, 2e-6, 5e-6, 1e-5]
    assert bounds[-3:] == [5.0, 10.0, float("inf")]
    assert len(bounds) == 23


def test_those_who_share_a_registry_share_its_metrics(metrics):
    others = in_threads(4, lambda _: Prometheus(metrics.registry))
    for interceptor in [*others, metrics.interceptor]:
        intercepted([interceptor], call_info(), lambda _: None)
    assert metrics.counts() == (5, 5, 0, 5)
    apart = Metrics()
    intercepted([apart.interceptor], call_info(), lambda _: None)
    assert apart.counts() == (1, 1, 0, 1)


def test_the_global_registry_is_the_default():
    intercepted([Prometheus()], call_info("a.method.of.this.test"), lambda _: None)
    intercepted([Prometheus()], call_info("a.method.of.this.test"), lambda _: None)
    text = prometheus_client.generate_latest().decode()
    labels = 'code="OK",kind="unary",method="a.method.of.this.test",side="client"'
    assert f"shmrpc_calls_handled_total{{{labels}}} 2.0" in text


def test_many_threads(metrics):
    def work(number):
        for i in range(200):
            call = call_info(f"method-{i % 10}")
            intercepted([metrics.interceptor], call, lambda _: None)

    in_threads(4, work)
    for number in range(10):
        assert metrics.counts(method=f"method-{number}") == (80, 80, 0, 80)


def test_async_calls(metrics):
    async def main():
        async def succeed(_):
            await asyncio.sleep(0)
            return metrics.value("calls_in_flight")

        async def fail(_):
            raise shmrpc.DeadlineExceeded("late")

        calls = [intercepted_async([metrics.interceptor], call_info(), succeed) for _ in "abc"]
        assert await asyncio.gather(*calls) == [3, 2, 1]
        with pytest.raises(shmrpc.DeadlineExceeded):
            await intercepted_async([metrics.interceptor], call_info(), fail)

    asyncio.run(main())
    assert metrics.counts() == (4, 3, 0, 4)
    assert metrics.counts("DEADLINE_EXCEEDED") == (4, 1, 0, 4)
