import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.errors import InvalidArgument, Unavailable
from shared.settings import Directories
from trainer_service.redis_server import connect, find_redis_server, redis_url, socket_path

_RUN = "import sys; from pathlib import Path; from shared.settings import Directories; "
_RUN += "from trainer_service.redis_server import run; run(Directories(Path(sys.argv[1])))"


@contextmanager
def _server(directories: Directories) -> Iterator[Redis]:
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(directories.var)], stdout=subprocess.DEVNULL)
    with connect(redis_url({}, directories)) as connection:
        try:
            deadline_s = time.monotonic() + 20
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


@pytest.mark.parametrize("name", ["short", "a folder with spaces and % signs", "long" * 40])
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


def test_a_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == program


def test_without_a_server_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"brew install redis.*REDIS_URL"):
        find_redis_server()


def test_a_url_in_the_environment_is_used(tmp_path: Path) -> None:
    url = "redis://example.org:6380/2"
    assert redis_url({"REDIS_URL": url}, Directories(tmp_path)) == url


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_url_that_is_not_redis_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidArgument, match="REDIS_URL"):
        redis_url({"REDIS_URL": url}, Directories(tmp_path))
