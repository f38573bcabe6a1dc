"""Traces of calls for OpenTelemetry, across processes: ``pip install 'shmrpc[otel]'``.

Attributes follow the semantic conventions for RPC spans.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.propagators.textmap import Getter
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    msg = "shmrpc.otel needs OpenTelemetry's API: pip install 'shmrpc[otel]'"
    raise ImportError(msg) from error

from . import address as addresses
from .errors import ConnectError, Error
from .interceptors import status_of, when_done

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping

    from opentelemetry.context import Context
    from opentelemetry.propagators.textmap import TextMapPropagator

    from .interceptors import CallInfo
    from .metadata import Metadata

__all__ = ["OpenTelemetry"]

# With these the server has failed; with the others it has answered.
_SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
_DESCRIPTION_MAX = 200


class OpenTelemetry:
    """Interceptor for clients and servers that makes a span of every call.

    A client's span travels in the call's metadata, so that the server's is its child. The
    server's span is current while the handler runs, in the body of a generator too. A span ends
    when its call does: that of a stream at the stream's end. To see when that of a future does,
    the client reads in the background.

    ``tracer_provider`` is the global one by default. ``propagator`` is W3C trace context by
    default, ``traceparent`` and ``tracestate``; metadata has little room for baggage.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        propagator: TextMapPropagator | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("shmrpc", tracer_provider=tracer_provider)
        self._propagator = TraceContextTextMapPropagator() if propagator is None else propagator

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        """See ``Interceptor``."""
        span, inside = self._start(call)
        token = contexts.attach(inside)
        try:
            result = proceed(call)
            if call.side == "server" and inspect.isgenerator(result):
                result = _run_in(contextvars.copy_context(), result)
        except BaseException as error:
            _end(span, call, error)
            raise
        finally:
            contexts.detach(token)
        when_done(call, result, functools.partial(_end, span, call))
        return result

    async def intercept_async(
        self, call: CallInfo, proceed: Callable[[CallInfo], Awaitable[Any]]
    ) -> Any:
        """See ``AsyncInterceptor``."""
        span, inside = self._start(call)
        token = contexts.attach(inside)
        try:
            result = await proceed(call)
            if call.side == "server" and inspect.isasyncgen(result):
                result = _run_in_async(inside, result)
        except BaseException as error:
            _end(span, call, error)
            raise
        finally:
            contexts.detach(token)
        when_done(call, result, functools.partial(_end, span, call))
        return result

    def _start(self, call: CallInfo) -> tuple[trace.Span, Context]:
        """The call's span, and the context that it is current in."""
        attributes: dict[str, Any] = {"rpc.system.name": "shmrpc", "rpc.method": call.method}
        if call.side == "server":
            parent = self._propagator.extract(call.metadata, getter=_GETTER)
            span = self._tracer.start_span(
                call.method, parent, trace.SpanKind.SERVER, attributes=attributes
            )
            return span, trace.set_span_in_context(span, parent)
        attributes.update(_server_attributes(call.peer))
        span = self._tracer.start_span(
            call.method, kind=trace.SpanKind.CLIENT, attributes=attributes
        )
        inside = trace.set_span_in_context(span)
        self._propagator.inject(call.metadata, inside)
        return span, inside


def _end(span: trace.Span, call: CallInfo, error: BaseException | None) -> None:
    code = status_of(error)
    span.set_attribute("rpc.response.status_code", code)
    if error is not None and (call.side == "client" or code in _SERVER_FAULTS):
        named = isinstance(error, Error) or code != "UNKNOWN"
        span.set_attribute("error.type", code if named else type(error).__qualname__)
        span.set_status(trace.StatusCode.ERROR, _describe(error))
        with contextlib.suppress(Exception):  # whatever the handler raised: some have no text
            span.record_exception(error)
    span.end()


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    # Of a remote error, without the traceback: the event has it.
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"[:_DESCRIPTION_MAX]


@functools.lru_cache(maxsize=64)
def _server_attributes(peer: str) -> Mapping[str, str | int]:
    try:
        address = addresses.parse(peer.partition(" ")[0])
    except ConnectError:
        return {}
    if address.transport == "tcp":
        return {"server.address": address.host, "server.port": address.port}
    return {"server.address": address.name or address.path}


class _MetadataGetter(Getter["Metadata"]):
    """Reads text from metadata, which may be bytes: a peer sends what it likes."""

    def get(self, carrier: Metadata, key: str) -> list[str] | None:
        value = carrier.get(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Metadata) -> list[str]:
        return [key for key, value in carrier.items() if isinstance(value, str)]


_GETTER = _MetadataGetter()


def _run_in(
    inside: contextvars.Context, generator: Generator[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """Run the body of a generator in a context of its own, from whatever thread."""
    try:
        while True:
            try:
                value = inside.run(next, generator)
            except StopIteration as end:
                return end.value
            yield value
    finally:
        inside.run(generator.close)


async def _run_in_async(
    inside: Context, generator: AsyncGenerator[Any, Any]
) -> AsyncGenerator[Any, Any]:
    """As ``_run_in``: the current context is the body's while the body runs."""
    current = inside
    try:
        while True:
            token = contexts.attach(current)
            try:
                value = await generator.__anext__()
            except StopAsyncIteration:
                return
            finally:
                current = contexts.get_current()  # with the spans that are open in the body
                contexts.detach(token)
            yield value
    finally:
        token = contexts.attach(current)
        try:
            await generator.aclose()
        finally:
            contexts.detach(token)
