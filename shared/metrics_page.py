"""The page from which Prometheus reads a service's metrics."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from shared.grpc_server import cannot_listen, port_in_use


@contextmanager
def metrics_page(registry: CollectorRegistry, host: str, port: int, port_variable: str) -> Iterator[int]:
    """Serves `/metrics` meanwhile; the port, which the system chose where it was 0.

    Raises `AlreadyExists` where the port is in use and `InvalidArgument` where the host cannot be listened on; both
    name the environment variable that sets the port.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port, port_variable) from None
        raise cannot_listen(host, port, port_variable, error) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
