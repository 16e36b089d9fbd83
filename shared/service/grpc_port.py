"""Opens the port of a gRPC server."""

import grpc
import grpc.aio

from shared.errors import Unavailable
from shared.service.listening import Address, ipv4_alone
from shared.service.settings import to_address


def open_port(server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials | None = None) -> int:
    """Lets a server listen, with TLS if there are credentials; returns the port, which the system chooses if it is 0.

    0.0.0.0 stands for every IPv4 address, `::` for every address. Raises `AlreadyExists` if the port is in use, and
    `InvalidArgument` if the server cannot listen on the host or the port.
    """
    # gRPC itself would only report that binding failed, and print a traceback.
    with ipv4_alone(address) as port:
        place = to_address(address.host, port)
        try:
            if credentials is None:
                return server.add_insecure_port(place)
            return server.add_secure_port(place, credentials)
        except RuntimeError as error:
            raise Unavailable(f"gRPC cannot listen on {place}: {error}.") from None
