import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.jobs import training
from trainer_service.kinds import Kind
from trainer_service.queue import JobQueue
from trainer_service.redis_server import connect
from trainer_service.settings import TrainerSettings, read_settings

# The id of the registry whose jobs the tests queue.
REGISTRY = "0123456789abcdef"
PROJECT = Path(__file__).parents[2]


def environment_of(var: Path) -> dict[str, str]:
    return os.environ | {"GPTLOOP_VAR": str(var), "REDIS_URL": "", "PYTHONPATH": str(PROJECT)}


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    return read_settings(
        {"GPTLOOP_VAR": str(tmp_path), "GPTLOOP_TRAINER_PORT": "0", "GPTLOOP_TRAINER_METRICS_PORT": "0"}
    )


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server, on a unix socket."""
    var = tmp_path_factory.mktemp("redis")
    server = subprocess.Popen(
        [sys.executable, "-m", "trainer_service", "redis"], env=environment_of(var), stdout=subprocess.DEVNULL
    )
    url = read_settings({"GPTLOOP_VAR": str(var)}).redis_url
    connection = connect(url)
    deadline_s = time.monotonic() + 20
    while True:
        try:
            connection.ping()
            break
        except RedisConnectionError:
            assert time.monotonic() < deadline_s and server.poll() is None, "Redis did not start."
    connection.close()
    yield url
    server.kill()
    server.wait()


@pytest.fixture
def redis(redis_server: str) -> Iterator[Redis]:
    """A client of a real server that holds nothing yet."""
    connection = connect(redis_server)
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, REGISTRY)


@pytest.fixture
def job(queue: JobQueue, tmp_path: Path) -> str:
    """The id of a job that waits."""
    return queue.enqueue(Kind.TRAIN, training(tmp_path)).id
