"""Traces: spans of calls, jobs and versions, sent by OpenTelemetry if `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

Until `start` has found that variable, OpenTelemetry is not imported and every function here does nothing.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from shared.errors import FailedPrecondition, InvalidArgument, shown
from shared.service.settings import Environment, read_str
from shared.service.tracer import Attributes, Mark, Metadata, Tracer

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation")

# One for the process, as OpenTelemetry has it.
_tracer: Tracer | None = None


def are_wanted(environment: Environment) -> bool:
    """Whether the environment asks for spans.

    Raises `FailedPrecondition` if the packages are missing, and `InvalidArgument` if a setting asks for another
    protocol than gRPC.
    """
    if not read_str(environment, ENDPOINT, ""):
        return False
    protocol = read_str(environment, _PROTOCOL, "grpc")
    if protocol != "grpc":
        raise InvalidArgument(f"{_PROTOCOL} is {shown(protocol)}, but must be grpc.")
    if not _are_installed():
        raise FailedPrecondition(
            f"{ENDPOINT} is set, but OpenTelemetry is not installed: install it with `make .venv/traces`, or unset the "
            "variable."
        )
    return True


def start(service: str, environment: Environment = os.environ) -> None:
    """Sends the spans of this process from now on, if the environment asks for it.

    Raises what `are_wanted` raises.
    """
    global _tracer
    if not are_wanted(environment):
        return
    from shared.service.open_telemetry import OpenTelemetry

    _tracer = OpenTelemetry(service, environment)


def _are_installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in _PACKAGES)
    except ModuleNotFoundError:
        return False


def are_on() -> bool:
    """Whether spans are sent."""
    return _tracer is not None


@contextmanager
def span(name: str, attributes: Attributes | None = None) -> Iterator[Mark]:
    """Makes a block a span, inside the current one; an exception is its error."""
    if _tracer is None:
        yield lambda _: None
        return
    with _tracer.span(name, attributes or {}) as note:
        yield note


def add(name: str, begin_s: float, end_s: float, attributes: Attributes | None = None) -> None:
    """Adds a span that has ended, inside the current one; its times are of the monotonic clock."""
    if _tracer is not None:
        offset_ns = time.time_ns() - time.monotonic_ns()
        _tracer.add(name, round(begin_s * 1e9) + offset_ns, round(end_s * 1e9) + offset_ns, attributes or {})


@contextmanager
def call(path: str, metadata: Metadata) -> Iterator[Callable[[grpc.StatusCode], None]]:
    """Makes a gRPC call a span, inside that of the client if its metadata names one; yields what takes its status."""
    if _tracer is None:
        yield lambda _: None
        return
    with _tracer.call(path, metadata) as end:
        yield end


def mark(attributes: Attributes) -> None:
    """Adds attributes to the current span."""
    if _tracer is not None:
        _tracer.mark(attributes)


def ids() -> dict[str, str]:
    """Returns the ids of the current trace and span, for log lines."""
    return {} if _tracer is None else _tracer.ids()


def wrap(app: Any) -> Any:
    """Returns an ASGI application whose requests are spans."""
    return app if _tracer is None else _tracer.wrap(app)
