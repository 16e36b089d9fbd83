"""The address that a service listens on, the errors if it cannot, and free ports."""

import errno
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from shared.errors import AlreadyExists, GptloopError, InvalidArgument, Unavailable, shown

# Only an administrator may listen on ports below this one.
_FIRST_FREE_PORT = 1024
_EVERY_IPV4 = "0.0.0.0"
# Below Linux's ephemeral ports, which begin at 32768: a connection could take one of those before it is used.
_CHOSEN_PORTS = (20_000, 32_000)


@dataclass(frozen=True)
class Address:
    """A host and a port, 0 to let the system choose one, with the environment variables that set them."""

    host: str
    port: int
    host_variable: str
    port_variable: str

    def listener(self) -> socket.socket:
        """Returns a socket that is bound to the address but does not listen yet.

        Raises `AlreadyExists` if the port is in use, and `InvalidArgument` if the host or the port cannot be used.
        """
        try:
            places = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise self.refusal(error) from None
        # localhost has two addresses, or one on a machine without IPv6. The port must be free on each.
        listeners, failures = [], []
        for family, kind, protocol, _, place in places:
            try:
                listeners.append(_bound(family, kind, protocol, place))
            except OSError as error:
                failures.append(error)
        in_use = [error for error in failures if error.errno == errno.EADDRINUSE]
        kept = listeners[:1] if not in_use else []
        for listener in listeners[len(kept) :]:
            listener.close()
        if not kept:
            raise self.refusal((in_use or failures)[0])
        return kept[0]

    def refusal(self, error: Exception) -> GptloopError:
        """Returns the error for a failure to listen; it names the variable to set."""
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EADDRINUSE:
            return AlreadyExists(
                f"Port {self.port} of {self.host} is in use; stop the program that listens there, or set "
                f"{self.port_variable} to another port."
            )
        if number == errno.EACCES and self.port < _FIRST_FREE_PORT:
            return InvalidArgument(
                f"{self.port_variable} is {self.port}, on which only an administrator may listen; set it to "
                f"{_FIRST_FREE_PORT} or more."
            )
        return InvalidArgument(
            f"{self.host_variable} is {shown(self.host)}, which is not an address of this machine; use 127.0.0.1 for "
            f"this machine only, or {_EVERY_IPV4} for every network that it is in."
        )


def _bound(family: int, kind: int, protocol: int, place: Any) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        # A port that was closed a moment ago can be used again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError:
        listener.close()
        raise
    return listener


@contextmanager
def ipv4_alone(address: Address) -> Iterator[int]:
    """Keeps gRPC from also listening on IPv6 if the host is 0.0.0.0, and yields the port to use.

    gRPC listens on IPv6 for 0.0.0.0 too, unless that port of IPv6 is taken. So this takes it while gRPC binds.
    """
    with address.listener() as listener:
        host, port = listener.getsockname()[:2]
    if host != _EVERY_IPV4:
        yield address.port
        return
    with socket.socket(socket.AF_INET6) as other:
        # Without IPv6, or if another program has that port, nothing needs to be taken.
        with suppress(OSError):
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            other.bind(("::", port))
        yield port


def free_port_numbers(count: int) -> range:
    """Returns consecutive ports that are free on the loopback address now; raises `Unavailable` if it finds none."""
    low, high = _CHOSEN_PORTS
    for _ in range(100):
        first = random.randrange(low, high - count)
        with suppress(OSError):
            ports = range(first, first + count)
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return ports
    raise Unavailable(f"No {count} consecutive free ports were found between {low} and {high}.")
