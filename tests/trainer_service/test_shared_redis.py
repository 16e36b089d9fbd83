"""Two state folders on one Redis: neither sees, takes or counts what is the other's."""

import os
import sys
from pathlib import Path

import pytest
from redis import Redis

from shared.errors import NotFound
from tests.jobs import finish, start, training
from tests.registries import disk_registry, registry_id
from trainer_service.jobs.events import JobState
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.rq_adapter import AttemptWorker
from trainer_service.jobs.watch import Watch
from trainer_service.metrics import make_metrics


@pytest.fixture
def queues(redis: Redis, tmp_path: Path) -> tuple[JobQueue, JobQueue]:
    mine, yours = (JobQueue(redis, registry_id(tmp_path / name / "registry")) for name in ("mine", "yours"))
    return mine, yours


class Idle:
    """Notes the attempts that it is given, and runs a process that does nothing."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self.taken: list[str] = []

    def take(self) -> tuple[str, int] | None:
        return self._queue.take(Offer())

    def start(self, job_id: str, attempt: int) -> int:
        self.taken.append(job_id)
        return os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ, setpgroup=0)

    def request_stop(self) -> None:
        pass

    def on_exit(self) -> None:
        pass

    def on_crash(self, job_id: str, attempt: int, exit_code: int) -> None:
        raise AssertionError(f"The process of {job_id} ended with exit code {exit_code}.")


def test_a_worker_takes_the_jobs_of_its_own_folder_only(
    queues: tuple[JobQueue, JobQueue], redis: Redis, tmp_path: Path
) -> None:
    mine, yours = queues
    jobs = [mine.enqueue(training(tmp_path)).id for _ in range(2)]
    other = yours.enqueue(training(tmp_path)).id
    runner = Idle(mine)
    AttemptWorker(mine.attempts, redis, runner).work(burst=True, logging_level="WARNING")
    assert runner.taken == jobs
    assert mine.attempts.waiting() == [] and yours.attempts.waiting() == [(other, 1)]


def test_lists_figures_and_leases_are_of_one_folder(queues: tuple[JobQueue, JobQueue], tmp_path: Path) -> None:
    mine, yours = queues
    job = mine.enqueue(training(tmp_path, name="wide")).id
    assert [record.id for record in mine.store.jobs()] == [job] and list(yours.store.jobs()) == []
    for call in (yours.store.get, yours.cancel):
        with pytest.raises(NotFound):
            call(job)
    # The same name is free in the other registry.
    assert yours.enqueue(training(tmp_path, name="wide")).ahead == 0
    mine.store.workers.renew("a", Offer())
    start(mine, job)
    mine.store.report(job, 1, [], new_tokens=7)
    assert (mine.store.workers.count(), mine.store.tokens(), len(mine.store.waiting())) == (1, 7, 0)
    assert (yours.store.workers.count(), yours.store.tokens(), len(yours.store.waiting())) == (0, 0, 1)
    assert Watch(yours, lambda: 0.0).look() == set()
    pages = [make_metrics(queue, disk_registry(tmp_path / "registry")) for queue in queues]
    states = [page.get_sample_value("gptloop_training_jobs", {"state": "running"}) for page in pages]
    assert states == [1, 0]
    finish(mine, job)
    assert mine.store.get(job).state is JobState.FINISHED


def test_every_name_in_redis_carries_its_registry(
    queues: tuple[JobQueue, JobQueue], admin: Redis, tmp_path: Path
) -> None:
    mine, _ = queues
    job = mine.enqueue(training(tmp_path)).id
    mine.store.workers.renew("a", Offer())
    mine.store.renew_attempt(job, 1)
    mine.store.report(job, 1, [], new_tokens=7)
    # RQ's list of all queues names them.
    names = {key.decode() for key in admin.scan_iter()} - {"rq:queues"}
    assert len(names) > 6 and all(mine.registry in name for name in names)
