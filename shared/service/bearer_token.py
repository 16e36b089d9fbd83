"""Bearer tokens: strings that the metadata of a gRPC call, or the headers of an HTTP request, carry."""

from shared.errors import InvalidArgument


def check_bearer_token(name: str, token: str) -> str:
    """Returns the token; raises `InvalidArgument`, which never quotes it, if gRPC metadata cannot carry it."""
    if token.isascii() and token.isprintable():
        return token
    raise InvalidArgument(f"{name} contains a character that metadata cannot carry; use printable ASCII on one line.")
