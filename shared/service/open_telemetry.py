"""Sends spans by OpenTelemetry. Imported only if traces are asked for; its packages are an installation of their own.

The kept instrumentation covers HTTP and Redis. That of gRPC's asyncio server expects methods that yield their
responses, and fails on those that write them, so the spans of gRPC calls are made here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, Status, StatusCode

from shared.service.settings import Environment, read_str
from shared.service.tracer import Attributes, Mark, Metadata

# A process waits this long at its end, twice at most, for a collector that does not answer.
_EXPORT_S = 2
# Codes that are a mistake of the server, after the conventions for RPC.
_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class OpenTelemetry:
    """The tracer of this process. OpenTelemetry reads its other settings, `OTEL_…`, itself."""

    def __init__(self, service: str, environment: Environment) -> None:
        named = {} if read_str(environment, "OTEL_SERVICE_NAME", "") else {"service.name": f"gptloop-{service}"}
        resource = Resource.create(named)
        processor = BatchSpanProcessor(OTLPSpanExporter(timeout=_EXPORT_S))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("gptloop")
        # Processes ask Redis all the time; only what a call or a job asks for is worth a span.
        of_others = TracerProvider(resource=resource, sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
        of_others.add_span_processor(processor)
        RedisInstrumentor().instrument(tracer_provider=of_others)

    @contextmanager
    def span(self, name: str, attributes: Attributes) -> Iterator[Mark]:
        """See `traces.span`."""
        with self._tracer.start_as_current_span(name, attributes=attributes) as span:
            yield span.set_attributes

    def add(self, name: str, begin_ns: int, end_ns: int, attributes: Attributes) -> None:
        """See `Tracer.add`."""
        self._tracer.start_span(name, attributes=attributes, start_time=begin_ns).end(end_ns)

    @contextmanager
    def call(self, path: str, metadata: Metadata) -> Iterator[Callable[[grpc.StatusCode], None]]:
        """See `traces.call`."""
        service, _, method = path.removeprefix("/").partition("/")
        parent = propagate.extract({name: value for name, value in metadata if isinstance(value, str)})
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        with self._tracer.start_as_current_span(
            path.removeprefix("/"),
            *(parent, SpanKind.SERVER, attributes),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:

            def end(code: grpc.StatusCode) -> None:
                span.set_attribute("rpc.grpc.status_code", code.value[0])
                if code in _FAULTS:
                    span.set_status(Status(StatusCode.ERROR, code.name))

            yield end

    def mark(self, attributes: Attributes) -> None:
        """See `traces.mark`."""
        trace.get_current_span().set_attributes(attributes)

    def ids(self) -> dict[str, str]:
        """See `traces.ids`."""
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return {}
        return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}

    def wrap(self, app: Any) -> Any:
        """See `traces.wrap`."""
        # A stream would have a span for each of its messages.
        return OpenTelemetryMiddleware(app, tracer_provider=self._provider, exclude_spans=["receive", "send"])
