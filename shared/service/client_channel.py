"""What the Python clients of both services share: a gRPC channel, and the check of what they send."""

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import grpc
import grpc.aio

from shared.errors import InvalidArgument, Unavailable, shown
from shared.service.access.credentials import PLAIN, Credentials
from shared.service.settings import to_address

# An HTTP proxy cannot reach a server on this machine.
NO_PROXY = ("grpc.enable_http_proxy", 0)

_DNS = "dns:///"
# Takes servers in turn, without those whose health is not SERVING.
_BALANCED = json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}})

Option = tuple[str, int | str]


@dataclass(frozen=True)
class Target:
    """What gRPC connects to, and the options for it."""

    name: str
    options: tuple[Option, ...] = ()


def read_target(address: str, credentials: Credentials = PLAIN) -> Target:
    """Returns the target for an address: `host:port`, several with commas between them, or `dns:///name:port`.

    Calls to several servers, or to all that a name stands for, take turns among those that are ready. Names in a list
    are looked up here, once.

    Raises `InvalidArgument` for an address that cannot be used, and `Unavailable` if a name in a list is unknown.
    """
    named = () if credentials.server_name is None else (("grpc.ssl_target_name_override", credentials.server_name),)
    if "," not in address:
        balanced = (("grpc.service_config", _BALANCED),) if address.startswith(_DNS) else ()
        return Target(address, (*named, *balanced))
    if credentials.ca is not None and not named:
        raise InvalidArgument(
            f"{shown(address)} names several servers; by TLS they need a name that is in each of their certificates: "
            "set server_name (GPTLOOP_TLS_SERVER_NAME)."
        )
    places = [_look_up(each.strip()) for each in address.split(",")]
    family = places[0][0]
    if any(each != family for each, _ in places):
        raise InvalidArgument(f"{shown(address)} mixes addresses of IPv4 and IPv6; use one of the two.")
    scheme = "ipv6" if family is socket.AF_INET6 else "ipv4"
    return Target(
        f"{scheme}:{','.join(place for _, place in places)}",
        # Without it, servers would be asked for by the whole list.
        (*(named or (("grpc.default_authority", address.split(",")[0].strip()),)), ("grpc.service_config", _BALANCED)),
    )


def _look_up(address: str) -> tuple[socket.AddressFamily, str]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16):
        raise InvalidArgument(f"{shown(address)} is not an address of a server, such as 127.0.0.1:50051.")
    try:
        places = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unavailable(f"There is no host {shown(host)}.") from None
    # localhost has two addresses, and servers listen on the first of them.
    family, *_, place = min(places, key=lambda each: each[0] is not socket.AF_INET)
    return family, to_address(str(place[0]), int(port))


def open_channel(address: str, credentials: Credentials = PLAIN, options: tuple[Option, ...] = ()) -> grpc.Channel:
    """Opens a channel, which connects with the first call; raises as `Connection`."""
    channel: grpc.Channel = _open(grpc, address, credentials, options)
    return channel


def open_aio_channel(
    address: str, credentials: Credentials = PLAIN, options: tuple[Option, ...] = ()
) -> grpc.aio.Channel:
    """Opens a channel of the running event loop; raises as `Connection`."""
    channel: grpc.aio.Channel = _open(grpc.aio, address, credentials, options)
    return channel


def _open(module: Any, address: str, credentials: Credentials, options: tuple[Option, ...]) -> Any:
    target = read_target(address, credentials)
    options = (NO_PROXY, *target.options, *options)
    channel_credentials = credentials.to_channel_credentials()
    if channel_credentials is None:
        return module.insecure_channel(target.name, options=options)
    return module.secure_channel(target.name, channel_credentials, options=options)


class Connection:
    """A gRPC channel to the servers at an address. It connects with the first call; leaving a `with` block closes it.

    Raises `InvalidArgument` if the address or the credentials cannot be used, and `Unavailable` if one of several hosts
    is unknown.
    """

    def __init__(self, address: str, credentials: Credentials = PLAIN, *options: Option) -> None:
        self._address = address
        self._metadata = credentials.to_metadata()
        self._channel = open_channel(address, credentials, options)

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
