import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.access.token_interceptor import TokenInterceptor, current_caller
from shared.service.access.tokens import Caller, Callers, TokenSettings
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address
from tests.asynchronous import async_test
from tests.token_files import ALICE, BOB, OPERATOR, write_tokens
from tests.waiting import eventually

pytestmark = pytest.mark.slow

CLIENTS, OPERATORS = "inference.v1.InferenceService", "inference.v1.ModelAdminService"
OK, UNAUTHENTICATED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED

# Who made each call of `GetModel`, as the method knows it.
answered: list[Caller | None] = []


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    async def Generate(self, request: object, context: Any) -> None:  # noqa: N802
        await context.write(pb.GenerateResponse())

    async def GetModel(self, request: object, context: object) -> pb.GetModelResponse:  # noqa: N802
        answered.append(current_caller())
        return pb.GetModelResponse()


class Admin(inference_pb2_grpc.ModelAdminServiceServicer):
    async def ListVersions(self, request: object, context: object) -> pb.ListVersionsResponse:  # noqa: N802
        return pb.ListVersionsResponse()


@asynccontextmanager
async def serving(callers: Callers) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer([CLIENTS, OPERATORS], lambda *_: None, [TokenInterceptor(callers, [CLIENTS], [OPERATORS])])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(), server.server)
    inference_pb2_grpc.add_ModelAdminServiceServicer_to_server(Admin(), server.server)
    port = await server.start(Address("127.0.0.1", 0, "THE_HOST", "THE_PORT"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0.0, asyncio.Event())


@pytest.fixture
def settings(tmp_path: Path) -> TokenSettings:
    clients = write_tokens(tmp_path / "clients", f"alice {ALICE}")
    return TokenSettings(clients, write_tokens(tmp_path / "operators", f"olga {OPERATOR}"))


async def codes(channel: grpc.aio.Channel, *metadata: tuple[str, str | bytes]) -> list[grpc.StatusCode]:
    """Returns how a call of each kind ends: two to the service of clients, the first a stream, and one of operators."""
    inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    admin: Any = inference_pb2_grpc.ModelAdminServiceStub(channel)
    stream = inference.Generate(pb.GenerateRequest(), metadata=metadata)
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in stream:
            pass
    calls = [
        stream,
        inference.GetModel(pb.GetModelRequest(), metadata=metadata),
        admin.ListVersions(pb.ListVersionsRequest(), metadata=metadata),
    ]
    return [await call.code() for call in calls]


def bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


@async_test
async def test_each_service_needs_its_token(settings: TokenSettings) -> None:
    async with serving(settings.open()) as channel:
        assert await codes(channel) == [UNAUTHENTICATED] * 3
        assert await codes(channel, bearer(BOB)) == [UNAUTHENTICATED] * 3
        assert await codes(channel, bearer(ALICE)) == [OK, OK, PERMISSION_DENIED]
        assert await codes(channel, bearer(OPERATOR)) == [OK] * 3
        # Nobody can say which of two counts.
        assert await codes(channel, bearer(ALICE), bearer(OPERATOR)) == [UNAUTHENTICATED] * 3
        assert (
            await codes(channel, ("token", OPERATOR), ("authorization-bin", OPERATOR.encode())) == [UNAUTHENTICATED] * 3
        )


@async_test
async def test_without_tokens_of_operators_only_clients_are_served(settings: TokenSettings) -> None:
    async with serving(TokenSettings(clients=settings.clients).open()) as channel:
        assert await codes(channel, bearer(ALICE)) == [OK, OK, grpc.StatusCode.FAILED_PRECONDITION]
        admin: Any = inference_pb2_grpc.ModelAdminServiceStub(channel)
        call = admin.ListVersions(pb.ListVersionsRequest())
        assert "set GPTLOOP_OPERATOR_TOKENS to a file" in await call.details()


@async_test
async def test_without_tokens_of_clients_only_operators_need_one(settings: TokenSettings) -> None:
    async with serving(TokenSettings(operators=settings.operators).open()) as channel:
        assert await codes(channel) == [OK, OK, UNAUTHENTICATED]
        assert await codes(channel, bearer(OPERATOR)) == [OK] * 3


@async_test
async def test_a_method_knows_who_calls(settings: TokenSettings) -> None:
    answered.clear()
    for callers, metadata in ((settings.open(), [bearer(ALICE), bearer(OPERATOR)]), (Callers(), [bearer(ALICE)])):
        async with serving(callers) as channel:
            for each in metadata:
                await codes(channel, each)
    assert answered == [Caller("alice", False), Caller("olga", True), None]


@async_test
async def test_a_request_is_not_read_before_its_token(settings: TokenSettings) -> None:
    async with serving(settings.open()) as channel:
        for method in (f"/{CLIENTS}/GetModel", f"/{OPERATORS}/ListVersions"):
            call: Any = channel.unary_unary(method)
            assert await call(b"\xff" * 11).code() is UNAUTHENTICATED


@async_test
async def test_health_and_reflection_need_no_token(settings: TokenSettings) -> None:
    async with serving(settings.open()) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert await health.Check(health_pb2.HealthCheckRequest()).code() is OK
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in reflection.ServerReflectionInfo(iter([request])):
            assert {CLIENTS, OPERATORS} <= {each.name for each in answer.list_services_response.service}
            break


@async_test
async def test_an_unknown_method_is_unimplemented_even_without_a_token(settings: TokenSettings) -> None:
    async with serving(settings.open()) as channel:
        call: Any = channel.unary_unary(f"/{OPERATORS}/Anything")
        assert await call(b"").code() is grpc.StatusCode.UNIMPLEMENTED


@async_test
async def test_tokens_change_under_load_without_a_failed_call(settings: TokenSettings) -> None:
    assert settings.clients is not None
    async with serving(settings.open()) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        current = ALICE
        # The tokens of calls that are on their way.
        used: collections.Counter[str] = collections.Counter()
        calls, ends = 0, False

        async def call_on_and_on() -> None:
            nonlocal calls
            while not ends:
                token = current
                used[token] += 1
                await stub.GetModel(pb.GetModelRequest(), metadata=[bearer(token)])
                used[token] -= 1
                calls += 1

        async with asyncio.TaskGroup() as load:
            for _ in range(8):
                load.create_task(call_on_and_on())
            for number in range(20):
                old, new = current, f"{BOB}{number}"
                write_tokens(settings.clients, f"alice {old}", f"alice {new}")
                current, before = new, calls
                await eventually(lambda old=old, before=before: not used[old] and calls > before + 20)  # type: ignore[misc]
                write_tokens(settings.clients, f"alice {new}")
                assert await stub.GetModel(pb.GetModelRequest(), metadata=[bearer(old)]).code() is UNAUTHENTICATED
            ends = True
