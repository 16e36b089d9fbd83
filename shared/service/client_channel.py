"""What the Python clients of both services share: a gRPC channel, and the check of what they send."""

import contextlib
from collections.abc import Iterator
from typing import Self

import grpc

from shared.errors import InvalidArgument, shown

# An HTTP proxy cannot reach a server on this machine.
NO_PROXY = ("grpc.enable_http_proxy", 0)


class Connection:
    """A gRPC channel to `host:port`. It connects with the first call; leaving a `with` block closes it."""

    def __init__(self, address: str, *options: tuple[str, int]) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=(NO_PROXY, *options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel and cancels every call on it."""
        self._channel.close()


@contextlib.contextmanager
def sendable() -> Iterator[None]:
    """Raises `InvalidArgument` if a value does not fit its field, or if the message has no such field."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{shown(error.object)} cannot be sent: it is not valid Unicode from character {error.start + 1} on."
        ) from None
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"A parameter cannot be sent: {str(error).rstrip('.')}.") from None
