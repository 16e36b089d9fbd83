"""Answers requests that fail by a mistake of the server, or because it ends."""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_service.generation import ClientLeft
from inference_service.http.errors import HttpError, error_response
from shared.errors import GptloopError, Unavailable
from shared.service.log_ids import current_ids

logger = logging.getLogger(__name__)

_STOPPING = Unavailable("The server is stopping; try again in a moment.")


def failure(scope: Scope) -> HttpError:
    """Logs the exception that is being handled with its request; returns the error that the client gets."""
    logger.exception("%s %s failed", scope["method"], scope["path"])
    return HttpError(500, f"The server failed on this request; see its log for {current_ids()['request_id']}.")


class Failures:
    """Wraps an application: each request gets an answer, unless its client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request as ASGI asks."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        error: GptloopError
        try:
            await self._app(scope, receive, watched)
            return
        except ClientLeft:
            return
        except asyncio.CancelledError:
            # The process ends.
            if started:
                raise
            error = _STOPPING
        except Exception:
            if started:
                raise
            error = failure(scope)
        await error_response(error)(scope, receive, send)
