"""Explains why a client could not connect, or lost its connection."""

from shared.errors import FailedPrecondition, GptloopError, Unavailable

# What the details of a failed call contain, and what that means.
_REASONS = (
    (
        "certificate has expired",
        "The certificate of the server at {} has expired; replace it, or correct the clock of this machine.",
    ),
    (
        "certificate is not yet valid",
        "The certificate of the server at {} is not valid yet; correct the clock of this machine.",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "The certificate of the server at {} is not signed by an authority that this client trusts; set GPTLOOP_TLS_CA "
        "to the file with the server's authority.",
    ),
    (
        "Hostname Verification Check failed",
        "The certificate of the server at {} is for another name; use that name in the address, or set "
        "GPTLOOP_TLS_SERVER_NAME to it.",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "The server at {} does not use TLS; unset GPTLOOP_TLS_CA, or set GPTLOOP_TLS_CERT and GPTLOOP_TLS_KEY for the "
        "server.",
    ),
)
# How details begin if each of several servers has failed; the rest is about one of them.
_ALL_FAILED = "connections to all backends"
# A server that refuses a handshake gives its client no reason.
_NOT_CONNECTED = ("failed to connect", _ALL_FAILED)
_CLOSED = "Socket closed"
# How details begin if the server of a call has ended.
_LOST = (_CLOSED, "Cancelling all calls", "GOAWAY received")
_NOT_READY = "backend unhealthy"
_UNKNOWN_NAME = ("errors resolving", "DNS resolution failed")


def connection_error(details: str, address: str, start: str = "") -> GptloopError | None:
    """Returns the error for a call that got no connection or lost it, or None if it failed otherwise.

    details: those of the call, whose status is UNAVAILABLE.
    start: the command that starts the server.
    """
    if details.startswith(_UNKNOWN_NAME):
        return Unavailable(f"No server is known by the name {address}.")
    if details.startswith(_NOT_CONNECTED) and (error := _explained(details, address)) is not None:
        return error
    if details.startswith((*_NOT_CONNECTED, *_LOST)):
        return Unavailable(f"No server answers at {address}{start and f': start it with `{start}`'}.")
    return None


def _explained(details: str, address: str) -> GptloopError | None:
    for part, sentence in _REASONS:
        if part in details:
            # Of several servers, others may only be down for a moment.
            kind = Unavailable if details.startswith(_ALL_FAILED) else FailedPrecondition
            return kind(sentence.format(address))
    if _NOT_READY in details:
        return Unavailable(f"No server at {address} is ready: they have no version to serve yet, or are shutting down.")
    if _CLOSED in details:
        # It may also have ended at this moment, so that another attempt makes sense.
        return Unavailable(
            f"The server at {address} closed the connection before any call: it may use TLS (set GPTLOOP_TLS_CA), or "
            "accept only certain clients (set GPTLOOP_TLS_CLIENT_CERT and GPTLOOP_TLS_CLIENT_KEY)."
        )
    return None
