"""Connections of the HTTP server: limits on what a client may take without asking for anything."""

import asyncio
import resource
import socket
import struct

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from inference_service.http.errors import HttpError, error_response

# How long a whole request may take to arrive.
ARRIVAL_S = 30.0
# How long a connection takes new requests; a client's certificate is checked only when it connects.
MAX_AGE_S = 300.0
MAX_HEAD_BYTES = 64 << 10
# The most open connections, and how many of the files that the process may open there must be for each of them: gRPC
# and files need the others.
MAX_CONNECTIONS = 1024
_FILES_EACH = 8


class Connection(HttpToolsProtocol):
    """A connection that is closed if it is one too many, or if its request is late, has a long head, or comes early.

    A request is early while another one of the connection runs: uvicorn would not read on, and so not notice that the
    client leaves. The state of each request has the `transport`, so that its answer can abort it. An old connection
    ends with its next answer.
    """

    _ages_at_s: float
    _late: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    # Whether a request ended in what was read last, so that its bytes are not those of a head.
    _has_ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        if len(self.connections) > most_connections():
            transport.abort()
            return
        self._ages_at_s = self.loop.time() + MAX_AGE_S
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends what waits for the connection."""
        self._stop_waiting()
        # After a reset, uvicorn would keep the connection until its idle time is over.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on, through the head of a request in pieces that its limit allows."""
        while data and not self.transport.is_closing():
            size = MAX_HEAD_BYTES + 1 - self._head_bytes if self._in_head else len(data)
            piece, data = data[:size], data[size:]
            self._has_ended = False
            super().data_received(piece)
            if self._in_head and not self._has_ended:
                self._head_bytes += len(piece)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._refuse(HttpError(431, f"The headers have more than {MAX_HEAD_BYTES:,} bytes."))

    def on_message_begin(self) -> None:
        """Begins a request."""
        super().on_message_begin()
        self._await_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header; those after the body have no use."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts to answer the request, unless another one runs."""
        self._in_head = False
        if self._is_answering():
            self.transport.abort()
        else:
            super().on_headers_complete()
            if self.cycle is not None and self.loop.time() >= self._ages_at_s:
                self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Ends a request."""
        super().on_message_complete()
        self._in_head, self._head_bytes, self._has_ended = True, 0, True
        self._stop_waiting()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(ARRIVAL_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, error: HttpError) -> None:
        if not self._is_answering() and not self.transport.is_closing():
            response = error_response(error)
            headers = [b"%s: %s\r\n" % each for each in [*response.raw_headers, (b"connection", b"close")]]
            self.transport.write(b"".join([STATUS_LINE[error.status], *headers, b"\r\n", bytes(response.body)]))
        self.transport.close()


def abort(transport: asyncio.Transport) -> None:
    """Ends a connection without what is still unread; closing alone would leave that to the system, for minutes."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def most_connections() -> int:
    """Returns how many connections may be open at once."""
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _FILES_EACH)
