"""OpenTelemetry's SDK for tests: spans that are kept to be looked at."""

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shmrpc.otel import OpenTelemetry


class Traces:
    """A tracer provider that keeps what has ended, and an interceptor that uses it."""

    def __init__(self, **options):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")
        self.interceptor = OpenTelemetry(self.provider)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.provider.shutdown()

    def __getitem__(self, name):
        found = [span for span in self.spans() if span.name == name]
        assert len(found) == 1, f"{len(found)} spans named {name!r}"
        return found[0]

    def spans(self, kind=None):
        return [s for s in self.exporter.get_finished_spans() if kind in {None, s.kind}]

    def only(self):
        (span,) = self.spans()
        return span


def current():
    return trace.get_current_span().get_span_context()


def is_child(child, parent):
    return (
        child.parent is not None
        and child.parent.span_id == parent.context.span_id
        and child.context.trace_id == parent.context.trace_id
    )
