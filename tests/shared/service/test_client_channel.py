import asyncio
import socket
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import InvalidArgument, Unavailable
from shared.service import grpc_server
from shared.service.access.credentials import Credentials
from shared.service.client_channel import open_aio_channel, read_target
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address
from tests.asynchronous import async_test
from tests.waiting import HANG_S

BALANCED = "grpc.service_config"
NAME = "grpc.ssl_target_name_override"


def test_one_server_is_connected_as_it_is_written() -> None:
    assert read_target("models.example:50051").name == "models.example:50051"
    assert read_target("models.example:50051").options == ()
    assert dict(read_target("models.example:50051", Credentials(server_name="other")).options) == {NAME: "other"}


def test_a_name_for_several_servers_is_left_to_grpc() -> None:
    target = read_target("dns:///models.example:50051")
    assert target.name == "dns:///models.example:50051"
    assert set(dict(target.options)) == {BALANCED}


def test_a_list_becomes_addresses() -> None:
    target = read_target("127.0.0.1:1, localhost:65535")
    assert target.name == "ipv4:127.0.0.1:1,127.0.0.1:65535"
    assert dict(target.options)["grpc.default_authority"] == "127.0.0.1:1"
    assert BALANCED in dict(target.options)


@pytest.mark.skipif(not socket.has_ipv6, reason="Needs IPv6.")
def test_a_list_may_be_of_ipv6() -> None:
    assert read_target("[::1]:1,[::1]:2").name == "ipv6:[::1]:1,[::1]:2"
    with pytest.raises(InvalidArgument, match=r"mixes addresses of IPv4 and IPv6"):
        read_target("127.0.0.1:1,[::1]:2")


def test_servers_in_a_list_need_a_common_name() -> None:
    with pytest.raises(InvalidArgument, match=r"names several servers; .* set server_name \(GPTLOOP_TLS_SERVER_NAME\)"):
        read_target("127.0.0.1:1,127.0.0.1:2", Credentials(ca="system"))
    target = read_target("127.0.0.1:1,127.0.0.1:2", Credentials(ca="system", server_name="models.example"))
    assert dict(target.options)[NAME] == "models.example"


@pytest.mark.parametrize("wrong", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:1²"])
def test_each_address_of_a_list_needs_a_host_and_a_port(wrong: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is not an address of a server, such as 127\.0\.0\.1:50051\."):
        read_target(f"127.0.0.1:1,{wrong}")


def test_an_unknown_name_in_a_list_is_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"There is no host 'nowhere\.invalid'\."):
        read_target("127.0.0.1:1,nowhere.invalid:1")


class Counting(health_pb2_grpc.HealthServicer):
    """Health that is always SERVING, or not, and counts its calls."""

    def __init__(self, counts: Counter[int], number: int) -> None:
        self.status: int = health_pb2.HealthCheckResponse.SERVING
        self.changed = asyncio.Event()
        self._counts, self._number = counts, number

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._counts[self._number] += 1
        return health_pb2.HealthCheckResponse(status=self.status)

    async def Watch(self, request: Any, context: Any) -> Any:  # noqa: N802
        while True:
            yield health_pb2.HealthCheckResponse(status=self.status)
            await self.changed.wait()
            self.changed.clear()

    def set(self, status: int) -> None:
        self.status = status
        self.changed.set()


@async_test
async def test_calls_take_turns_among_the_servers_that_are_ready() -> None:
    counts = Counter[int]()
    async with AsyncExitStack() as stack:
        servicers, places = [], []
        for number in range(3):
            server = GrpcServer([], lambda *_: None)
            servicers.append(Counting(counts, number))
            health_pb2_grpc.add_HealthServicer_to_server(servicers[-1], server.server)
            places.append(f"127.0.0.1:{await server.start(Address('127.0.0.1', 0, 'HOST', 'PORT'))}")
            stack.push_async_callback(server.server.stop, None)
        channel = await stack.enter_async_context(open_aio_channel(",".join(places)))
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def call() -> None:
            await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)

        async def served(expected: set[int]) -> None:
            """Waits until exactly these servers answer, and all of them alike."""
            async with asyncio.timeout(HANG_S):
                while True:
                    counts.clear()
                    for _ in range(3 * len(expected)):
                        await call()
                    if counts == dict.fromkeys(expected, 3):
                        return

        await served({0, 1, 2})
        servicers[1].set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await served({0, 2})
        servicers[1].set(health_pb2.HealthCheckResponse.SERVING)
        await served({0, 1, 2})


@async_test
async def test_an_old_connection_ends_without_failing_a_call_or_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    short = dict(grpc_server._OPTIONS) | {"grpc.max_connection_age_ms": 50}
    monkeypatch.setattr(grpc_server, "_OPTIONS", tuple(short.items()))
    server = GrpcServer([], lambda *_: None)
    peers = set[str]()

    class Noting(Counting):
        async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
            peers.add(context.peer())
            return await super().Check(request, context)

    servicer = Noting(Counter(), 0)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server.server)
    address = f"127.0.0.1:{await server.start(Address('127.0.0.1', 0, 'HOST', 'PORT'))}"
    async with open_aio_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        stream = aiter(stub.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(HANG_S):
            # Each connection is another peer.
            while len(peers) < 5:
                await stub.Check(health_pb2.HealthCheckRequest())
        servicer.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.server.stop(None)
