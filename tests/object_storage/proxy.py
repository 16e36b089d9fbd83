"""A proxy before an S3 server, which fails requests in the ways in which networks and stores fail.

It passes on bytes and headers as they are, the header `Host` too, so that the signature of a request stays valid.
"""

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

# Headers of one connection, which the other connection has of its own.
_OWN = {"connection", "keep-alive", "transfer-encoding", "content-length"}
# A slow answer takes 20 s a piece, so that only a limit of the reader ends it.
_PIECES, _PIECE_S = 16, 20.0


class Fault(Enum):
    """What happens to a request instead of its answer."""

    SILENCE = auto()  # it is read, not carried out, and never answered
    RESET = auto()  # the connection is reset before it is carried out
    ERROR_500 = auto()  # it is not carried out
    ERROR_503 = auto()
    CONFLICT_409 = auto()
    PRECONDITION_412 = auto()
    DONE_THEN_SILENCE = auto()  # it is carried out, and the answer never comes
    DONE_THEN_RESET = auto()  # it is carried out, and the connection is reset
    DONE_THEN_500 = auto()  # it is carried out, and the answer says that it failed
    SLOW_BODY = auto()  # the head of the answer comes at once, its body in pieces with long pauses
    TORN_BODY = auto()  # half of the body comes, then the connection closes
    ALTERED_BODY = auto()  # one bit of the body is another one


_STATUS = {
    Fault.ERROR_500: (500, "InternalError"),
    Fault.ERROR_503: (503, "SlowDown"),
    Fault.CONFLICT_409: (409, "ConditionalRequestConflict"),
    Fault.PRECONDITION_412: (412, "PreconditionFailed"),
    Fault.DONE_THEN_500: (500, "InternalError"),
}
_BODIES = {Fault.SLOW_BODY, Fault.TORN_BODY, Fault.ALTERED_BODY}
_CARRIED_OUT = {None, Fault.DONE_THEN_SILENCE, Fault.DONE_THEN_RESET, Fault.DONE_THEN_500, *_BODIES}


@dataclass(frozen=True)
class Request:
    """A request as it arrived.

    path: the bucket and the key, decoded; query: as it was sent.
    conditional: whether it is a write that depends on what is there.
    """

    method: str
    path: str
    query: str
    conditional: bool

    def writes(self, part: str = "") -> bool:
        """Returns whether it writes an object with this part in its key."""
        return self.method == "PUT" and part in self.path

    def reads(self, part: str = "") -> bool:
        """Returns whether it reads an object with this part in its key."""
        return self.method == "GET" and part in self.path and not self.lists

    @property
    def lists(self) -> bool:
        """Whether it lists objects."""
        return self.method == "GET" and "list-type" in self.query

    @property
    def deletes(self) -> bool:
        """Whether it removes objects."""
        return self.method == "DELETE" or (self.method == "POST" and self.query.startswith("delete"))


@dataclass(frozen=True)
class _Answer:
    """What the server answered, with its whole body."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Rule:
    """A fault for the next requests that match.

    left: how many more, None for all.
    hits: how many it has met.
    """

    fault: Fault
    matches: Callable[[Request], bool]
    left: int | None
    hits: int = 0


class FaultyProxy:
    """Listens on a port of this machine until `end`, before the server on the port `target`.

    `requests` are all that came, in their order. Each connection has a thread; the lock guards rules and requests.
    """

    def __init__(self, target: int) -> None:
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self._server = _Server(target, self._fault_of)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="proxy")
        self._thread.start()

    def inject(self, fault: Fault, matches: Callable[[Request], bool] = lambda _: True, times: int | None = 1) -> Rule:
        """Lets the next `times` requests that match fail, all of them if it is None, and returns the rule."""
        rule = Rule(fault, matches, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Removes all rules and forgets the requests."""
        with self._lock:
            self._rules.clear()
            self.requests = []

    def end(self) -> None:
        """Stops, and ends all connections."""
        self._server.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.left != 0 and rule.matches(request):
                    rule.left = None if rule.left is None else rule.left - 1
                    rule.hits += 1
                    return rule.fault
        return None


class _Server(ThreadingHTTPServer):
    """Listens for a proxy."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, target: int, fault_of: Callable[[Request], Fault | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.target = target
        self.fault_of = fault_of
        self.ended = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that leave and a server that is down, which is what tests are about."""


class _Exchange(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        conditional = "If-None-Match" in self.headers or "If-Match" in self.headers
        fault = self.server.fault_of(Request(self.command, unquote(path), query, self.command == "PUT" and conditional))
        answer = self._pass_on(body) if fault in _CARRIED_OUT else None
        if answer is not None and (fault is None or fault in _BODIES):
            self._answer(answer, fault)
        elif fault is not None:
            self._fail(fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _exchange  # noqa: N815

    def _pass_on(self, body: bytes) -> _Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return _Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()

    def _answer(self, answer: _Answer, fault: Fault | None) -> None:
        body = answer.body
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in _OWN:
                self.send_header(name, value)
        if answer.status != http.HTTPStatus.NO_CONTENT:
            length = dict(answer.headers).get("Content-Length", "0") if self.command == "HEAD" else len(body)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        match fault:
            case Fault.TORN_BODY:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            case Fault.ALTERED_BODY if body:
                middle = len(body) // 2
                self.wfile.write(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])
            case Fault.SLOW_BODY:
                size = 1 + len(body) // _PIECES
                for start in range(0, len(body), size):
                    self.wfile.write(body[start : start + size])
                    self.server.ended.wait(_PIECE_S)
            case _:
                self.wfile.write(body)

    def _fail(self, fault: Fault) -> None:
        self.close_connection = True
        if fault in _STATUS:
            status, code = _STATUS[fault]
            body = f"<Error><Code>{code}</Code><Message>a fault of the tests</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        elif fault in (Fault.RESET, Fault.DONE_THEN_RESET):
            # Closing without lingering resets the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.server.ended.wait()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Writes no log."""
