"""A real Redis server for tests, which can be killed and restarted."""

import os
import subprocess
import sys
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.waiting import HANG_S
from trainer_service.redis_server import connect
from trainer_service.settings import read_settings

PROJECT = Path(__file__).parents[1]


def environment_of(var: Path) -> dict[str, str]:
    return os.environ | {"GPTLOOP_VAR": str(var), "REDIS_URL": "", "PYTHONPATH": str(PROJECT)}


class RedisServer:
    """A real server on a unix socket; its data survive a restart."""

    def __init__(self, var: Path) -> None:
        self.url = read_settings({"GPTLOOP_VAR": str(var)}).redis_url
        self._var = var
        self._clients: list[Redis] = []
        self.start()

    def connect(self) -> Redis:
        """Returns a client, which `end` closes."""
        self._clients.append(connect(self.url))
        return self._clients[-1]

    def end(self) -> None:
        """Kills the server and closes its clients."""
        self.kill()
        for client in self._clients:
            client.close()

    def start(self) -> None:
        """Starts the server; returns when it answers."""
        command = [sys.executable, "-m", "trainer_service", "redis"]
        self._process = subprocess.Popen(command, env=environment_of(self._var), stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + HANG_S
        with connect(self.url) as connection:
            while True:
                try:
                    connection.ping()
                    return
                except RedisConnectionError:
                    assert time.monotonic() < deadline_s and self._process.poll() is None, "Redis did not start."
                    time.sleep(0.02)

    def kill(self) -> None:
        """Kills the server."""
        self._process.kill()
        self._process.wait()
