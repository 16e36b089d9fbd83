"""Two replicas behind Envoy and by round robin: no call fails while one drains or cancels calls, or while secrets are
renewed."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.asynchronous import async_test
from tests.certificates import Pair
from tests.envoy_process import MISSING, PROGRAM, Envoy
from tests.fakes import TINY
from tests.soak.replicas import NAME, Secrets, soak
from tests.waiting import HANG_S, eventually

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PROGRAM.exists(), reason=MISSING)]


@async_test
async def test_no_call_fails_while_replicas_drain_and_secrets_change(tmp_path: Path) -> None:
    load = await soak(tmp_path, TINY, streams=6, restarts=2, rotations=2, tokens=24)
    assert load.violations == []
    assert [(phase.restarts, phase.rotations) for phase in load.phases] == [(1, 1), (1, 1)]


class _Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Answers calls, or cancels them, as gRPC does with one that arrives while its server stops; counts both."""

    def __init__(self) -> None:
        self.cancels = False
        self.answered = 0
        self.cancelled = 0

    async def Generate(self, message: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        if self.cancels:
            self.cancelled += 1
            await context.abort(grpc.StatusCode.CANCELLED, "Cancelled on the server side")
        self.answered += 1
        await context.write(pb.GenerateResponse(finished=pb.Finished()))


@async_test
async def test_envoy_sends_a_call_that_a_replica_cancels_to_the_other_one(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "secrets")
    replicas = [_Replica(), _Replica()]
    async with AsyncExitStack() as stack:
        ports = [await _serve(stack, replica, secrets.pair) for replica in replicas]
        # Its health checks are answered on this event loop.
        envoy = await asyncio.to_thread(Envoy, tmp_path / "envoy", secrets.folder, ports)
        stack.callback(envoy.end)
        credentials = grpc.ssl_channel_credentials((secrets.folder / "ca.crt").read_bytes())
        channel = grpc.aio.secure_channel(envoy.address, credentials, [("grpc.ssl_target_name_override", NAME)])
        await stack.enter_async_context(channel)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def call() -> None:
            (answer,) = [each async for each in stub.Generate(pb.GenerateRequest(), timeout=HANG_S)]
            assert answer.HasField("finished")

        await eventually(lambda: envoy.statistics()["membership_healthy"] == len(replicas))
        # Envoy's workers learn of a healthy replica up to a second later.
        while not all(replica.answered for replica in replicas):
            await call()
        replicas[0].cancels = True
        while not replicas[0].cancelled:
            await call()


async def _serve(stack: AsyncExitStack, replica: _Replica, pair: Pair) -> int:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(replica, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    stack.push_async_callback(server.stop, None)
    return port
