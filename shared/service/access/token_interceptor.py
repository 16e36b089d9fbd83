"""Lets only callers with the right token reach the methods of a gRPC server."""

from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc
import grpc.aio

from shared.errors import FailedPrecondition, GptloopError, PermissionDenied, Unauthenticated
from shared.service.access.tokens import Caller, Callers
from shared.service.log_ids import keep

# Of the call that this task answers.
_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Requires a client's or an operator's token for some services, and an operator's for others (full names).

    All other services, such as health and reflection, stay open. The log lines of a call say who calls. `Calls`, which
    maps errors to status codes, must come first.
    """

    def __init__(self, callers: Callers, clients: Collection[str], operators: Collection[str]) -> None:
        self._required: dict[str, Callable[[str | bytes], Caller | None]] = {
            **dict.fromkeys(clients, callers.client),
            **dict.fromkeys(operators, callers.operator),
        }
        # The handler of each sentence, of which there are a few; `Calls` keeps what it makes of a handler.
        self._refusals: dict[str, Any] = {}

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler of the method, or one that raises the refusal without reading the request."""
        handler = await continuation(details)
        required = self._required.get(details.method.removeprefix("/").partition("/")[0])
        if handler is None or required is None:
            return handler
        try:
            caller = required(_authorization(details.invocation_metadata))
        except (Unauthenticated, PermissionDenied, FailedPrecondition) as error:
            return self._refusals.setdefault(str(error), _refusal(type(error), str(error)))
        _caller.set(caller)
        if caller is not None:
            keep(caller=caller.name)
        return handler


def current_caller() -> Caller | None:
    """Returns who makes the call that this task answers; None if it needs no token."""
    return _caller.get()


def _authorization(metadata: Any) -> str | bytes:
    """Returns the value of `authorization`, empty if there is none or more than one."""
    values = [value for key, value in metadata or () if key == "authorization"]
    return values[0] if len(values) == 1 else ""


def _refusal(kind: type[GptloopError], sentence: str) -> Any:
    async def refuse(message: bytes, context: Any) -> NoReturn:
        raise kind(sentence)

    return grpc.unary_unary_rpc_method_handler(refuse)
