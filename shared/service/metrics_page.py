"""The page with the metrics of a service, for Prometheus."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from shared.service.listening import Address


@contextmanager
def metrics_page(registry: CollectorRegistry, address: Address) -> Iterator[int]:
    """Serves `/metrics` inside the block, and yields the port, which the system chooses if it is 0.

    Raises `AlreadyExists` if the port is in use, and `InvalidArgument` if the host or the port cannot be used.
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
