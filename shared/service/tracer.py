"""What sends spans, and what spans are made of."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import grpc

Attributes = Mapping[str, str | bool | int | float | list[str]]
# Adds attributes to a span.
Mark = Callable[[Attributes], None]
Metadata = Iterable[tuple[str, str | bytes]]


class Tracer(Protocol):
    """What sends spans. Each method does what the function of `traces` with its name says."""

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[Mark]:
        """Makes a block a span."""

    def add(self, name: str, begin_ns: int, end_ns: int, attributes: Attributes) -> None:
        """Adds a span of the past, in nanoseconds since the epoch."""

    def call(self, path: str, metadata: Metadata) -> AbstractContextManager[Callable[[grpc.StatusCode], None]]:
        """Makes a gRPC call a span."""

    def mark(self, attributes: Attributes) -> None:
        """Adds attributes to the current span."""

    def ids(self) -> dict[str, str]:
        """Returns the ids of the current trace and span."""

    def wrap(self, app: Any) -> Any:
        """Returns an ASGI application whose requests are spans."""
