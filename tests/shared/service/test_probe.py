import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import AlreadyExists
from shared.service.access.tls import ServerTls, TlsFiles
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address
from shared.service.probe import MAX_CONNECTIONS, Probe
from tests.asynchronous import async_test
from tests.certificates import Authority

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def here(port: int = 0) -> Address:
    return Address("127.0.0.1", port, "THE_HOST", "THE_PORT")


async def asked(port: int) -> tuple[int, int]:
    """Returns the health of the server, and whether its process works, as a probe without TLS sees them."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        ready, alive = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", "liveness")]
        return ready.status, alive.status


@async_test
async def test_probes_without_tls_see_whether_a_server_with_tls_is_ready_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = []

    class Found(Probe):
        async def start(self, address: Address) -> int:
            ports.append(await super().start(address))
            return ports[-1]

    monkeypatch.setattr("shared.service.grpc_server.Probe", Found)
    pair = Authority(tmp_path).issue("127.0.0.1")
    server = GrpcServer([], lambda *_: None)
    await server.start(here(), ServerTls(TlsFiles(pair.certificate, pair.key)), probe=here())
    (port,) = ports
    assert await asked(port) == (NOT_SERVING, SERVING)
    await server.set_serving(True)
    assert await asked(port) == (SERVING, SERVING)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            call: Any = channel.unary_unary("/inference.v1.InferenceService/GetModel")
            await call(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(0.0, asyncio.Event())


@async_test
async def test_connections_to_it_leave_files_for_the_service() -> None:
    probe = Probe()
    port = await probe.start(here())
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_CONNECTIONS)]
    # Each has its place once the server begins to speak.
    for reader, _ in silent:
        await reader.readexactly(1)
    further, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await further.read() == b""
    for each in (writer, *(writer for _, writer in silent)):
        each.close()
    await probe.stop()


@async_test
async def test_while_a_server_drains_it_is_not_ready_but_works() -> None:
    probe = Probe()
    port = await probe.start(here())
    await probe.set_serving(True)
    await probe.set_serving(False)
    assert await asked(port) == (NOT_SERVING, SERVING)
    with pytest.raises(AlreadyExists, match=rf"Port {port} .* THE_PORT"):
        await Probe().start(here(port))
    await probe.stop()
