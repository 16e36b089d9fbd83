"""Traces: spans of calls, jobs and versions, sent by OpenTelemetry if `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

Until `start` has found that variable, OpenTelemetry is not imported and every function here does nothing.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import grpc

from shared.errors import FailedPrecondition
from shared.service.settings import Environment, read_str

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation")

Attributes = Mapping[str, str | bool | int | float | list[str]]
# Adds attributes to a span.
Mark = Callable[[Attributes], None]
Metadata = Iterable[tuple[str, str | bytes]]


class Tracer(Protocol):
    """What sends spans."""

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[Mark]:
        """See `span`."""

    def add(self, name: str, begin_ns: int, end_ns: int, attributes: Attributes) -> None:
        """Adds a span of the past, in nanoseconds since the epoch."""

    def call(self, path: str, metadata: Metadata) -> AbstractContextManager[Callable[[grpc.StatusCode], None]]:
        """See `call`."""

    def mark(self, attributes: Attributes) -> None:
        """See `mark`."""

    def ids(self) -> dict[str, str]:
        """See `ids`."""

    def wrap(self, app: Any) -> Any:
        """See `wrap`."""


# One for the process, as OpenTelemetry has it.
_tracer: Tracer | None = None


def start(service: str, environment: Environment = os.environ) -> None:
    """Sends the spans of this process from now on, if the environment asks for it.

    Raises `FailedPrecondition` if the packages are missing, and `InvalidArgument` if a setting asks for another
    protocol than gRPC.
    """
    global _tracer
    if not read_str(environment, ENDPOINT, ""):
        return
    if not _are_installed():
        raise FailedPrecondition(
            f"{ENDPOINT} is set, but OpenTelemetry is not installed: install it with `make .venv/traces`, or unset the "
            "variable."
        )
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
