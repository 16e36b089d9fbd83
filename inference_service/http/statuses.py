"""Counts the answers of the HTTP server by their status."""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Statuses:
    """Wraps an application; `answered` is called with the status of each answer when it begins."""

    def __init__(self, app: ASGIApp, answered: Callable[[int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a connection as ASGI asks."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
            await send(message)

        await self._app(scope, receive, watched)
