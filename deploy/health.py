"""Checks the health of each process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.ports import Ports, listening_host, reachable_address
from shared.errors import GptloopError, Unavailable
from shared.registry.identity import registry_id
from shared.registry.store import Registry
from shared.service.settings import Directories, Environment
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
    store = Registry(directories.registry)
    trainer_address = reachable_address(listening_host(environment, "TRAINER"), ports.trainer)
    inference_address = reachable_address(listening_host(environment, "INFERENCE"), ports.inference)

    def redis() -> Health:
        with connect(url) as connection:
            check_server(connection)
        return Health(True, "answers")

    def trainer() -> Health:
        serves = _serves(trainer_address)
        return Health(serves, f"{'serves' if serves else 'not ready'} on {trainer_address}")

    def inference() -> Health:
        # A server without a version serves nothing but is healthy.
        if _serves(inference_address):
            return Health(True, f"serves on {inference_address}")
        if not store.versions():
            return Health(True, f"no version yet, on {inference_address}")
        return Health(True, f"no version serves, on {inference_address}: `gptloop versions` says why")

    def worker() -> Health:
        with connect(url) as connection:
            workers = JobQueue(connection, registry_id(store.root)).store.live_workers()
        return Health(workers > 0, f"{workers} ready for jobs")

    return {check.__name__: partial(_checked, check) for check in (redis, trainer, inference, worker)}


def _checked(check: Callable[[], Health]) -> Health:
    try:
        return check()
    except GptloopError as error:
        return Health(False, str(error))


def _serves(address: str) -> bool:
    """Returns whether a server reports that it serves; raises `Unavailable` if it does not answer."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=_LIMIT_S, wait_for_ready=True
            )
        except grpc.RpcError:
            raise Unavailable(f"no answer on {address}") from None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
