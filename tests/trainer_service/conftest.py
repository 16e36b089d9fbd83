from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.jobs import training
from tests.redis_process import RedisServer
from tests.registries import disk_registry
from tests.trainer_service.site import Site
from trainer_service.jobs.queue import JobQueue
from trainer_service.server import TrainingServicer
from trainer_service.settings import TrainerSettings, read_settings

# The id of the registry whose jobs the tests queue.
REGISTRY = "0123456789abcdef"


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    return read_settings(
        {"GPTLOOP_VAR": str(tmp_path), "GPTLOOP_TRAINER_PORT": "0", "GPTLOOP_TRAINER_METRICS_PORT": "0"}
    )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that stands for the whole session; at its end, it has refused nothing to gptloop's user."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    refused = server.admin().acl_log()
    server.end()
    assert refused == [], refused


@pytest.fixture
def mortal_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of the test's own, which may be killed and started again."""
    server = RedisServer(tmp_path_factory.mktemp("mortal"))
    yield server
    server.end()


@pytest.fixture
def admin(redis_server: RedisServer) -> Iterator[Redis]:
    """A client that may do everything, of a real server that holds nothing yet."""
    connection = redis_server.admin()
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture
def redis(redis_server: RedisServer, admin: Redis) -> Iterator[Redis]:
    """A client with gptloop's rights, of the same server."""
    connection = redis_server.connect()
    yield connection
    connection.close()


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, REGISTRY)


@pytest.fixture
def servicer(queue: JobQueue, tmp_path: Path) -> TrainingServicer:
    return TrainingServicer(queue, disk_registry(tmp_path / "registry"), tmp_path / "data")


@pytest.fixture
def job(queue: JobQueue, tmp_path: Path) -> str:
    """The id of a job that waits."""
    return queue.enqueue(training(tmp_path)).id
