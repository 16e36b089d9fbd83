"""Errors and gRPC status codes: one table, read both ways."""

import grpc

from shared import errors

_CODES: dict[type[errors.GptloopError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CorruptCheckpoint: grpc.StatusCode.DATA_LOSS,
    # Last, so that its code reads back as `InvalidArgument`.
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
}


def code_of(error: errors.GptloopError) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for one that no caller can mend."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def error_of(call: grpc.RpcError, address: str) -> errors.GptloopError:
    """What a failed call to a server says, as the error that the server raised."""
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and _has_no_server(details):
        return errors.Unavailable(f"No server answers at {address}: start it with make up.")
    for kind, kind_code in _CODES.items():
        if kind_code is code:
            return kind(details)
    return errors.GptloopError(f"The server at {address} ended the call with {code.name}: {details}")


def _has_no_server(details: str) -> bool:
    """Whether a sentence comes from gRPC itself, which found nobody to talk to, and not from a server."""
    return details.startswith(
        ("failed to connect", "Socket closed", "DNS resolution failed", "connections to all backends")
    )
