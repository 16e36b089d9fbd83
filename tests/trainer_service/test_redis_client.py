from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, BusyLoadingError, OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import FailedPrecondition, InvalidArgument, Unavailable
from shared.service.settings import Directories
from tests.certificates import Authority
from tests.redis_process import PASSWORD, RedisServer
from tests.registries import disk_registry
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.redis_client import RedisAddress, check_server, connect, reachable, read_redis, redis_failure


def test_a_url_in_the_environment_is_used(tmp_path: Path) -> None:
    url = "redis://example.org:6380/2"
    assert read_redis({"REDIS_URL": url}, Directories(tmp_path)).url == url


@pytest.mark.parametrize("url", ["redis://h", "redis://h/", "rediss://h:1/15", "redis://:p@h/0?db=3", "unix:///a%20b"])
def test_a_url_with_or_without_a_database_is_used(tmp_path: Path, url: str) -> None:
    assert read_redis({"REDIS_URL": url}, Directories(tmp_path)).url == url


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:6379", "http://localhost", "redis://localhost:port", "redis://[::1"),
        *("redis://localhost/abc", "redis://localhost/0/1", "redis://localhost/-1", f"redis://localhost/{'9' * 400}"),
        *("redis://localhost?db=abc", "redis://localhost?colour=red", f"redis://localhost/{'a' * 400}"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidArgument, match="REDIS_URL") as raised:
        read_redis({"REDIS_URL": url}, Directories(tmp_path))
    assert len(str(raised.value)) <= 300


def test_no_sentence_repeats_a_password(tmp_path: Path) -> None:
    for url in ("redis://:secret@host/abc", "http://:secret@host", "redis://:secret@host?colour=red"):
        with pytest.raises(InvalidArgument) as raised:
            read_redis({"REDIS_URL": url}, Directories(tmp_path))
        assert "secret" not in str(raised.value)


def _file(folder: Path, text: str) -> str:
    path = folder / "password"
    path.write_text(text)
    return str(path)


def test_the_password_of_a_file_opens_redis(mortal_redis: RedisServer, tmp_path: Path) -> None:
    url = f"unix://gptloop@{quote(str(mortal_redis.socket))}"
    password = _file(tmp_path, "wrong\n")
    address = read_redis({"REDIS_URL": url, "GPTLOOP_REDIS_PASSWORD_FILE": password}, Directories(tmp_path))
    with connect(address) as client:
        with pytest.raises(Unavailable, match="refuses the name or the password"), reachable(client):
            client.ping()
        # The file is read again for the next connection.
        _file(tmp_path, f"{PASSWORD}\n")
        check_server(client)
        with pytest.raises(Unavailable, match=r"to the user.*deploy/redis/users\.acl"), reachable(client):
            client.keys()
        Path(password).unlink()
        client.connection_pool.disconnect()
        with pytest.raises(Unavailable, match="which cannot be read: No such file"), reachable(client):
            client.ping()
        assert PASSWORD not in repr(client) + repr(address)


def test_nobody_enters_redis_without_a_name(redis_server: RedisServer) -> None:
    socket = quote(str(redis_server.socket))
    for user in ("", "default:@", "default:x@"):
        with connect(RedisAddress(f"unix://{user}{socket}")) as client, pytest.raises(Unavailable), reachable(client):
            client.get("gptloop:x")
    with redis_server.admin() as admin:
        admin.acl_log_reset()


