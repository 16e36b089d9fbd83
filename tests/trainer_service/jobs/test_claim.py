import threading
from pathlib import Path

import pytest
from redis import Redis

from shared.errors import FailedPrecondition, NotFound
from tests.jobs import finish, start, training
from tests.redis_process import RedisServer
from trainer_service.jobs import claim, watch
from trainer_service.jobs.claim import claim_when_due
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue


def test_a_claimed_attempt_has_its_lease_and_waits_for_no_worker(queue: JobQueue, admin: Redis, job: str) -> None:
    assert queue.claim(job) == 1
    assert queue.attempts.waiting() == [] and queue.store.get(job).is_held
    assert list(admin.scan_iter("rq:job:*")) == []
    assert queue.claim(job) is None


def test_the_next_attempt_can_be_claimed_when_the_one_before_is_lost(queue: JobQueue, job: str) -> None:
    assert queue.claim(job) == 1
    start(queue, job)
    queue.lose(job, 1, "It crashed")
    assert queue.claim(job) == 2


def test_a_job_that_waits_for_others_cannot_be_claimed(queue: JobQueue, job: str, tmp_path: Path) -> None:
    later = queue.enqueue(training(tmp_path), after=[job]).id
    assert queue.claim(later) is None
    with pytest.raises(NotFound):
        queue.claim("none")


def test_a_job_that_has_ended_cannot_be_claimed(queue: JobQueue, job: str) -> None:
    start(queue, job)
    finish(queue, job)
    with pytest.raises(FailedPrecondition, match=f"The job {job} is finished already"):
        queue.claim(job)


def test_of_many_that_race_for_attempts_one_gets_each(
    redis_server: RedisServer, queue: JobQueue, tmp_path: Path
) -> None:
    jobs = [queue.enqueue(training(tmp_path)).id for _ in range(6)]
    taken: list[str] = []

    def race(barrier: threading.Barrier) -> None:
        with redis_server.connect() as connection:
            own = JobQueue(connection, queue.registry)
            barrier.wait()
            for job in jobs:
                if own.claim(job) == 1:
                    taken.append(job)

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=race, args=(barrier,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(jobs)
    assert queue.attempts.waiting() == []


def test_whoever_waits_for_a_job_notices_that_its_last_attempt_is_lost(
    queue: JobQueue, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker is alive, and the process of the first attempt is gone."""
    monkeypatch.setattr(claim, "_INTERVAL_S", 0.05)
    monkeypatch.setattr(watch, "GRACE_S", 0.1)
    start(queue, job)
    assert not queue.store.get(job).is_held
    assert claim_when_due(queue, job, lambda: False) == 2
    assert queue.store.get(job).state is JobState.QUEUED


def test_a_stop_ends_the_wait_for_a_job(queue: JobQueue, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_INTERVAL_S", 0.0)
    assert queue.claim(job) == 1
    turns = iter([False, False, True])
    assert claim_when_due(queue, job, lambda: next(turns)) is None
