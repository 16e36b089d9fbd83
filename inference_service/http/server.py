"""The HTTP server, on the event loop of the inference server."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from inference_service.http.access_log import AccessLog
from inference_service.http.connections import Connection, most_connections
from inference_service.http.errors import HttpError, error_response
from inference_service.http.failures import Failures
from inference_service.http.guards import Guards
from inference_service.http.listener import Listener
from inference_service.http.token_guard import TokenGuard
from shared.errors import GptloopError
from shared.service import traces
from shared.service.access.tls import ServerTls
from shared.service.access.tokens import Callers
from shared.service.listening import Address

logger = logging.getLogger(__name__)

# How long a connection without a request stays open.
_IDLE_S = 30
# Connections that wait to be accepted.
_BACKLOG = 128


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Answers the routes, behind the guards; `answered` is called with the status of each answer."""

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        hosts: Collection[str],
        origins: Collection[str],
        callers: Callers,
        answered: Callable[[int], None] = lambda _: None,
        tls: ServerTls | None = None,
    ) -> None:
        app = Starlette(
            routes=list(routes),
            middleware=[Middleware(Failures), Middleware(TokenGuard, callers)],
            exception_handlers={GptloopError: _answer_error, HTTPException: _answer_http_error},
        )
        self._config = uvicorn.Config(
            traces.wrap(AccessLog(Guards(app, hosts, origins), answered)),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=Connection,
            ws="none",
            backlog=_BACKLOG,
            timeout_keep_alive=_IDLE_S,
            ssl_context_factory=None if tls is None else lambda *_: tls.context(),
        )
        # Its own messages say nothing about a request.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._server = _Uvicorn(self._config)
        self._serving: asyncio.Task[None] | None = None

    def start(self, address: Address) -> int:
        """Starts to listen and returns the port; raises `AlreadyExists` or `InvalidArgument` if that fails."""
        # As many handshakes may be open as connections.
        listener = Listener(address.listener(), 2 * most_connections())
        port: int = listener.getsockname()[1]
        listener.setblocking(False)
        # Who reads the port in the log may connect before the task below has begun.
        listener.listen(self._config.backlog)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        return port

    async def stop(self, drain_s: float, force: asyncio.Event) -> None:
        """Accepts no more connections, and gives running requests `drain_s` to end; `force` skips the waiting."""
        if self._serving is None:
            return
        self._server.should_exit = True
        forced = asyncio.create_task(force.wait())
        await asyncio.wait((forced, self._serving), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()

    async def close(self) -> None:
        """Ends the connections that are left, whose requests have ended."""
        if self._serving is None:
            return
        self._server.force_exit = True
        await asyncio.wait((self._serving,), timeout=1.0)
        self._serving.cancel()


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GptloopError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "There is no page", 405: f"{request.method} is not a method of"}.get(error.status_code, "Error of")
    response = error_response(HttpError(error.status_code, f"{what} {request.url.path}."))
    # Such as the methods that a path has.
    response.headers.update(error.headers or {})
    return response
