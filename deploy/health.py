"""Checks the health of each process: `python -m deploy.health redis|trainer|inference|worker` for one of them."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.access import own_credentials
from deploy.ports import Ports, listening_host, read_ports
from shared.errors import FailedPrecondition, GptloopError, InvalidArgument, Unavailable
from shared.service.access.credentials import Credentials
from shared.service.client_channel import open_channel
from shared.service.grpc_status import error_of
from shared.service.settings import Directories, Environment, reachable_address, read_directories
from trainer_service.jobs.queue import JobQueue
from trainer_service.redis_client import check_server, connect, read_redis

_LIMIT_S = 3.0


@dataclass(frozen=True)
class Health:
    """Whether a process is healthy, and a few words on its state.

    needs_change: whether it stays unhealthy until a setting or a file is changed, so that waiting is useless.
    """

    is_healthy: bool
    text: str
    needs_change: bool = False


def health_checks(environment: Environment, directories: Directories, ports: Ports) -> dict[str, Callable[[], Health]]:
    """Returns a check for each process, in the order in which they start; a check never raises."""
    address = read_redis(environment, directories)
    registry = directories.open_registry()
    trainer_address = reachable_address(listening_host(environment, "TRAINER"), ports.trainer)
    inference_address = reachable_address(listening_host(environment, "INFERENCE"), ports.inference)

    def redis() -> Health:
        with connect(address) as connection:
            check_server(connection)
        return Health(True, "answers")

    def trainer() -> Health:
        serves = _serves(trainer_address, own_credentials(environment))
        return Health(serves, f"{'serves' if serves else 'not ready'} on {trainer_address}")

    def inference() -> Health:
        # A server without a version serves nothing but is healthy.
        if _serves(inference_address, own_credentials(environment)):
            return Health(True, f"serves on {inference_address}")
        if not registry.versions():
            return Health(True, f"no version yet, on {inference_address}")
        return Health(True, f"no version serves, on {inference_address}: `gptloop versions` says why")

    def worker() -> Health:
        with connect(address) as connection:
            jobs = JobQueue(connection, registry.store.id()).store
            workers, awaited = jobs.workers.count(), Counter(job.awaited for job in jobs.waiting() if job.awaited)
        others = "".join(
            f"; {number} {'job' if number == 1 else 'jobs'} waiting for {other}" for other, number in awaited.items()
        )
        return Health(workers > 0, f"{workers} ready for jobs{others}")

    return {check.__name__: partial(_checked, check) for check in (redis, trainer, inference, worker)}


def _checked(check: Callable[[], Health]) -> Health:
    try:
        return check()
    except GptloopError as error:
        return Health(False, str(error), needs_change=isinstance(error, (FailedPrecondition, InvalidArgument)))


def _serves(address: str, credentials: Credentials) -> bool:
    """Returns whether a server reports that it serves; raises a `GptloopError` if it cannot be reached."""
    with open_channel(address, credentials) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=_LIMIT_S
            )
        except grpc.RpcError as failure:
            error = error_of(failure, address)
            if isinstance(error, FailedPrecondition):
                raise error from None
            raise Unavailable(f"no answer on {address}") from None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main(names: list[str]) -> int:
    """Prints the health of the process that one name names, and returns 0 if it is healthy, otherwise 1."""
    try:
        checks = health_checks(os.environ, read_directories(os.environ), read_ports(os.environ))
        if len(names) != 1 or names[0] not in checks:
            raise InvalidArgument(f"Name one of {', '.join(checks)}, as in: python -m deploy.health inference.")
        health = checks[names[0]]()
    except GptloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(health.text)
    return 0 if health.is_healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
