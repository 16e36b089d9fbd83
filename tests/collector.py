"""A collector of traces: a real gRPC server with OpenTelemetry's service, which keeps the spans that it receives."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from tests.waiting import wait_until


@dataclass(frozen=True)
class Span:
    name: str
    service: str
    trace: str
    id: str
    parent: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    fails: bool


class Collector:
    """Spans in the order of their arrival."""

    def __init__(self) -> None:
        # Not installed with the rest.
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

        self.spans: list[Span] = []
        collector = self

        class Service(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc, unused-ignore]
            def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
                collector.spans += _spans(request)
                return trace_service_pb2.ExportTraceServiceResponse()

        self._server = grpc.server(futures.ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a process that sends its spans here, soon after their end."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}", "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def named(self, name: str, **attributes: object) -> Span:
        """Waits for a span with a name and some attributes, whose dots are underscores here."""

        def found() -> list[Span]:
            return [
                span
                for span in self.spans.copy()
                if span.name == name
                and all(span.attributes.get(key.replace("__", ".")) == value for key, value in attributes.items())
            ]

        wait_until(lambda: bool(found()))
        return found()[0]

    def tree(self, root: Span) -> dict[str, Any]:
        """Returns the names of the spans below one, in the order of their beginnings, each with those below it."""
        below = sorted((span for span in self.spans if span.parent == root.id), key=lambda span: span.begin_ns)
        return {span.name: self.tree(span) for span in below}


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.stop()


def _spans(request: Any) -> Iterator[Span]:
    for resource in request.resource_spans:
        service = _values(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    service=service,
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    begin_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes=_values(span.attributes),
                    fails=span.status.code == 2,
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)
