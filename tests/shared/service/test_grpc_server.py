"""The server of both services, tested with the servicer of health."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shared import errors
from shared.service import grpc_server
from shared.service.grpc_server import GrpcServer
from shared.service.grpc_status import code_of, error_of
from shared.service.listening import Address
from tests.asynchronous import async_test
from tests.shared.http2_client import PingingClient

SERVICE = "inference.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_every_error_has_a_code_that_maps_back() -> None:
    for kind in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.AlreadyExists,
        errors.FailedPrecondition,
        errors.ResourceExhausted,
        errors.CorruptCheckpoint,
        errors.Unauthenticated,
        errors.PermissionDenied,
    ):
        call = FakeError(code_of(kind("x")), "a sentence")
        assert type(error_of(call, "host:1")) is kind
        assert str(error_of(call, "host:1")) == "a sentence"
    unreachable = FakeError(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")
    assert str(error_of(unreachable, "host:1")) == "No server answers at host:1."
    assert str(error_of(unreachable, "host:1", "up")) == "No server answers at host:1: start it with `up`."
    assert code_of(errors.DataError("x")) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(errors.GptloopError("x")) is grpc.StatusCode.INTERNAL


# The types of the stubs do not cover their methods.


def health_stub(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def reflection_stub(channel: Any) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(channel)


class FakeError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Raising(health_pb2_grpc.HealthServicer):
    """`Check` raises `error`; `Watch` sends one message and raises it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def Check(self, request: object, context: object) -> NoReturn:  # noqa: N802
        raise self.error

    async def Watch(self, request: object, context: object) -> AsyncIterator[health_pb2.HealthCheckResponse]:  # noqa: N802
        yield health_pb2.HealthCheckResponse(status=SERVING)
        raise self.error


