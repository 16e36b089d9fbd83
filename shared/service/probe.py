"""Health for probes that speak no TLS, such as those of Kubernetes, on a port of their own."""

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shared.service.grpc_port import open_port
from shared.service.listening import Address

# The service whose health is SERVING while the process answers, also before a first version and while it stops.
LIVENESS = "liveness"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# Whoever probes needs few; the service needs the open files and the memory of others.
MAX_CONNECTIONS = 64
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_receive_message_length", 4096),
)


class Probe:
    """A gRPC server with health alone: `""` is whether the service is ready, `liveness` whether its process works."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, address: Address) -> int:
        """Starts to listen and returns the port; raises the errors of `open_port`."""
        await self.set_serving(False)
        await self._health.set(LIVENESS, _SERVING)
        port = open_port(self._server, address)
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """Sets whether the service is ready."""
        await self._health.set("", _SERVING if serving else _NOT_SERVING)

    async def stop(self) -> None:
        """Stops to answer."""
        await self._server.stop(None)
