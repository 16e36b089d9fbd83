from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deploy.health import Health, health_checks
from deploy.health import main as health_of
from deploy.ports import Ports, free_ports
from shared.registry.registry import Registry
from shared.service.settings import Directories
from tests.certificates import Authority
from tests.jobs import training
from tests.redis_process import RedisServer
from tests.registries import registry_id
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A server whose health a test sets, and what is said of it as the inference server or as the trainer."""

    def __init__(self, folder: Path) -> None:
        self.directories = Directories(folder)
        self._health = health.HealthServicer()
        self.grpc = grpc.server(ThreadPoolExecutor(2))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self.port = self.grpc.add_insecure_port("127.0.0.1:0")
        self.grpc.start()

    def check(self, name: str, status: int) -> Health:
        self._health.set("", status)
        ports = Ports(inference=self.port, inference_http=3, inference_metrics=1, trainer=self.port, trainer_metrics=2)
        return health_checks({}, self.directories, ports)[name]()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.grpc.stop(None).wait()


@pytest.mark.parametrize("name", ["inference", "trainer"])
def test_a_server_that_serves_is_healthy(server: Server, name: str) -> None:
    assert server.check(name, SERVING) == Health(True, f"serves on 127.0.0.1:{server.port}")


def test_an_inference_server_without_a_version_is_healthy(server: Server) -> None:
    assert server.check("inference", NOT_SERVING) == Health(True, f"no version yet, on 127.0.0.1:{server.port}")


def test_an_inference_server_that_serves_none_of_its_versions_says_where_to_look(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "versions", lambda self: ["a version"])
    answer = server.check("inference", NOT_SERVING)
    assert answer.is_healthy
    assert "no version serves" in answer.text
    assert "gptloop versions" in answer.text


def test_the_trainer_is_healthy_only_if_it_serves(server: Server) -> None:
    assert server.check("trainer", NOT_SERVING) == Health(False, f"not ready on 127.0.0.1:{server.port}")


@pytest.mark.parametrize(
    ("names", "expired", "is_trusted", "reason"),
    [
        (["127.0.0.1"], False, False, "is not signed by an authority that this client trusts"),
        (["models.example"], False, True, "is for another name"),
        (["127.0.0.1"], True, True, "has expired"),
    ],
)
def test_a_certificate_that_is_refused_needs_a_change(
    tmp_path: Path, names: list[str], expired: bool, is_trusted: bool, reason: str
) -> None:
    authority, other = Authority(tmp_path / "authority"), Authority(tmp_path / "other")
    pair = authority.issue(*names, expired=expired)
    settings = {"GPTLOOP_TLS_CA": str((authority if is_trusted else other).file)}
    server = grpc.server(ThreadPoolExecutor(2))
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    ports = Ports(inference=port, inference_http=3, inference_metrics=1, trainer=port, trainer_metrics=2)
    try:
        answer = health_checks(settings, Directories(tmp_path), ports)["trainer"]()
    finally:
        server.stop(None).wait()
    assert not answer.is_healthy and answer.needs_change
    assert reason in answer.text


def test_a_server_that_does_not_answer_may_still_start(tmp_path: Path) -> None:
    answer = health_checks({}, Directories(tmp_path), free_ports())["trainer"]()
    assert not answer.is_healthy and not answer.needs_change


def test_redis_that_does_not_answer_is_not_healthy(server: Server) -> None:
    answer = server.check("redis", SERVING)
    assert not answer.is_healthy
    assert answer.text.startswith("Redis does not answer")


@pytest.mark.slow
def test_the_check_of_workers_says_what_jobs_need_and_none_has(server: Server, tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    try:
        queue = JobQueue(redis.connect(), registry_id(server.directories.registry))
        queue.store.workers.renew("a", Offer())
        queue.enqueue(training(tmp_path, needs="gpu"))
        answer = health_checks({"REDIS_URL": redis.url}, server.directories, free_ports())["worker"]()
        assert answer == Health(True, "1 ready for jobs; 1 job waiting for a worker with a GPU")
    finally:
        redis.end()


def test_a_name_that_is_not_a_process_is_answered_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert health_of(["web"]) == 1
    assert capsys.readouterr().err == (
        "error: Name one of redis, trainer, inference, worker, as in: python -m deploy.health inference.\n"
    )


@pytest.mark.parametrize(("status", "code"), [(SERVING, 0), (NOT_SERVING, 1)])
def test_the_exit_code_says_whether_one_process_is_healthy(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    monkeypatch.setenv("GPTLOOP_VAR", str(server.directories.var))
    monkeypatch.setenv("GPTLOOP_TRAINER_PORT", str(server.port))
    server.check("trainer", status)
    assert health_of(["trainer"]) == code
    assert f"127.0.0.1:{server.port}" in capsys.readouterr().out
