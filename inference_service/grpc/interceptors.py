"""What stands before a service's methods."""

import hmac
from typing import Any, NoReturn

import grpc
import grpc.aio

from shared.errors import Unauthenticated


class CredentialInterceptor(grpc.aio.ServerInterceptor):
    """Lets only those call one service who bring its credential: for all others each call is `Unauthenticated`.

    `service` is its full name. What maps errors to codes must stand before it.
    """

    def __init__(self, service: str, credential: str) -> None:
        self._prefix = f"/{service}/"
        self._expected = f"Bearer {credential}".encode()

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """The method itself, or one that refuses."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return handler
        return grpc.unary_unary_rpc_method_handler(_refuse_wrong if given else _refuse_absent)


async def _refuse_absent(message: bytes, context: Any) -> NoReturn:
    raise Unauthenticated(_sentence("none"))


async def _refuse_wrong(message: bytes, context: Any) -> NoReturn:
    raise Unauthenticated(_sentence("another one"))


def _sentence(brought: str) -> str:
    return (
        f"This call needs the credential of the server's operators, but brings {brought}: set GPTLOOP_ADMIN_TOKEN to "
        'the one that the server has, or send it as the metadata "authorization: Bearer <credential>".'
    )
