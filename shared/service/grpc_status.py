"""Errors and gRPC status codes: one table, used in both directions."""

import re
from collections.abc import Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from shared import errors
from shared.service.connection_errors import connection_error
from shared.service.log_ids import REQUEST_ID

# The metadata key of a status's details (gRPC's richer error model).
_DETAILS_KEY = "grpc-status-details-bin"

# How gRPC describes what a server refuses as too large, and the limit.
_TOO_LARGE = {
    "message": re.compile(r"SERVER: Received message larger than max \(.* (\d+)\)"),
    "metadata": re.compile(r"received metadata size exceeds hard limit \(.*? vs\. (\d+)\)"),
}

# The details of a call whose own client closed the channel.
_CLOSED_HERE = "Channel closed!"

_CODES: dict[type[errors.GptloopError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CorruptCheckpoint: grpc.StatusCode.DATA_LOSS,
    # Last, so that its code maps back to `InvalidArgument`.
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
}


def code_of(error: errors.GptloopError) -> grpc.StatusCode:
    """Returns the status code of an error; INTERNAL for an error that a caller cannot fix."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), grpc.StatusCode.INTERNAL)


def details_of(error: errors.GptloopError) -> Sequence[tuple[str, bytes]]:
    """Returns the trailing metadata of an error: a google.rpc.RetryInfo if it says when to call again."""
    if not isinstance(error, errors.ResourceExhausted) or error.retry_after_s is None:
        return ()
    status = status_pb2.Status(code=code_of(error).value[0], message=str(error))
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
    status.details.add().Pack(info)
    return ((_DETAILS_KEY, status.SerializeToString()),)


def error_of(call: Any, address: str, start: str = "") -> errors.GptloopError:
    """Returns the error that the server raised, from a failed call; `start` is the command that starts the server.

    Its `request_id` is the one that the server's log lines have.
    """
    error = _error_of(call, address, start)
    error.request_id = next((value for key, value in call.trailing_metadata() or () if key == REQUEST_ID), "")
    return error


def _error_of(call: Any, address: str, start: str) -> errors.GptloopError:
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        for part, pattern in _TOO_LARGE.items():
            if limit := pattern.match(details):
                return errors.InvalidArgument(
                    f"The {part} of this call has more than {int(limit[1]):,} bytes, which is the limit of the server."
                )
        return errors.ResourceExhausted(details, _retry_after_s(call))
    if code is grpc.StatusCode.UNAVAILABLE and (error := connection_error(details, address, start)) is not None:
        return error
    if code is grpc.StatusCode.CANCELLED and details != _CLOSED_HERE:
        # gRPC cancels a call that arrives while its server stops.
        return errors.Unavailable(f"The server at {address} cancelled the call, probably because it stops; try again.")
    for kind, kind_code in _CODES.items():
        if kind_code is code:
            return kind(details)
    return errors.GptloopError(f"The server at {address} ended the call with {code.name}: {details}")


def _retry_after_s(call: Any) -> float | None:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return float(info.retry_delay.ToMilliseconds()) / 1000
    return None
