"""Asks each process whether it does its work."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.exceptions import RedisError

from deploy.ports import Ports, listening_host
from shared.errors import GptloopError
from shared.registry.identity import registry_id
from shared.settings import Directories, Environment, to_address
from trainer_service.queue import JobQueue
from trainer_service.redis_server import connect, redis_url

_LIMIT_S = 3.0


@dataclass(frozen=True)
class Health:
    """Whether a process does its work, and a word on it."""

    is_healthy: bool
    text: str


def health_checks(environment: Environment, directories: Directories, ports: Ports) -> dict[str, Callable[[], Health]]:
    """A check for each process, in the order in which they come up; none of them raises."""
    url = redis_url(environment, directories)
    trainer = _address(listening_host(environment, "TRAINER"), ports.trainer)
    inference = _address(listening_host(environment, "INFERENCE"), ports.inference)
    return {
        "redis": lambda: _check_redis(url),
        "trainer": lambda: _check_grpc(trainer, needs_serving=True),
        "inference": lambda: _check_grpc(inference, needs_serving=False),
        "worker": lambda: _check_worker(url, directories),
    }


def _check_redis(url: str) -> Health:
    with connect(url) as connection:
        try:
            connection.ping()
        except RedisError as error:
            return Health(False, f"no answer: {error}")
    return Health(True, "answers")


def _check_worker(url: str, directories: Directories) -> Health:
    with connect(url) as connection:
        try:
            workers = JobQueue(connection, registry_id(directories.registry)).live_workers()
        except GptloopError as error:
            return Health(False, str(error))
    return Health(workers > 0, f"{workers} ready for jobs")


def _check_grpc(address: str, *, needs_serving: bool) -> Health:
    # The inference server is NOT_SERVING until a first version exists, and healthy all the same.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=_LIMIT_S, wait_for_ready=True
            )
        except grpc.RpcError as error:
            return Health(False, f"no answer on {address}: {error.code().name}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return Health(status == "SERVING" or not needs_serving, f"{status} on {address}")


def _address(host: str, port: int) -> str:
    # A server that listens everywhere is asked on this machine.
    return to_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
