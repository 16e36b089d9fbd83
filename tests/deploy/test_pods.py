"""What a pod runs, with its environment and its files, as processes of this machine."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from shared.errors import Unauthenticated
from shared.service.access.credentials import Credentials
from shared.service.listening import free_port_numbers
from tests.certificates import Authority
from tests.deploy.manifests import container, environment
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.token_files import ALICE, OPERATOR, write_tokens
from tests.waiting import wait_until
from tests.workplace import PROJECT
from trainer_service.redis_server import find_redis_server

pytestmark = pytest.mark.slow

PASSWORD = "the-password-of-redis"


def health(port: int, probe: str) -> int:
    """Asks what a probe of the server asks, on another port."""
    service = container("inference")[probe]["grpc"].get("service", "")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True).status)


def test_a_server_with_the_environment_of_its_pod_answers_probes_and_clients_with_tokens(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.issue("inference")
    secrets = tmp_path / "secrets"
    (secrets / "tls").mkdir(parents=True)
    (secrets / "tokens").mkdir()
    shutil.copy(pair.certificate, secrets / "tls/tls.crt")
    shutil.copy(pair.key, secrets / "tls/tls.key")
    write_tokens(secrets / "tokens/clients", f"alice {ALICE}")
    write_tokens(secrets / "tokens/operators", f"olga {OPERATOR}")
    (probe_port,) = free_port_numbers(1)
    moved = {
        name: text.replace("/run/secrets/gptloop", str(secrets)) for name, text in environment("inference").items()
    }
    own = {
        "GPTLOOP_VAR": str(tmp_path / "var"),
        "GPTLOOP_INFERENCE_HOST": "127.0.0.1",
        "GPTLOOP_INFERENCE_METRICS_HOST": "127.0.0.1",
        "GPTLOOP_INFERENCE_PROBE_PORT": str(probe_port),
        "GPTLOOP_LOG_FORMAT": "console",
    }
    server = Server(tmp_path / "var", **(moved | own))
    try:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        # Started and alive, but not ready, without a version.
        assert health(probe_port, "startupProbe") == health(probe_port, "livenessProbe") == serving
        assert health(probe_port, "readinessProbe") == not_serving
        publish_tiny_version(server.registry, 1.0)
        wait_until(lambda: health(probe_port, "readinessProbe") == serving)
        server.credentials = Credentials(ca=authority.file, server_name="inference", token=ALICE)
        with server.client() as client:
            assert client.complete("Once", max_tokens=4, ignore_eos=True).version == 1
        server.credentials = Credentials(ca=authority.file, server_name="inference", token="a-token-of-nobody")
        with server.client() as client, pytest.raises(Unauthenticated):
            client.model()
    finally:
        assert server.end() == 0


@contextmanager
def redis_of_its_pod(folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Runs the command of the pod of Redis, in a folder and on another port."""
    for name in ("data", "etc", "tmp", "secrets"):
        (folder / name).mkdir()
    # The script has no quotes for the path of a project.
    shutil.copy(PROJECT / "deploy/redis/users.acl", folder / "etc")
    (folder / "secrets/password").write_text(f"{PASSWORD}\n")
    (port,) = free_port_numbers(1)
    (script,) = container("redis")["args"]
    places = {
        "/run/secrets/gptloop/redis": folder / "secrets",
        "/etc/redis": folder / "etc",
        "/tmp": folder / "tmp",
        "/data": folder / "data",
    }
    # At once, because this folder may lie below /tmp itself.
    script = re.sub("|".join(places), lambda found: str(places[found[0]]), script)
    script = script.rstrip() + f" --bind 127.0.0.1 --port {port}\n"
    # The programs of its image, with the redis-server of this machine.
    path = f"{Path(find_redis_server()[0]).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [*container("redis")["command"], script], env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL
    )
    try:
        yield port, process
    finally:
        process.terminate()
        process.wait()


def test_redis_knows_the_user_of_the_services_by_the_password_of_its_secret(tmp_path: Path) -> None:
    with redis_of_its_pod(tmp_path) as (port, process):

        def ask(password: str | None, *command: str) -> Any:
            user = None if password is None else "gptloop"
            with Redis("127.0.0.1", port, username=user, password=password) as client:
                return client.execute_command(*command)

        def answers() -> bool:
            try:
                return bool(ask(PASSWORD, "PING"))
            except RedisError:
                return False

        wait_until(answers, lost=lambda: process.poll() is not None)
        assert ask(PASSWORD, "SET", "gptloop:a", "b")
        with pytest.raises(AuthenticationError):
            ask("another password", "PING")
        with pytest.raises(AuthenticationError):
            ask(None, "PING")
        with pytest.raises(NoPermissionError):
            ask(PASSWORD, "CONFIG", "GET", "*")
    assert list((tmp_path / "data").iterdir()), "Nothing was appended to a file."
