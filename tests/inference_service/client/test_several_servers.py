"""A client of several servers, one of which comes back just before the other one leaves."""

import asyncio
from typing import Any

import pytest

from inference_service.client import AsyncInferenceClient
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address, free_port_numbers
from tests.asynchronous import async_test
from tests.waiting import HANG_S

# After this many failed attempts to connect, a channel with gRPC's own pauses would wait for seconds.
ATTEMPTS = 8


class Tokens(inference_pb2_grpc.InferenceServiceServicer):
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        return pb.TokenizeResponse(token_ids=[1])


async def start(port: int = 0) -> tuple[GrpcServer, int]:
    server = GrpcServer([], lambda *_: None)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Tokens(), server.server)
    port = await server.start(Address("127.0.0.1", port, "HOST", "PORT"))
    await server.set_serving(True)
    return server, port


@pytest.mark.slow
@async_test
async def test_no_call_fails_if_the_last_server_leaves_when_another_has_come_back() -> None:
    attempts = 0
    many = asyncio.Event()

    def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        writer.close()
        if attempts >= ATTEMPTS:
            many.set()

    (port,) = free_port_numbers(1)
    absent = await asyncio.start_server(refuse, "127.0.0.1", port)
    other, other_port = await start()
    async with AsyncInferenceClient(f"127.0.0.1:{port},127.0.0.1:{other_port}") as client:
        assert await client.tokenize("a") == [1]
        async with asyncio.timeout(HANG_S):
            await many.wait()
        absent.close()
        await absent.wait_closed()
        back, _ = await start(port)
        await other.stop(HANG_S, asyncio.Event())
        assert await client.tokenize("a") == [1]
        await back.server.stop(None)
