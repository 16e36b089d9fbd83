import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast
from urllib.parse import quote

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rq.job import JobStatus

from shared.errors import FailedPrecondition, StoreFailed, Unavailable
from shared.registry.store import Store
from tests.jobs import training
from tests.redis_process import PROJECT, RedisServer
from tests.registries import registry_id
from tests.waiting import HANG_S, wait_until
from trainer_service.jobs.job_store import LEASE_S
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.rq_adapter import AttemptWorker
from trainer_service.jobs.watch import AttemptName, Watch
from trainer_service.jobs.worker import AttemptRunner, _check_registry, work
from trainer_service.redis_client import RedisAddress, check_server, connect
from trainer_service.redis_server import find_redis_server
from trainer_service.settings import TrainerSettings

pytestmark = pytest.mark.slow

ALWAYS = threading.Event()
ALWAYS.set()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """RQ's worker takes over signals, and keeps them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_worker_takes_jobs_from_a_socket_with_any_name(tmp_path: Path) -> None:
    socket = tmp_path / """sp ace = %d 'two' ü.sock"""
    program, _ = find_redis_server()
    server = subprocess.Popen([program, "--port", "0", "--unixsocket", socket, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        with connect(RedisAddress(f"unix://{quote(str(socket))}")) as connection:
            deadline_s = time.monotonic() + HANG_S
            while True:
                try:
                    connection.ping()
                    break
                except RedisConnectionError:
                    assert server.poll() is None
                    assert time.monotonic() < deadline_s
            check_server(connection)
            queue = JobQueue(connection, "none")
            worker = AttemptWorker(queue.attempts, connection, AttemptRunner(queue, Offer(), ALWAYS))
            assert worker.work(burst=True) is False
    finally:
        server.kill()
        server.wait()


def test_a_worker_says_that_redis_is_full(admin: Redis, settings: TrainerSettings, redis_server: RedisServer) -> None:
    admin.config_set("maxmemory", 1)
    try:
        with pytest.raises(Unavailable, match="Redis is out of memory"):
            work(replace(settings, redis=redis_server.address))
    finally:
        admin.config_set("maxmemory", 0)


def test_a_worker_does_not_work_for_a_redis_that_removes_jobs(
    admin: Redis, settings: TrainerSettings, redis_server: RedisServer
) -> None:
    admin.config_set("maxmemory", "1gb")
    admin.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(FailedPrecondition, match="noeviction"):
            work(replace(settings, redis=redis_server.address))
    finally:
        admin.config_set("maxmemory", 0)
        admin.config_set("maxmemory-policy", "noeviction")


def test_a_worker_ends_if_another_registry_replaces_its_own(mortal_redis: RedisServer, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    queue = JobQueue(mortal_redis.connect(), registry_id(root))
    environment = os.environ | {"GPTLOOP_VAR": str(tmp_path), "REDIS_URL": mortal_redis.url}
    worker = subprocess.Popen([sys.executable, "-m", "trainer_service", "work"], env=environment, cwd=PROJECT)
    try:
        wait_until(lambda: queue.store.workers.count() == 1)
        # At once, as the worker may be writing there.
        root.rename(tmp_path / "before")
        assert registry_id(root) != queue.registry
        assert worker.wait(60) == 0
        assert queue.store.workers.count() == 0
    finally:
        worker.kill()
        worker.wait()


def test_a_wait_for_an_attempt_is_not_cut_off_on_a_connection_that_was_open_before(redis_server: RedisServer) -> None:
    with connect(redis_server.address) as connection:
        check_server(connection)
        queue = JobQueue(connection, "none")
        worker = AttemptWorker(queue.attempts, connection, AttemptRunner(queue, Offer(), ALWAYS))
        taken = connection.connection_pool.get_connection()
        assert taken.socket_timeout > worker.dequeue_timeout
        connection.connection_pool.release(taken)


@pytest.mark.parametrize("foreign", [b"\xff", b"a/b", b"", b"x" * 300])
def test_a_worker_drops_what_is_no_attempt_from_its_queue_and_takes_the_next_one(
    redis: Redis, admin: Redis, queue: JobQueue, job: str, foreign: bytes
) -> None:
    taken = []

    class Taker(AttemptRunner):
        def start(self, job_id: str, attempt: int) -> int:
            taken.append(job_id)
            return os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)

    admin.lpush(queue.attempts.key, foreign)
    admin.lpush(f"{queue.attempts.key}:intermediate", foreign)
    worker = AttemptWorker(queue.attempts, redis, Taker(queue, Offer(), ALWAYS))
    assert worker.work(burst=True) is True
    assert taken == [job]
    assert admin.lrange(queue.attempts.key, 0, -1) == []


class AwayStore:
    """A store whose place is away, comes back, fails in another way, and is away for good."""

    address = "nowhere"

    def __init__(self, has_registry: threading.Event) -> None:
        self._answers: list[str | Exception] = ["mine", StoreFailed("It is away."), "mine", FileNotFoundError("id")]
        self._has_registry = has_registry
        # What the worker knew at each look, by the one before it.
        self.known: list[bool] = []

    def id(self) -> str:
        self.known.append(self._has_registry.is_set())
        answer = self._answers.pop(0) if self._answers else StoreFailed("It is away for good.")
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_worker_takes_no_job_while_its_registry_is_away(
    queue: JobQueue, job: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer_service.jobs.worker._WATCH_INTERVAL_S", 0.01)
    has_registry, ended = threading.Event(), threading.Event()
    has_registry.set()
    store = AwayStore(has_registry)
    with caplog.at_level("INFO", "trainer_service.jobs.worker"):
        check = threading.Thread(
            target=_check_registry, args=(cast(Store, store), "mine", has_registry, ended), daemon=True
        )
        check.start()
        wait_until(lambda: "away for good" in caplog.text)
    runner = AttemptRunner(queue, Offer(), has_registry)
    assert runner.take() is None
    ended.set()
    check.join()
    assert store.known[:5] == [True, True, False, True, False]
    has_registry.set()
    assert runner.take() == (job, 1)
    assert caplog.messages == [
        "the worker takes no job: It is away.",
        "the worker takes jobs again",
        "the worker takes no job: id",
        "the worker takes no job: It is away for good.",
    ]


class Sleeper(AttemptRunner):
    """Notes what it takes, and starts processes that end at once."""

    def __init__(self, queue: JobQueue, offer: Offer) -> None:
        super().__init__(queue, offer, ALWAYS)
        self.taken: list[str] = []

    def start(self, job_id: str, attempt: int) -> int:
        self.taken.append(job_id)
        return os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ, setpgroup=0)


def test_a_job_that_a_worker_cannot_do_does_not_block_those_behind_it(
    redis: Redis, queue: JobQueue, tmp_path: Path
) -> None:
    jobs = [queue.enqueue(training(tmp_path, needs=needs)).id for needs in ("gpu", "", "gpu", "")]
    small, large = Sleeper(queue, Offer()), Sleeper(queue, Offer(gpus=1))
    AttemptWorker(queue.attempts, redis, small).work(burst=True)
    assert small.taken == [jobs[1], jobs[3]]
    assert queue.attempts.waiting() == [(jobs[0], 1), (jobs[2], 1)]
    AttemptWorker(queue.attempts, redis, large).work(burst=True)
    assert large.taken == [jobs[0], jobs[2]]


def test_every_waiting_worker_looks_when_an_attempt_is_handed_over(
    redis_server: RedisServer, redis: Redis, queue: JobQueue, tmp_path: Path
) -> None:
    """The first one that a single wake-up would reach may be unable to do it."""
    woken: list[str] = []

    def wait() -> None:
        with redis_server.connect() as connection:
            woken.append(JobQueue(connection, queue.registry).attempts.wait("0", HANG_S))

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    queue.enqueue(training(tmp_path))
    for waiter in waiters:
        waiter.join()
    assert len(set(woken)) == 1
    # What was handed over before is not waited for, and what follows is.
    assert queue.attempts.wait(woken[0], 0.001) == woken[0]
    queue.enqueue(training(tmp_path))
    assert queue.attempts.wait(woken[0], HANG_S) != woken[0]


def test_a_worker_that_is_asked_to_stop_forgets_no_attempt(redis: Redis, queue: JobQueue, job: str) -> None:
    """The signal comes when the attempt was taken and its process has not started."""

    class Stopped(Sleeper):
        def take(self) -> AttemptName | None:
            taken = super().take()
            os.kill(os.getpid(), signal.SIGTERM)
            return taken

    runner = Stopped(queue, Offer())
    AttemptWorker(queue.attempts, redis, runner).work()
    assert runner.taken == [job]


def test_an_attempt_whose_worker_dies_before_its_process_starts_is_followed_by_another(
    queue: JobQueue, admin: Redis, job: str
) -> None:
    clock = 0.0
    watch = Watch(queue, lambda: clock)
    assert queue.take(Offer()) == (job, 1)
    assert watch.look() == set()
    for clock in (1.0, 3.0, 5.0, 7.0, LEASE_S + 1.9):  # noqa: B007 - the watch reads it
        assert watch.look() == set()
    clock = LEASE_S + 2.1
    assert watch.look() == {(job, 1)}
    assert queue.take(Offer()) == (job, 2)


def test_a_state_that_rq_does_not_know_counts_as_started(admin: Redis, queue: JobQueue, job: str) -> None:
    (attempt,) = queue.attempts.rq.jobs
    admin.hset(attempt.key, "status", "asleep")
    assert attempt.get_status() is JobStatus.STARTED


def test_a_worker_works_although_the_registries_of_rq_contain_something_foreign(
    redis: Redis, admin: Redis, queue: JobQueue, job: str
) -> None:
    admin.zadd(queue.attempts.rq.started_job_registry.key, {b"\xff": 1})
    worker = AttemptWorker(queue.attempts, redis, AttemptRunner(queue, Offer(), ALWAYS))
    worker.run_maintenance_tasks()
    assert not worker.should_run_maintenance_tasks
