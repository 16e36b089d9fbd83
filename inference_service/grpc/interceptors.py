"""Interceptors, which run before a service's methods."""

import hmac
from typing import Any, NoReturn

import grpc
import grpc.aio

from shared.errors import Unauthenticated


class BearerTokenInterceptor(grpc.aio.ServerInterceptor):
    """Requires a bearer token for every call to one service; a call without it raises `Unauthenticated`.

    `service` is the full name. The interceptor that maps errors to status codes must come first.
    """

    def __init__(self, service: str, token: str) -> None:
        self._prefix = f"/{service}/"
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler of the method, or one that raises `Unauthenticated`."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return handler
        return grpc.unary_unary_rpc_method_handler(_refuse_wrong if given else _refuse_missing)


async def _refuse_missing(message: bytes, context: Any) -> NoReturn:
    raise Unauthenticated(_sentence("no bearer token"))


async def _refuse_wrong(message: bytes, context: Any) -> NoReturn:
    raise Unauthenticated(_sentence("the wrong bearer token"))


def _sentence(found: str) -> str:
    return (
        f"This call has {found}: set GPTLOOP_ADMIN_TOKEN to the server's value, or send the metadata "
        '"authorization: Bearer <token>".'
    )
