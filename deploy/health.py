"""Checks the health of each process."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.ports import Ports, listening_host
from shared.errors import GptloopError
from shared.registry.identity import registry_id
from shared.registry.store import Registry
from shared.service.settings import Directories, Environment, to_address
from trainer_service.jobs.queue import JobQueue
from trainer_service.redis_server import check_server, connect, redis_url

_LIMIT_S = 3.0


@dataclass(frozen=True)
class Health:
    """Whether a process is healthy, and a few words on its state."""

    is_healthy: bool
    text: str


def health_checks(environment: Environment, directories: Directories, ports: Ports) -> dict[str, Callable[[], Health]]:
    """Returns a check for each process, in the order in which they start; a check never raises."""
    url = redis_url(environment, directories)
    trainer = _address(listening_host(environment, "TRAINER"), ports.trainer)
    inference = _address(listening_host(environment, "INFERENCE"), ports.inference)
    return {
        "redis": lambda: _check_redis(url),
        "trainer": lambda: _check_trainer(trainer),
        "inference": lambda: _check_inference(inference, Registry(directories.registry)),
        "worker": lambda: _check_worker(url, directories),
    }


def _check_redis(url: str) -> Health:
    with connect(url) as connection:
        try:
            check_server(connection)
        except GptloopError as error:
            return Health(False, str(error))
    return Health(True, "answers")


def _check_worker(url: str, directories: Directories) -> Health:
    with connect(url) as connection:
        try:
            workers = JobQueue(connection, registry_id(directories.registry)).leases.live_workers()
        except GptloopError as error:
            return Health(False, str(error))
    return Health(workers > 0, f"{workers} ready for jobs")


def _check_trainer(address: str) -> Health:
    serves = _serves(address)
    return (
        _no_answer(address) if serves is None else Health(serves, f"{'serves' if serves else 'not ready'} on {address}")
    )


def _check_inference(address: str, registry: Registry) -> Health:
    # A server without a version serves nothing but is healthy.
    match _serves(address):
        case None:
            return _no_answer(address)
        case True:
            return Health(True, f"serves on {address}")
        case False if not registry.versions():
            return Health(True, f"no version yet, on {address}")
        case False:
            return Health(True, f"no version serves, on {address}: `gptloop versions` says why")


def _serves(address: str) -> bool | None:
    """Returns whether a server reports that it serves, or `None` if it does not answer."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=_LIMIT_S, wait_for_ready=True
            )
        except grpc.RpcError:
            return None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _no_answer(address: str) -> Health:
    return Health(False, f"no answer on {address}")


def _address(host: str, port: int) -> str:
    # A server that listens on every address is asked on the loopback address.
    return to_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
