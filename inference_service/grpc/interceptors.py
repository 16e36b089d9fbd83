"""Interceptors, which run before a service's methods."""

from typing import Any, NoReturn

import grpc
import grpc.aio

from shared.errors import Unauthenticated
from shared.service.bearer_token import require_bearer_token


class BearerTokenInterceptor(grpc.aio.ServerInterceptor):
    """Requires a bearer token for every call to one service; a call without it raises `Unauthenticated`.

    `service` is the full name. The interceptor that maps errors to status codes must come first.
    """

    def __init__(self, service: str, token: str) -> None:
        self._prefix = f"/{service}/"
        self._token = token

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler of the method, or one that raises `Unauthenticated`."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        try:
            require_bearer_token(dict(details.invocation_metadata or ()).get("authorization", ""), self._token)
        except Unauthenticated as error:
            return grpc.unary_unary_rpc_method_handler(_refusal(error))
        return handler


def _refusal(error: Unauthenticated) -> Any:
    async def refuse(message: bytes, context: Any) -> NoReturn:
        raise error

    return refuse
