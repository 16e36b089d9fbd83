"""The request id of each HTTP request, the count of its answer, and the log line at its end."""

import logging
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.service.access_log import logged_call
from shared.service.log_ids import REQUEST_ID
from shared.text import excerpt


class AccessLog:
    """Wraps an application: each answer has the request id that its client gave, or a new one.

    `answered` is called with the status of each answer when it begins. The page asks for something every second, so the
    ends of requests that only read are of level DEBUG.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request as ASGI asks."""
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        level = logging.DEBUG if method in ("GET", "HEAD") else logging.INFO
        status = "no answer"
        with logged_call(f"{method} {excerpt(path)}", Headers(scope=scope).get(REQUEST_ID), level) as (
            request_id,
            log_end,
        ):

            async def named(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                    self._answered(message["status"])
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
                await send(message)

            try:
                await self._app(scope, receive, named)
            finally:
                log_end(status)
