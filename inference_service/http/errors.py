"""Errors in OpenAI's shape, with the HTTP status of each kind."""

import math

import grpc
from starlette.responses import JSONResponse

from shared.errors import GptloopError, ResourceExhausted
from shared.service.grpc_status import code_of

# The status, and OpenAI's type of the error.
_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.ALREADY_EXISTS: (409, "invalid_request_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "server_error"),
}
# OpenAI's codes, by which its clients know these errors.
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
# When to try again if an error does not say it.
_RETRY_AFTER_S = 1.0


class HttpError(GptloopError):
    """An error that only HTTP knows, with its status."""

    def __init__(self, status: int, sentence: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.param = param
        self.code = code


def error_response(error: GptloopError) -> JSONResponse:
    """Returns the response for an error; 429 and 503 say when to try again."""
    status, _ = _status(error)
    headers = {}
    if status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, ResourceExhausted) else None
        headers["Retry-After"] = str(math.ceil(_RETRY_AFTER_S if wait_s is None else wait_s))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


def error_body(error: GptloopError) -> dict[str, object]:
    """Returns the JSON value for an error."""
    status, kind = _status(error)
    param, code = (error.param, error.code) if isinstance(error, HttpError) else (None, None)
    if status in _CODES:
        code = _CODES[status]
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def code_name(error: GptloopError) -> str:
    """Returns the name of the status code that gRPC would end a call with."""
    if not isinstance(error, HttpError):
        return code_of(error).name
    if error.status >= 500:
        return grpc.StatusCode.INTERNAL.name
    return (grpc.StatusCode.NOT_FOUND if error.status == 404 else grpc.StatusCode.INVALID_ARGUMENT).name


def _status(error: GptloopError) -> tuple[int, str]:
    if isinstance(error, HttpError):
        return error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    return _STATUSES.get(code_of(error), (500, "server_error"))
