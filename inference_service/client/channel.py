"""What the clients of both services of a server do alike: what their channels need, and what they refuse to send."""

import contextlib
from collections.abc import Iterator

from shared.errors import InvalidArgument, shown

# A proxy for the web has no way to a server on this machine.
NO_PROXY = ("grpc.enable_http_proxy", 0)
# What an error adds if no server answers.
START_ADVICE = "start it with `gptloop up`"


@contextlib.contextmanager
def sendable() -> Iterator[None]:
    """Raises `InvalidArgument` on a value that no field of a message can hold, and on a field that there is not."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{shown(error.object)} cannot be sent: it is no Unicode text from character {error.start + 1} on."
        ) from None
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"A parameter cannot be sent: {str(error).rstrip('.')}.") from None
