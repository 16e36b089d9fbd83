"""Lets only requests with the right token reach the API; the files of the page stay open."""

from starlette.types import ASGIApp, Receive, Scope, Send

from inference_service.http.errors import error_response
from shared.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from shared.service.access.tokens import Caller, Callers
from shared.service.log_ids import note

# The files of the page, and whether it must ask for a token.
_OPEN = ("/", "/api/server")
_OPEN_FOLDER = "/web/"
# What gRPC has for operators: this list, and all changes.
_API, _VERSIONS = "/api/", "/api/versions"
_READS = ("GET", "HEAD")


class TokenGuard:
    """Wraps an application: the state of each request has its `caller`, None if it needs no token.

    The log lines of a request say who calls.
    """

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request as ASGI asks."""
        try:
            caller = scope["state"]["caller"] = self._caller(scope)
        except (Unauthenticated, PermissionDenied, FailedPrecondition) as error:
            await error_response(error)(scope, receive, send)
            return
        if caller is not None:
            note(caller=caller.name)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        path = scope["path"]
        if path in _OPEN or path.startswith(_OPEN_FOLDER):
            return None
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        authorization = values[0] if len(values) == 1 else b""
        if path.startswith(_API) and (scope["method"] not in _READS or path.startswith(_VERSIONS)):
            return self._callers.operator(authorization)
        return self._callers.client(authorization)
