"""The gRPC server of both services: limits, health, reflection, and a graceful stop."""

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.errors import InvalidArgument, ResourceExhausted
from shared.service.access.tls import ServerTls
from shared.service.grpc_calls import Calls, Ended
from shared.service.grpc_port import open_port
from shared.service.listening import Address
from shared.service.probe import Probe
from shared.service.settings import to_address

logger = logging.getLogger(__name__)

# How long a load balancer has to notice NOT_SERVING before new calls are rejected.
_NOTICE_S = 0.2
# How long calls have to end once `cut` asks them to, and then to send their status once they are cancelled.
_CUT_S = 1.0
# Open files and connections of the process, if the system allows this many, and how many of them are kept for HTTP, the
# metrics, the probes and files.
_MAX_FILES, _KEPT_FILES = 65_536, 2_560
# How long clients have to close their connections.
_GOODBYE_S = 0.2

# The largest request, and the most bytes of metadata that a call may have.
MAX_MESSAGE_BYTES = 4 << 20
MAX_METADATA_BYTES = 16 << 10
# Health needs no token, and a watch takes 28 KiB until its client ends it, and the name that it asks for.
MAX_WATCHES = 1024
_MAX_NAME_LETTERS = 256

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # By default, gRPC refuses calls between the two at random.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Calls that wait for the event loop. By default gRPC ends all beyond 1,000 as CANCELLED, without a reason.
    ("grpc.server.max_pending_requests", 50_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    # How long a TLS handshake may take; by default two minutes.
    ("grpc.server_handshake_timeout_ms", 30_000),
    # Clients and proxies may ping the server every second, with or without calls. By default, a client that pings every
    # 10 s loses its connection at the third ping.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server pings a client after this time without any message from it.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients that balance look for new servers when a connection ends. Its calls run to their end before.
    ("grpc.max_connection_age_ms", 300_000),
)


class GrpcServer:
    """An asyncio gRPC server.

    Health and reflection report `services` (full names); `ended` is called when one of their calls has ended. The
    health of every service, and of the server as a whole (the name ""), is NOT_SERVING until `set_serving`.
    """

    def __init__(
        self, services: Sequence[str], ended: Ended, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
    ) -> None:
        # gRPC logs a traceback if a client leaves while its call ends.
        logging.getLogger("grpc._cython.cygrpc").addFilter(_concerns_the_server)
        self._calls = Calls(services, ended)
        options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", _most_connections()))
        self.server = grpc.aio.server(interceptors=[self._calls, *interceptors], options=options)
        self._services = ("", *services)
        self._health = _Health()
        self._probe: Probe | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        named = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(named, self.server)

    async def start(self, address: Address, tls: ServerTls | None = None, probe: Address | None = None) -> int:
        """Starts to listen and returns the port; raises the errors of `open_port`.

        With `probe`, health also answers there without TLS.
        """
        await self.set_serving(False)
        if probe is not None:
            starting = Probe()
            answers_on = to_address(probe.host, await starting.start(probe))
            logger.info("health without TLS on %s", answers_on)
            self._probe = starting
        port = open_port(self.server, address, tls.grpc_credentials() if tls else None)
        await self.server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of every service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)
        if self._probe is not None:
            await self._probe.set_serving(serving)

    async def stop(self, drain_s: float, force: asyncio.Event, cut: Callable[[], None] | None = None) -> None:
        """Stops in steps: sets NOT_SERVING, rejects new calls as UNAVAILABLE, and gives running calls `drain_s` to end.

        Then calls `cut`, if given, to ask the remaining calls to end, and a second later ends them as UNAVAILABLE. Does
        not wait for calls whose requests have not arrived. `force` skips the waiting.
        """
        await self._health.enter_graceful_shutdown()
        if self._probe is not None:
            await self._probe.set_serving(False)
        forced = asyncio.create_task(force.wait())
        await asyncio.wait((forced,), timeout=_NOTICE_S)
        self._health.end_watches()
        ending = asyncio.create_task(_wait_for_all(self._calls.refuse()))
        await asyncio.wait((forced, ending), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if cut is not None and not ending.done():
            cut()
            await asyncio.wait((ending,), timeout=_CUT_S)
        if not ending.done():
            self._calls.cut()
            await asyncio.wait((ending,), timeout=_CUT_S)
        ending.cancel()
        forced.cancel()
        # Clients without calls close their connections when they receive GOAWAY.
        await self.server.stop(None if await self._calls.hold() else _GOODBYE_S)
        if self._probe is not None:
            await self._probe.stop()


class _Health(health.aio.HealthServicer):
    """Health whose watchers do not keep a server from stopping, and are at most `MAX_WATCHES`."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()
        self._watches = 0

    def end_watches(self) -> None:
        """Ends every watch, and every later one at once."""
        self._ended.set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Sends changes until the watches end."""
        if len(request.service) > _MAX_NAME_LETTERS:
            raise InvalidArgument(
                f"service has {len(request.service)} letters; the name of a service has at most {_MAX_NAME_LETTERS}."
            )
        if self._watches >= MAX_WATCHES:
            raise ResourceExhausted(
                f"{MAX_WATCHES} clients watch the health of this server already, which is the limit; use Check instead."
            )
        self._watches += 1
        watch = asyncio.create_task(super().Watch(request, context))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((watch, ended), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
            self._watches -= 1
            watch.cancel()
            ended.cancel()


class Signals:
    """SIGTERM and SIGINT as events of the running loop: the first sets `asked`, any later one `forced`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive, signal.Signals(number).name)

    def _receive(self, name: str) -> None:
        logger.info("%s: %s", name, "stopping now" if self.asked.is_set() else "stopping; send it again to stop now")
        (self.forced if self.asked.is_set() else self.asked).set()


def _concerns_the_server(record: logging.LogRecord) -> bool:
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ExecuteBatchError")


def _most_connections() -> int:
    """Raises the limit on open files as far as possible, and returns how many connections leave room for files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft < wanted:
        # macOS reports no limit although it has one.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return max(soft - _KEPT_FILES, soft // 2)


async def _wait_for_all(calls: set[asyncio.Task[Any]]) -> None:
    if calls:
        await asyncio.wait(calls)
