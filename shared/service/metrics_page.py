"""The page from which Prometheus reads a service's metrics."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from shared.service.listening import Address


@contextmanager
def metrics_page(registry: CollectorRegistry, address: Address) -> Iterator[int]:
    """Serves `/metrics` meanwhile; the port, which the system chose if it was 0.

    Raises `AlreadyExists` if the port is in use and `InvalidArgument` if it or the host cannot be listened on.
    """
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except (OSError, UnicodeError) as error:
        raise address.refusal(error) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
