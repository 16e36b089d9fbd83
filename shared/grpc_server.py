"""The gRPC server that both services run: health, reflection, one mapping of errors, and an orderly end."""

import asyncio
import errno
import inspect
import logging
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.errors import AlreadyExists, GptloopError, InvalidArgument
from shared.grpc_status import code_of, details_of
from shared.settings import to_address

logger = logging.getLogger(__name__)

# So long a load balancer has to notice NOT_SERVING before new calls are refused.
_NOTICE_S = 0.2
# Between the moment the calls are asked to end and the moment they are cut.
_CUT_S = 1.0

Handler = Callable[[Any, Any], Any]


class GrpcServer:
    """An asyncio gRPC server. `services` are the full names that health and reflection report.

    Every service, and the server as a whole (the name ""), is NOT_SERVING until `set_serving`.
    """

    def __init__(self, services: Sequence[str], interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        # gRPC logs a trace where a client leaves in the moment in which its call ends.
        logging.getLogger("grpc._cython.cygrpc").addFilter(_concerns_the_server)
        interceptors = [_ErrorInterceptor(), *interceptors]
        self.server = grpc.aio.server(interceptors=interceptors, options=[("grpc.so_reuseport", 0)])
        self._services = ("", *services)
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        named = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(named, self.server)

    async def start(self, host: str, port: int, port_variable: str) -> int:
        """Listens and answers from now on; the port, which the system chose where it was 0.

        Raises `AlreadyExists` where the port is in use and `InvalidArgument` where the host cannot be listened on; both
        name the environment variable that sets the port.
        """
        await self.set_serving(False)
        # gRPC would only say that binding failed, and would print its own trace of it.
        _check_address(host, port, port_variable)
        try:
            port = self.server.add_insecure_port(to_address(host, port))
        except RuntimeError as error:
            raise InvalidArgument(f"{to_address(host, port)} cannot be listened on: {error}.") from None
        await self.server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What health answers for every service, to those who ask and those who watch."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)

    async def stop(self, drain_s: float, cut: Callable[[], None], force: asyncio.Event) -> None:
        """Ends in order: NOT_SERVING, no new calls, then `drain_s` for the calls that run.

        Calls still running then are asked to end by `cut`, and are cancelled a second later. `force` skips the waiting.
        """
        await self._health.enter_graceful_shutdown()
        forced = asyncio.create_task(force.wait())
        await asyncio.wait((forced,), timeout=_NOTICE_S)
        self._health.end_watches()
        stopping = asyncio.create_task(self.server.stop(drain_s + _CUT_S))
        await asyncio.wait((forced, stopping), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            cut()
            await asyncio.wait((stopping,), timeout=_CUT_S)
            await self.server.stop(None)
        await stopping
        forced.cancel()


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


def port_in_use(host: str, port: int, port_variable: str) -> AlreadyExists:
    """The error of a service whose port another program has."""
    return AlreadyExists(
        f"Port {port} of {host} is in use: stop what listens there, or set {port_variable} to another port."
    )


def cannot_listen(host: str, port: int, port_variable: str, error: OSError) -> InvalidArgument:
    """The error of a service whose address is not one of this machine."""
    return InvalidArgument(
        f"{to_address(host, port)} cannot be listened on ({port_variable} sets the port): {error.strerror}."
    )


def _concerns_the_server(record: logging.LogRecord) -> bool:
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ExecuteBatchError")


def _check_address(host: str, port: int, port_variable: str) -> None:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port, port_variable) from None
        raise cannot_listen(host, port, port_variable, error) from None


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls whose handler raised with the code and the sentence of the error."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            wrap = _wrap_generator if inspect.isasyncgenfunction(handler.unary_stream) else _wrap_coroutine
            return handler._replace(unary_stream=wrap(handler.unary_stream, details.method))
        return handler._replace(unary_unary=_wrap_coroutine(handler.unary_unary, details.method))


def _wrap_coroutine(handler: Handler, method: str) -> Handler:
    async def wrapped(request: object, context: Any) -> object:
        try:
            return await handler(request, context)
        except Exception as error:
            await _abort(context, method, error)
            return None

    return wrapped


def _wrap_generator(handler: Handler, method: str) -> Handler:
    async def wrapped(request: object, context: Any) -> AsyncIterator[object]:
        try:
            async for response in handler(request, context):
                yield response
        except Exception as error:
            await _abort(context, method, error)

    return wrapped


async def _abort(context: Any, method: str, error: Exception) -> None:
    # The latter is a client that left in the very moment in which a message was written.
    if isinstance(error, grpc.aio.AbortError | grpc.aio.InternalError):
        raise error
    if isinstance(error, GptloopError):
        await context.abort(code_of(error), str(error), details_of(error))
    request_id = uuid.uuid4().hex
    logger.error("%s failed, request %s", method, request_id, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, f"The server failed on this request; its log says why, under {request_id}."
    )