class Hanging(health_pb2_grpc.HealthServicer):
    """`Check` answers once `ended` is set."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.ended = asyncio.Event()

    async def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:  # noqa: N802
        self.entered.set()
        await self.ended.wait()
        return health_pb2.HealthCheckResponse(status=SERVING)


def here(host: str = "127.0.0.1", port: int = 0) -> Address:
    return Address(host, port, "THE_HOST", "THE_PORT")


def is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@asynccontextmanager
async def serving(
    servicer: health_pb2_grpc.HealthServicer | None = None,
) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    """Yields a server and a channel to it; `servicer` answers calls of health if it is given."""
    server = GrpcServer([SERVICE], lambda *_: None)
    if servicer is not None:
        # The last registered servicer answers.
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server.server)
    port = await server.start(here())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, channel
    await server.stop(0.0, asyncio.Event())


async def status(channel: grpc.aio.Channel, service: str = "") -> int:
    answer = await health_stub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


@async_test
async def test_health_is_not_serving_until_it_is_set() -> None:
    async with serving() as (server, channel):
        assert [await status(channel, name) for name in ("", SERVICE)] == [NOT_SERVING] * 2
        await server.set_serving(True)
        assert [await status(channel, name) for name in ("", SERVICE)] == [SERVING] * 2


@async_test
async def test_reflection_lists_the_services() -> None:
    async with serving() as (_, channel):
        call = reflection_stub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = {one.name async for answer in call for one in answer.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("There is no version 9."), grpc.StatusCode.NOT_FOUND),
        (errors.GptloopError("It diverged."), grpc.StatusCode.INTERNAL),
    ],
)
@async_test
async def test_an_error_ends_the_call_with_its_code_and_message(error: Exception, code: grpc.StatusCode) -> None:
    async with serving(Raising(error)) as (_, channel):
        stub = health_stub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Check(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError) as streaming:
            async for _ in stub.Watch(health_pb2.HealthCheckRequest()):
                pass
        for raised in (unary.value, streaming.value):
            assert (raised.code(), raised.details()) == (code, str(error))


@async_test
async def test_an_unexpected_error_shows_an_id_and_no_details(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Raising(ValueError("secret"))) as (_, channel):
        stub = health_stub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Check(health_pb2.HealthCheckRequest())
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        details = raised.value.details() or ""
        assert "secret" not in details
        (record,) = caplog.records
        assert details.split()[-1].rstrip(".") == vars(record)["ids"]["request_id"]
        assert record.exc_info is not None


@async_test
async def test_a_stop_waits_for_running_calls() -> None:
    servicer = Hanging()
    async with serving(servicer) as (server, channel):
        call = health_stub(channel).Check(health_pb2.HealthCheckRequest())
        await servicer.entered.wait()
        stop = asyncio.create_task(server.stop(20.0, asyncio.Event()))
        await until_refused(channel)
        servicer.ended.set()
        assert (await call).status == SERVING
        await stop


@pytest.mark.parametrize("forced", [False, True])
@async_test
async def test_calls_that_outlast_the_drain_are_asked_to_end(forced: bool) -> None:
    servicer = Hanging()
    async with serving(servicer) as (server, channel):
        call = health_stub(channel).Check(health_pb2.HealthCheckRequest())
        await servicer.entered.wait()
        force = asyncio.Event()
        if forced:
            force.set()
        await server.stop(1000.0 if forced else 0.01, force, servicer.ended.set)
        assert (await call).status == SERVING


@async_test
async def test_a_health_watcher_receives_the_end_and_does_not_delay_it() -> None:
    async with serving() as (server, channel):
        await server.set_serving(True)
        watch = aiter(health_stub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        await server.stop(1000.0, asyncio.Event())
        assert [answer.status async for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]


@async_test
async def test_the_watches_of_health_are_limited_and_each_that_ends_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MAX_WATCHES", 2)
    async with serving() as (server, channel):
        await server.set_serving(True)

        def watch(service: str = "") -> Any:
            return health_stub(channel).Watch(health_pb2.HealthCheckRequest(service=service))

        open_ones = [watch(), watch(SERVICE)]
        for each in open_ones:
            assert (await each.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await watch().read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refused.value.details() or "").startswith("2 clients watch the health of this server already")
        # Whoever asks once is answered.
        assert await status(channel) == SERVING
        open_ones[0].cancel()
        while True:
            next_one = watch()
            try:
                assert (await next_one.read()).status == SERVING
                break
            except grpc.aio.AioRpcError as error:
                # The server has not noticed the end yet.
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@async_test
async def test_a_watch_does_not_keep_a_long_name_in_memory() -> None:
    async with serving() as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError, match="service has 257 letters") as refused:
            await health_stub(channel).Watch(health_pb2.HealthCheckRequest(service="x" * 257)).read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("host", "over_ipv6"), [("127.0.0.1", False), ("0.0.0.0", False), ("::", True)])
@async_test
async def test_a_server_listens_only_on_the_addresses_of_its_host(host: str, over_ipv6: bool) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("Needs IPv6.")
    server = GrpcServer([SERVICE], lambda *_: None)
    port = await server.start(here(host))
    assert is_open("127.0.0.1", port)
    assert is_open("::1", port) == over_ipv6
    await server.stop(0.0, asyncio.Event())


@async_test
async def test_a_port_in_use_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(errors.AlreadyExists, match=rf"Port {port} of 127.0.0.1 is in use.*THE_PORT"):
            await GrpcServer([SERVICE], lambda *_: None).start(here(port=port))


def test_a_client_may_ping_every_second() -> None:
    options = dict(grpc_server._OPTIONS)
    assert options["grpc.http2.min_ping_interval_without_data_ms"] <= 1000
    assert options["grpc.keepalive_permit_without_calls"] == 1


@pytest.mark.parametrize(("pings", "interval_s", "answer"), [(6, 0.05, ""), (100, 0.0, "too_many_pings")])
@async_test
async def test_an_idle_connection_stays_open_unless_it_pings_too_often(
    pings: int, interval_s: float, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = dict(grpc_server._OPTIONS) | {"grpc.http2.min_ping_interval_without_data_ms": 25}
    monkeypatch.setattr(grpc_server, "_OPTIONS", tuple(often.items()))
    server = GrpcServer([SERVICE], lambda *_: None)
    client = await PingingClient.connect(await server.start(here()))
    answers = set()
    # A server tolerates two pings that come too early.
    for _ in range(pings):
        answers.add(await client.ping())
        await asyncio.sleep(interval_s)
        if "too_many_pings" in answers:
            break
    client.close()
    assert answers <= {"", answer}
    assert answer in answers
    await server.stop(0.0, asyncio.Event())


def test_the_limit_on_connections_leaves_room_for_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"soft": 256}

    def set_limit(kind: int, both: tuple[int, int]) -> None:
        if both[0] > 4096:
            raise ValueError("above the limit of the system")
        limits["soft"] = both[0]

    for hard, most in ((256, 128), (4096, 2048), (resource.RLIM_INFINITY, 128)):
        limits["soft"] = 256
        monkeypatch.setattr(resource, "getrlimit", lambda kind, hard=hard: (limits["soft"], hard))
        monkeypatch.setattr(resource, "setrlimit", set_limit)
        assert grpc_server._most_connections() == most


@async_test
async def test_one_connection_too_many_is_unavailable_and_disturbs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_most_connections", lambda: 2)
    server = GrpcServer([SERVICE], lambda *_: None)
    port = await server.start(here())
    others = [await PingingClient.connect(port) for _ in range(2)]
    assert [await other.ping() for other in others] == ["", ""]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await status(channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert [await other.ping() for other in others] == ["", ""]
    for other in others:
        other.close()
    await server.stop(0.0, asyncio.Event())


async def until_refused(channel: grpc.aio.Channel) -> None:
    """Waits until the server rejects new calls."""
    while True:
        try:
            call = reflection_stub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            # A call at the moment of the stop may be cancelled.
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            return
