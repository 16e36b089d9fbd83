"""The gRPC server that both services run: its limits, health, reflection, and an orderly end."""

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

from shared.errors import Unavailable
from shared.service.grpc_calls import Calls, Ended
from shared.service.listening import Address, ipv4_alone
from shared.service.settings import to_address

logger = logging.getLogger(__name__)

# So long a load balancer has to notice NOT_SERVING before new calls are refused.
_NOTICE_S = 0.2
# How long calls have to end once they are asked to, and then to send their status once they are cut.
_CUT_S = 1.0
# Files and connections that the process may have open, if the system allows it, and those kept for files.
_MOST_FILES, _KEPT_FILES = 65_536, 256
# How long connections have to close.
_GOODBYE_S = 0.2

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    # Calls that have arrived and wait for the event loop. gRPC's own limit of 1,000 ends others as CANCELLED, before
    # anything here can refuse them with a reason.
    ("grpc.server.max_pending_requests", 50_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    # Clients and proxies may ask every second whether the server is there, with or without calls. By default a client
    # that asks every 10 s loses its connection at the third time.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server asks whether a client is there once it has heard nothing of it for so long.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


def _ignore_end(method: str, code: grpc.StatusCode, reason: str | None) -> None:
    """For servers that do not count their calls."""


class GrpcServer:
    """An asyncio gRPC server. `services` are the full names that health and reflection report; `ended` is told of each
    of their calls that has ended.

    Every service, and the server as a whole (the name ""), is NOT_SERVING until `set_serving`.
    """

    def __init__(
        self,
        services: Sequence[str],
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        ended: Ended = _ignore_end,
    ) -> None:
        # gRPC logs a trace where a client leaves in the moment in which its call ends.
        logging.getLogger("grpc._cython.cygrpc").addFilter(_concerns_the_server)
        self._calls = Calls(services, ended)
        options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", _most_connections()))
        self.server = grpc.aio.server(interceptors=[self._calls, *interceptors], options=options)
        self._services = ("", *services)
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        named = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(named, self.server)

    async def start(self, address: Address) -> int:
        """Listens and answers from now on; the port, which the system chose if it was 0.

        Raises `AlreadyExists` if the port is in use and `InvalidArgument` if it or the host cannot be listened on.
        0.0.0.0 is every address of IPv4, `::` every address.
        """
        await self.set_serving(False)
        # gRPC would only say that binding failed, and would print its own trace of it.
        with ipv4_alone(address) as port:
            try:
                port = self.server.add_insecure_port(to_address(address.host, port))
            except RuntimeError as error:
                raise Unavailable(f"gRPC cannot listen on {to_address(address.host, port)}: {error}.") from None
        await self.server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What health answers for every service, to those who ask and those who watch."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)

    async def stop(self, drain_s: float, force: asyncio.Event, cut: Callable[[], None] | None = None) -> None:
        """Ends in order: NOT_SERVING, then every new call is UNAVAILABLE, and those that run have `drain_s` to end.

        Calls still running then are asked to end by `cut`, if it is given, and a second later they are ended as
        UNAVAILABLE. Calls whose requests have not arrived are not waited for. `force` skips the waiting.
        """
        await self._health.enter_graceful_shutdown()
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
        # A connection without calls hears of the end and closes.
        await self.server.stop(None if await self._calls.hold() else _GOODBYE_S)


class _Health(health.aio.HealthServicer):
    """Health whose watchers do not keep a server from ending: theirs would be the last calls to end."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    def end_watches(self) -> None:
        """Ends every watch, and those that come later at once."""
        self._ended.set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Tells of changes until the watches end."""
        watch = asyncio.create_task(super().Watch(request, context))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((watch, ended), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
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
        logger.info("%s: %s", name, "ending at once" if self.asked.is_set() else "ending; once more ends at once")
        (self.forced if self.asked.is_set() else self.asked).set()


def _concerns_the_server(record: logging.LogRecord) -> bool:
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ExecuteBatchError")


def _most_connections() -> int:
    """How many connections there may be so that files can still be opened; allows the process as many of both as it may
    have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft < wanted:
        # macOS says that there is no limit, and has one.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return max(soft - _KEPT_FILES, soft // 2)


async def _wait_for_all(calls: set[asyncio.Task[Any]]) -> None:
    if calls:
        await asyncio.wait(calls)
