"""A real Redis server for tests, which can be killed and restarted, with the access rules of deploy/redis."""

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.exceptions import RedisError

from shared.plain_paths import socket_folder
from tests.waiting import HANG_S
from trainer_service.redis_client import RedisAddress, connect
from trainer_service.redis_server import find_redis_server

PROJECT = Path(__file__).parents[1]
ACL = PROJECT / "deploy" / "redis" / "users.acl"
PASSWORD = "a password of the tests"
# May do everything; the tests look behind the curtain with it.
ADMIN = "admin"


def users(password: str = PASSWORD) -> str:
    """Returns the access rules with the password of gptloop, and a user of the tests who may do everything."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    return f"{ACL.read_text().replace('PASSWORD_SHA256', digest)}user {ADMIN} on >{ADMIN} ~* &* +@all\n"


class RedisServer:
    """A real server on a unix socket, and on a TCP port if one is given; its data survive a restart."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.port = port
        self.socket = socket_folder(folder) / "redis.sock"
        self.users = folder / "users.acl"
        self.users.write_text(users())
        self.address = RedisAddress(self._url("gptloop", PASSWORD))
        self.url = self.address.url
        self._clients: list[Redis] = []
        self.start()

    def _url(self, user: str, password: str) -> str:
        return f"unix://{user}:{quote(password)}@{quote(str(self.socket))}"

    def connect(self) -> Redis:
        """Returns a client with gptloop's rights, which `end` closes."""
        self._clients.append(connect(self.address))
        return self._clients[-1]

    def admin(self) -> Redis:
        """Returns a client that may do everything, which `end` closes."""
        self._clients.append(connect(RedisAddress(self._url(ADMIN, ADMIN))))
        return self._clients[-1]

    def end(self) -> None:
        """Kills the server and closes its clients."""
        self.kill()
        for client in self._clients:
            client.close()

    def start(self, *options: str) -> None:
        """Starts the server, with more options; returns when it answers."""
        program, _ = find_redis_server()
        given = ["--port", str(self.port), "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", ""]
        given += ["--appendonly", "yes", "--appendfsync", "always", "--aclfile", str(self.users)]
        self._process = subprocess.Popen([program, *given, *options], stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + HANG_S
        with connect(RedisAddress(self._url(ADMIN, ADMIN))) as connection:
            while True:
                try:
                    connection.ping()
                    return
                except RedisError:
                    assert time.monotonic() < deadline_s and self._process.poll() is None, "Redis did not start."
                    time.sleep(0.02)

    def kill(self) -> None:
        """Kills the server."""
        self.pause(False)
        self._process.kill()
        self._process.wait()

    def pause(self, paused: bool) -> None:
        """Stops the process of the server, or lets it go on."""
        os.kill(self._process.pid, signal.SIGSTOP if paused else signal.SIGCONT)
