"""Two state folders on one Redis: neither sees, takes or counts what is the other's."""

from pathlib import Path

import pytest
from redis import Redis
from rq.serializers import JSONSerializer

from shared.errors import NotFound
from shared.registry.identity import registry_id
from tests.jobs import finish, start, training
from trainer_service.jobs.events import JobState
from trainer_service.jobs.kinds import Kind
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.rq_adapter import AttemptJob
from trainer_service.jobs.watch import Watch
from trainer_service.jobs.worker import TrainingWorker
from trainer_service.metrics import make_metrics


@pytest.fixture
def queues(redis: Redis, tmp_path: Path) -> tuple[JobQueue, JobQueue]:
    mine, yours = (JobQueue(redis, registry_id(tmp_path / name / "registry")) for name in ("mine", "yours"))
    return mine, yours


class Idle(TrainingWorker):
    """A worker that only notes which jobs it was given."""

    taken: list[str]

    def execute_job(self, job: object, queue: object) -> None:
        self.taken.append(job.args[0])  # type: ignore[attr-defined]


def test_a_worker_takes_the_jobs_of_its_own_folder_only(
    queues: tuple[JobQueue, JobQueue], redis: Redis, tmp_path: Path
) -> None:
    mine, yours = queues
    jobs = [mine.enqueue(Kind.TRAIN, training(tmp_path)).id for _ in range(2)]
    other = yours.enqueue(Kind.TRAIN, training(tmp_path)).id
    worker = Idle([mine.line.rq], connection=redis, serializer=JSONSerializer, job_class=AttemptJob)
    worker.taken = []
    worker.work(burst=True, logging_level="WARNING")
    assert worker.taken == jobs
    assert mine.line.attempts() == [] and yours.line.attempts() == [(other, 1)]


def test_lists_figures_and_leases_are_of_one_folder(queues: tuple[JobQueue, JobQueue], tmp_path: Path) -> None:
    mine, yours = queues
    job = mine.enqueue(Kind.TRAIN, training(tmp_path, name="wide")).id
    assert [record.id for record in mine.jobs()] == [job] and list(yours.jobs()) == []
    for call in (yours.get, yours.cancel):
        with pytest.raises(NotFound):
            call(job)
    # The same name is free in the other registry.
    assert yours.enqueue(Kind.TRAIN, training(tmp_path, name="wide")).ahead == 0
    mine.renew_worker_lease("a")
    start(mine, job)
    mine.tell(job, 1, [], new_tokens=7)
    assert (mine.live_workers(), mine.tokens(), mine.waiting()) == (1, 7, 0)
    assert (yours.live_workers(), yours.tokens(), yours.waiting()) == (0, 0, 1)
    assert Watch(yours, lambda: 0.0).look() == set()
    states = [make_metrics(queue).get_sample_value("gptloop_training_jobs", {"state": "running"}) for queue in queues]
    assert states == [1, 0]
    finish(mine, job)
    assert mine.get(job).state is JobState.FINISHED


def test_every_name_in_redis_carries_its_registry(
    queues: tuple[JobQueue, JobQueue], redis: Redis, tmp_path: Path
) -> None:
    mine, _ = queues
    job = mine.enqueue(Kind.TRAIN, training(tmp_path)).id
    mine.renew_worker_lease("a")
    mine.renew_job_lease(job, 1)
    mine.tell(job, 1, [], new_tokens=7)
    # RQ's list of all queues names them.
    names = {key.decode() for key in redis.scan_iter()} - {"rq:queues"}
    assert len(names) > 6 and all(mine.registry in name for name in names)