@pytest.mark.parametrize(
    ("url", "content", "sentence"),
    [
        ("", "secret", "needs REDIS_URL: the embedded Redis has no password"),
        ("redis://u:hidden@h", "secret", "REDIS_URL has one too"),
        ("redis://u@h?password=hidden", "secret", "REDIS_URL has one too"),
        ("redis://u@h", None, "which cannot be read: No such file"),
        ("redis://u@h", "", "must contain one line"),
        ("redis://u@h", "secret\nhidden", "must contain one line"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_refused(
    tmp_path: Path, url: str, content: str | None, sentence: str
) -> None:
    file = str(tmp_path / "password") if content is None else _file(tmp_path, content)
    with pytest.raises(InvalidArgument, match=sentence) as raised:
        read_redis({"REDIS_URL": url, "GPTLOOP_REDIS_PASSWORD_FILE": file}, Directories(tmp_path))
    message = str(raised.value)
    assert "GPTLOOP_REDIS_PASSWORD_FILE" in message and "secret" not in message and "hidden" not in message


def test_certificates_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair, other = authority.issue("client"), authority.issue("other")
    empty = tmp_path / "empty"
    empty.touch()

    def read(scheme: str = "rediss", **files: Path) -> None:
        options = "&".join(f"ssl_{name}={quote(str(path))}" for name, path in files.items())
        read_redis({"REDIS_URL": f"{scheme}://u@h?{options}"}, Directories(tmp_path))

    read(ca_certs=authority.file, certfile=pair.certificate, keyfile=pair.key)
    for sentence, call in {
        "needs rediss://": lambda: read("redis", ca_certs=authority.file),
        "ssl_ca_certs=.* cannot be read: No such file": lambda: read(ca_certs=tmp_path / "none"),
        "ssl_ca_certs=.* has no certificate": lambda: read(ca_certs=empty),
        "but no ssl_certfile": lambda: read(keyfile=pair.key),
        "not a certificate with its key": lambda: read(certfile=pair.certificate, keyfile=other.key),
    }.items():
        with pytest.raises(InvalidArgument, match=f"^REDIS_URL has .*{sentence}"):
            call()


def _configure(redis: Redis, **values: str | int) -> None:
    for name, value in values.items():
        redis.config_set(name.replace("_", "-"), value)


@pytest.fixture
def tight(admin: Redis) -> Iterator[Redis]:
    """A server whose bound on memory a test sets."""
    yield admin
    _configure(admin, maxmemory=0, maxmemory_policy="noeviction")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_removes_keys_cannot_hold_jobs(tight: Redis, policy: str) -> None:
    _configure(tight, maxmemory="1gb", maxmemory_policy=policy)
    with pytest.raises(FailedPrecondition, match=rf"maxmemory-policy {policy}.*noeviction"):
        check_server(tight)


def test_a_server_that_removes_nothing_can_hold_jobs(tight: Redis) -> None:
    _configure(tight, maxmemory="1gb")
    check_server(tight)
    _configure(tight, maxmemory=0, maxmemory_policy="allkeys-lru")
    check_server(tight)


def test_a_server_that_is_too_old_cannot_hold_jobs(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis, "info", lambda section: {"redis_version": "6.0.16"})
    with pytest.raises(FailedPrecondition, match=r"Redis is 6\.0, but must be 6\.2 or newer"):
        check_server(redis)


def test_a_full_server_is_called_full(tmp_path: Path, tight: Redis) -> None:
    queue = JobQueue(tight, "none")
    _configure(tight, maxmemory=1)
    with pytest.raises(Unavailable, match="Redis is out of memory: raise its maxmemory"):
        queue.enqueue(TrainRequest().resolve(disk_registry(tmp_path)))


def test_each_failure_has_a_sentence_of_its_own(admin: Redis) -> None:
    admin.set("text", "x")
    with pytest.raises(ResponseError) as refused:
        pipeline = admin.pipeline()
        pipeline.hset("text", "field", "long " * 1000)
        pipeline.execute()
    sentences = {
        str(redis_failure(error))
        for error in (
            refused.value,
            RedisConnectionError("Error 111 connecting to host:1. Connection refused."),
            AuthenticationError("invalid username-password pair or user is disabled."),
            BusyLoadingError("Redis is loading the dataset in memory"),
            ReadOnlyError("You can't write against a read only replica."),
            RedisTimeoutError("Timeout reading from socket"),
            OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        )
    }
    assert len(sentences) == 7
    assert all(len(sentence) <= 300 for sentence in sentences)
    assert [sentence for sentence in sentences if "gptloop up" in sentence] == [
        "Redis does not answer (Error 111 connecting to host:1. Connection refused). Start everything with "
        "`gptloop up`, or correct REDIS_URL."
    ]
    assert "Redis refuses a command: WRONGTYPE Operation against a key holding the wrong kind of value." in sentences
