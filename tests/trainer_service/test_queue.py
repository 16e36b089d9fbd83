import time
from pathlib import Path

import pytest
from redis import Redis

from shared.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shared.registry.store import Registry
from tests.events import PROGRESS, STARTED
from trainer_service.events import (
    Evaluation,
    JobState,
    Notice,
    Preparation,
    StateChanged,
    TimedEvent,
    VersionPublished,
)
from trainer_service.queue import JobQueue
from trainer_service.redis_server import connect
from trainer_service.reporter import Reporter
from trainer_service.settings import TrainerSettings
from trainer_service.spec import JobSpec, TrainingRequest, parse_overrides, resolve


def spec(tmp_path: Path) -> JobSpec:
    return resolve(TrainingRequest(overrides={"max_steps": "7"}), Registry(tmp_path / "registry"))


def test_a_job_can_be_read_back_as_it_was_put_on_the_queue(queue: JobQueue, tmp_path: Path) -> None:
    wanted = spec(tmp_path)
    record = queue.enqueue(wanted)
    assert record.spec == wanted
    assert record.state is JobState.QUEUED and not record.is_held
    assert (record.started_at, record.ended_at, record.progress, record.failure) == (None, None, None, "")
    assert queue.waiting() == 1
    assert [timed.event for _, timed in queue.read_events(record.id)] == [StateChanged(JobState.QUEUED)]


def test_jobs_are_listed_newest_first_and_by_state(queue: JobQueue, tmp_path: Path) -> None:
    first, second, third = (queue.enqueue(spec(tmp_path)).id for _ in range(3))
    queue.tell(second, [TimedEvent(StateChanged(JobState.RUNNING))])
    assert [record.id for record in queue.jobs()] == [third, second, first]
    assert [record.id for record in queue.jobs([JobState.QUEUED])] == [third, first]


@pytest.mark.parametrize(
    "event",
    [
        StateChanged(JobState.FAILED, "why"),
        Preparation("reading", 0.5),
        Preparation("reading"),
        STARTED,
        PROGRESS,
        Evaluation(1, 2.0, 3.0, 1.1),
        VersionPublished(1, 2, 3.0, 1.1, True),
        Notice("überfitting"),
    ],
)
def test_every_event_survives_redis(queue: JobQueue, tmp_path: Path, event: object) -> None:
    job = queue.enqueue(spec(tmp_path)).id
    told = TimedEvent(event, time=12.5)  # type: ignore[arg-type]
    queue.tell(job, [told])
    assert queue.read_events(job)[-1][1] == told


def test_what_a_job_tells_is_what_its_record_says(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.enqueue(spec(tmp_path)).id
    queue.tell(job, [TimedEvent(StateChanged(JobState.RUNNING), 1.0), TimedEvent(PROGRESS)])
    queue.tell(job, [TimedEvent(StateChanged(JobState.QUEUED)), TimedEvent(StateChanged(JobState.RUNNING), 2.0)])
    queue.tell(job, [TimedEvent(Evaluation(3, 2.0, 3.0, 1.1)), TimedEvent(StateChanged(JobState.FAILED, "no"), 3.0)])
    record = queue.get(job)
    assert (record.started_at, record.ended_at, record.state, record.failure) == (1.0, 3.0, JobState.FAILED, "no")
    assert record.progress == PROGRESS and record.evaluation == Evaluation(3, 2.0, 3.0, 1.1)


def test_a_queued_job_that_is_cancelled_never_starts(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.enqueue(spec(tmp_path)).id
    assert queue.cancel(job).state is JobState.CANCELLED
    assert queue.waiting() == 0
    with pytest.raises(FailedPrecondition, match="cancelled already"):
        queue.cancel(job)


def test_a_running_job_is_asked_to_end(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.enqueue(spec(tmp_path)).id
    queue.rq.remove(job)
    queue.tell(job, [TimedEvent(StateChanged(JobState.RUNNING))])
    assert not queue.cancel_requested(job)
    assert queue.cancel(job).state is JobState.CANCELLING
    assert queue.cancel_requested(job)


def test_an_unknown_job_is_not_found(queue: JobQueue) -> None:
    with pytest.raises(NotFound, match="no job 'x'"):
        queue.get("x")


def test_workers_and_holders_are_known_while_they_renew_their_leases(
    queue: JobQueue, redis: Redis, tmp_path: Path
) -> None:
    job = queue.enqueue(spec(tmp_path)).id
    queue.renew_worker_lease("a")
    queue.renew_job_lease(job)
    assert queue.live_workers() == 1 and queue.get(job).is_held
    assert 0 < int(str(redis.ttl("gptloop:worker:a"))) <= 15
    queue.end_worker_lease("a")
    queue.end_job_lease(job)
    assert queue.live_workers() == 0 and not queue.get(job).is_held


def test_without_redis_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    queue = JobQueue(connect(f"unix://{tmp_path}/none.sock"))
    with pytest.raises(Unavailable, match="make up"):
        queue.jobs()


def test_the_reporter_tells_everything_counts_new_tokens_and_keeps_the_lease(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.enqueue(spec(tmp_path)).id
    reporter = Reporter(queue, job)
    reporter.tell(STARTED)
    reporter.tell(PROGRESS)
    deadline_s = time.monotonic() + 10
    while not queue.get(job).is_held:
        assert time.monotonic() < deadline_s
    queue.rq.remove(job)
    queue.cancel(job)
    while not reporter.cancelled:
        assert time.monotonic() < deadline_s
    reporter.close()
    assert queue.tokens() == PROGRESS.tokens - STARTED.first_tokens == 200
    assert [timed.event for _, timed in queue.read_events(job)][-2:] == [PROGRESS, StateChanged(JobState.CANCELLING)]
    assert not queue.get(job).is_held


def test_overrides_are_read_from_one_line() -> None:
    assert parse_overrides(" max_steps=5  seed=1 ") == {"max_steps": "5", "seed": "1"}
    for wrong in ("max_steps", "=5", "max_steps="):
        with pytest.raises(InvalidArgument, match="is no override"):
            parse_overrides(wrong)


def test_only_a_whole_job_can_be_understood(settings: TrainerSettings) -> None:
    whole = resolve(TrainingRequest(), Registry(settings.directories.registry)).to_json()
    assert JobSpec.from_json(whole).to_json() == whole
    for text in ("", "[]", "{}", whole.replace('"max_steps"', '"steps"')):
        with pytest.raises(InvalidArgument):
            JobSpec.from_json(text)


def test_what_cannot_be_trained_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(NotFound, match="still empty"):
        resolve(TrainingRequest(resume=3), registry)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        resolve(TrainingRequest(dataset=(str(tmp_path / "absent.txt"),)), registry)
