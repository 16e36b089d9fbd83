"""Guards of every request: which names of the server are accepted, and which other sites may call it."""

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_service.http.errors import HttpError, error_response
from shared.errors import shown
from shared.service.log_ids import REQUEST_ID

_METHODS = "GET, POST"
# A star stands for every header but authorization; clients send headers of their own, such as x-stainless-os.
_HEADERS = "*, authorization, content-type"
# The browser may run and show nothing from elsewhere, and no other site may frame the page.
_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class Guards:
    """Wraps an application.

    A request must name the server by an address, `localhost`, or one of `hosts`: a site whose name was made to point
    here (DNS rebinding) names itself. Only pages of this server and of `origins` may read answers.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a connection as ASGI asks."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and origin in self._origins

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    answer[name] = value
                answer.add_vary_header("Origin")
                if allowed:
                    answer["access-control-allow-origin"] = str(origin)
                    answer["access-control-expose-headers"] = REQUEST_ID
            await send(message)

        host = headers.get("host", "")
        if not self._is_known(host):
            error = HttpError(
                421,
                f"This server is not known as {shown(host)}; GPTLOOP_INFERENCE_HTTP_HOSTS lists the names that clients "
                "may use.",
            )
            await error_response(error)(scope, receive, guarded)
            return
        if origin is not None and not allowed and not _is_same(origin, host):
            error = HttpError(
                403,
                f"Pages of {shown(origin)} may not call this server; GPTLOOP_INFERENCE_HTTP_ORIGINS lists those that "
                "may.",
            )
            await error_response(error)(scope, receive, guarded)
            return
        if scope["method"] == "OPTIONS" and allowed:
            await _answer_preflight(guarded)
            return
        await self._app(scope, receive, guarded)

    def _is_known(self, host: str) -> bool:
        name = _name_of(host)
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


async def _answer_preflight(send: Send) -> None:
    allow = {"access-control-allow-methods": _METHODS, "access-control-allow-headers": _HEADERS}
    headers = [(name.encode(), value.encode()) for name, value in allow.items()]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _name_of(host: str) -> str:
    """Returns the name or address in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_same(origin: str, host: str) -> bool:
    return origin.partition("://")[2].lower() == host.lower()
