"""The page with the metrics of a service, for Prometheus."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from shared.service.listening import Address

# Each connection takes a thread and an open file, which the service needs for its own work.
MAX_CONNECTIONS = 16
# How long a scraper may send nothing, or read nothing.
SILENCE_S = 10.0


@contextmanager
def metrics_page(registry: CollectorRegistry, address: Address) -> Iterator[int]:
    """Serves `/metrics` inside the block, and yields the port, which the system chooses if it is 0.

    Raises `AlreadyExists` if the port is in use, and `InvalidArgument` if the host or the port cannot be used.
    """
    try:
        server = _Server(address)
    except (OSError, UnicodeError) as error:
        raise address.refusal(error) from None
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection; those beyond the limit are closed."""

    daemon_threads = True

    def __init__(self, address: Address) -> None:
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = place[0]
        super().__init__((str(place[4][0]), address.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a connection in a thread of its own."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # No thread can start, so that none leaves the room; the caller closes the connection.
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a scraper that leaves or is silent."""


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Logs no requests."""
