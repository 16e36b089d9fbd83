"""Bearer tokens: strings that the metadata of a gRPC call, or the headers of an HTTP request, carry."""

import hmac

from shared.errors import InvalidArgument, Unauthenticated


def check_bearer_token(name: str, token: str) -> str:
    """Returns the token; raises `InvalidArgument`, which never quotes it, if gRPC metadata cannot carry it."""
    if token.isascii() and token.isprintable():
        return token
    raise InvalidArgument(f"{name} contains a character that metadata cannot carry; use printable ASCII on one line.")


def require_bearer_token(given: str | bytes, token: str) -> None:
    """Raises `Unauthenticated` unless `given`, the value of `authorization`, carries the token.

    The time that it takes says nothing about the token.
    """
    if hmac.compare_digest(given.encode() if isinstance(given, str) else given, f"Bearer {token}".encode()):
        return
    found = "the wrong bearer token" if given else "no bearer token"
    raise Unauthenticated(
        f"This call has {found}: set GPTLOOP_ADMIN_TOKEN to the server's value, or send the metadata "
        '"authorization: Bearer <token>".'
    )
