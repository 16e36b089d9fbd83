"""A Redis that answers, also while `gptloop up` does not run."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis
from redis.exceptions import RedisError

from shared.errors import Unavailable
from shared.service.settings import Directories
from trainer_service.redis_client import RedisAddress, connect, read_redis

_START_LIMIT_S = 60.0
_POLL_S = 0.05


@contextmanager
def running_redis(directories: Directories, address: RedisAddress) -> Iterator[Redis]:
    """Yields a client of Redis; starts the embedded one until the end of the block if it does not run.

    Raises `Unavailable` if it does not start.
    """
    with connect(address) as client:
        if address != read_redis({}, directories) or _answers(client):
            yield client
            return
        command = [sys.executable, "-m", "trainer_service", "redis"]
        environment = os.environ | {"GPTLOOP_VAR": str(directories.var), "REDIS_URL": ""}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            deadline_s = time.monotonic() + _START_LIMIT_S
            while not _answers(client):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise Unavailable(f"The embedded Redis of {directories.var} does not start.")
                time.sleep(_POLL_S)
            yield client
        finally:
            process.terminate()
            process.wait()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False
