"""What a client says of each failed connection, from what gRPC says of a real one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shared.errors import FailedPrecondition, GptloopError, Unavailable
from shared.service.access.credentials import PLAIN, Credentials
from shared.service.client_channel import open_channel
from shared.service.grpc_status import error_of
from tests.certificates import Authority, Pair

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
HOST = "127.0.0.1"

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers and returns their addresses; `client_ca`: clients need a certificate of it."""
    servers = []

    def start(pair: Pair | None = None, client_ca: Path | None = None, status: int = SERVING) -> str:
        server = grpc.server(ThreadPoolExecutor(2))
        servicer = health.HealthServicer()
        servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        if pair is None:
            port = server.add_insecure_port(f"{HOST}:0")
        else:
            credentials = grpc.ssl_server_credentials(
                [(pair.key.read_bytes(), pair.certificate.read_bytes())],
                client_ca.read_bytes() if client_ca else None,
                client_ca is not None,
            )
            port = server.add_secure_port(f"{HOST}:0", credentials)
        server.start()
        servers.append(server)
        return f"{HOST}:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def call(address: str, credentials: Credentials = PLAIN) -> GptloopError | None:
    """Returns the error of a call; None if it succeeds."""
    with open_channel(address, credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            stub.Check(health_pb2.HealthCheckRequest())
        except grpc.RpcError as failure:
            return error_of(failure, address, "gptloop up")
    return None


def test_certificates_of_the_server(serve: Serve, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    good, expired = authority.issue(HOST), authority.issue(HOST, expired=True)
    named = authority.issue("models.example")
    trusting = Credentials(ca=authority.file)
    for pair, credentials, sentence in (
        (good, trusting, None),
        (good, Credentials(ca=other.file), "is not signed by an authority that this client trusts; set GPTLOOP_TLS_CA"),
        (good, Credentials(ca="system"), "is not signed by an authority that this client trusts; set GPTLOOP_TLS_CA"),
        (expired, trusting, "has expired"),
        (named, trusting, "is for another name; use that name in the address, or set GPTLOOP_TLS_SERVER_NAME"),
        (named, Credentials(ca=authority.file, server_name="models.example"), None),
    ):
        address = serve(pair)
        error = call(address, credentials)
        if sentence is None:
            assert error is None
        else:
            # Another attempt would end in the same way.
            assert isinstance(error, FailedPrecondition)
            assert str(error).startswith(f"The certificate of the server at {address} {sentence}")


def test_certificates_of_the_client(serve: Serve, tmp_path: Path) -> None:
    servers, clients = Authority(tmp_path / "servers"), Authority(tmp_path / "clients")
    address = serve(servers.issue(HOST), clients.file)
    for own, works in ((clients.issue("client"), True), (servers.issue("client"), False), (None, False)):
        credentials = Credentials(servers.file, own.certificate, own.key) if own else Credentials(servers.file)
        error = call(address, credentials)
        if works:
            assert error is None
        else:
            assert isinstance(error, Unavailable)
            assert f"The server at {address} closed the connection before any call" in str(error)
            assert "GPTLOOP_TLS_CLIENT_CERT" in str(error)


def test_only_one_side_uses_tls(serve: Serve, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    plain, secure = serve(), serve(authority.issue(HOST))
    error = call(plain, Credentials(ca=authority.file))
    assert isinstance(error, FailedPrecondition)
    assert str(error).startswith(f"The server at {plain} does not use TLS; unset GPTLOOP_TLS_CA")
    error = call(secure)
    assert isinstance(error, Unavailable)
    assert "it may use TLS (set GPTLOOP_TLS_CA)" in str(error)


def test_no_server_and_no_host(serve: Serve) -> None:
    assert str(call(f"{HOST}:1")) == f"No server answers at {HOST}:1: start it with `gptloop up`."
    assert str(call("nowhere.invalid:1")) == "No server is known by the name nowhere.invalid:1."


def test_of_several_servers_one_that_is_ready_answers(serve: Serve) -> None:
    waiting, ready = serve(status=NOT_SERVING), serve()
    assert call(f"{waiting},{ready},{HOST}:1") is None
    error = call(f"{waiting},{HOST}:1")
    assert isinstance(error, Unavailable)
    assert str(error).startswith(f"No server at {waiting},{HOST}:1 is ready") or "No server answers" in str(error)
    name = f"dns:///localhost:{waiting.rpartition(':')[2]}"
    assert str(call(name)).startswith(f"No server at {name} is ready: they have no version to serve yet")


def test_of_several_servers_with_wrong_certificates_others_may_return(serve: Serve, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    addresses = ",".join(serve(authority.issue(HOST)) for _ in range(2))
    error = call(addresses, Credentials(ca=other.file, server_name=HOST))
    assert isinstance(error, Unavailable)
    assert "is not signed by an authority" in str(error)
