import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue
from rq.exceptions import NoSuchJobError
from rq.serializers import JSONSerializer

from shared.errors import FailedPrecondition, NotFound, Unavailable
from tests.events import PROGRESS, STARTED
from tests.jobs import events_of, preparation, start, training
from tests.redis_process import RedisServer
from trainer_service.jobs.events import (
    Evaluation,
    JobState,
    Notice,
    Preparation,
    StateChanged,
    TimedEvent,
    VersionPublished,
)
from trainer_service.jobs.job_store import LEASE_S
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import BACKOFF_S, JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.rq_adapter import JOB_FUNCTION, AttemptJob
from trainer_service.jobs.specs import EvaluateSpec, Kind, StoriesSpec, TrainSpec
from trainer_service.redis_client import RedisAddress, connect
from trainer_service.text.corpus import DatasetSpec


def test_a_job_can_be_read_back_as_it_was_put_on_the_queue(queue: JobQueue, tmp_path: Path) -> None:
    wanted = training(tmp_path)
    record = queue.enqueue(wanted)
    assert record.spec == wanted and record.kind is Kind.TRAIN
    assert (record.state, record.attempt, record.is_held) == (JobState.QUEUED, 1, False)
    assert (record.started_at, record.ended_at, record.progress, record.reason) == (None, None, None, "")
    assert len(queue.store.waiting()) == 1 and queue.attempts.waiting() == [(record.id, 1)]
    assert events_of(queue, record.id) == [StateChanged(JobState.QUEUED)]


def test_jobs_are_listed_newest_first_by_state_kind_and_age(queue: JobQueue, tmp_path: Path) -> None:
    first, second, third = (queue.enqueue(training(tmp_path)) for _ in range(3))
    measured = queue.enqueue(EvaluateSpec("3", DatasetSpec(())))
    start(queue, second.id)

    def ids(records: Iterable[JobRecord]) -> list[str]:
        return [record.id for record in records]

    assert ids(queue.store.jobs()) == [measured.id, third.id, second.id, first.id]
    assert ids(queue.store.jobs([JobState.QUEUED], [Kind.TRAIN])) == [third.id, first.id]
    assert ids(queue.store.jobs(before=third.ticket)) == [second.id, first.id]
    assert queue.store.get(measured.id).spec == EvaluateSpec("3", DatasetSpec(()))


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
def test_every_event_survives_redis(queue: JobQueue, job: str, event: object) -> None:
    timed = TimedEvent(event, time=12.5)  # type: ignore[arg-type]
    assert queue.store.report(job, 1, [timed])
    assert queue.store.read_events(job)[-1][1] == timed


def test_the_events_of_a_job_change_its_record(queue: JobQueue, job: str) -> None:
    for events in (
        [TimedEvent(StateChanged(JobState.RUNNING), 1.0), TimedEvent(PROGRESS)],
        [TimedEvent(StateChanged(JobState.QUEUED)), TimedEvent(StateChanged(JobState.RUNNING), 2.0)],
        [TimedEvent(Evaluation(3, 2.0, 3.0, 1.1)), TimedEvent(StateChanged(JobState.FAILED, "no"), 3.0)],
    ):
        queue.store.report(job, 1, events)
    record = queue.store.get(job)
    assert (record.started_at, record.ended_at, record.state, record.reason) == (1.0, 3.0, JobState.FAILED, "no")
    assert record.progress == PROGRESS and record.evaluation == Evaluation(3, 2.0, 3.0, 1.1)


def test_a_waiting_job_that_is_cancelled_never_starts(queue: JobQueue, job: str) -> None:
    assert queue.cancel(job).state is JobState.CANCELLED
    assert len(queue.store.waiting()) == 0 and queue.attempts.waiting() == []
    assert not queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.RUNNING))])
    with pytest.raises(FailedPrecondition, match="cancelled already"):
        queue.cancel(job)


def test_a_running_job_is_asked_to_end(queue: JobQueue, job: str) -> None:
    start(queue, job)
    assert not queue.store.cancel_requested(job)
    assert queue.cancel(job).state is JobState.CANCELLING
    assert queue.store.cancel_requested(job)


def test_a_cancelled_job_whose_process_is_gone_has_ended(queue: JobQueue, job: str) -> None:
    start(queue, job)
    queue.cancel(job)
    assert queue.lose(job, 1, "The process is gone")
    assert queue.store.get(job).state is JobState.CANCELLED and queue.attempts.waiting() == []


def test_an_interrupted_attempt_is_followed_by_another(queue: JobQueue, job: str) -> None:
    start(queue, job)
    assert queue.give_back(job, 1)
    record = queue.store.get(job)
    assert (record.state, record.attempt, record.reason) == (
        JobState.QUEUED,
        2,
        "The worker was stopped; the job resumes when a worker is back.",
    )
    assert queue.attempts.waiting() == [(job, 2)]


EVALUATED = Evaluation(3, 2.0, 1.9, 0.9)


@pytest.fixture
def suspended(queue: JobQueue, tmp_path: Path) -> JobRecord:
    """A job that waits at step 3."""
    job = queue.enqueue(replace(training(tmp_path), until=3)).id
    start(queue, job)
    assert queue.suspend(job, 1, EVALUATED)
    return queue.store.get(job)


def test_a_job_that_has_come_to_its_step_waits_until_it_is_extended(queue: JobQueue, suspended: JobRecord) -> None:
    assert (suspended.state, suspended.is_suspended, suspended.attempt) == (JobState.QUEUED, True, 2)
    assert (suspended.reason, suspended.evaluation) == ("Waits at step 3.", EVALUATED)
    assert queue.attempts.waiting() == [] and not suspended.is_ready
    queue.extend(suspended, 6)
    # A second process that saw the same changes nothing.
    queue.extend(suspended, 7)
    record = queue.store.get(suspended.id)
    assert isinstance(record.spec, TrainSpec) and record.spec.until == 6
    assert (record.state, record.is_suspended, record.attempt) == (JobState.QUEUED, False, 2)
    assert queue.attempts.waiting() == [(suspended.id, 2)]


def test_a_job_waits_again_at_the_step_to_which_it_was_extended(queue: JobQueue, suspended: JobRecord) -> None:
    queue.extend(suspended, 6)
    start(queue, suspended.id, 2)
    assert queue.suspend(suspended.id, 2, replace(EVALUATED, step=6))
    # What was seen at step 3 extends nothing any more.
    queue.extend(suspended, 7)
    record = queue.store.get(suspended.id)
    assert (record.is_suspended, record.attempt) == (True, 3) and queue.attempts.waiting() == []


def test_a_job_that_waits_at_its_step_can_be_stopped_there_with_a_reason(queue: JobQueue, suspended: JobRecord) -> None:
    queue.stop(suspended, "Others are better.")
    record = queue.store.get(suspended.id)
    assert (record.state, record.is_suspended) == (JobState.CANCELLED, False)
    assert record.reason == "Others are better."
    queue.extend(suspended, 6)
    assert queue.store.get(suspended.id).state is JobState.CANCELLED and queue.attempts.waiting() == []


def test_a_job_that_goes_on_or_has_ended_is_not_stopped(queue: JobQueue, suspended: JobRecord) -> None:
    queue.extend(suspended, 6)
    queue.stop(suspended, "Others are better.")
    assert queue.store.get(suspended.id).state is JobState.QUEUED and queue.attempts.waiting() == [(suspended.id, 2)]
    start(queue, suspended.id, 2)
    queue.stop(suspended, "Others are better.")
    assert queue.store.get(suspended.id).state is JobState.RUNNING
    assert queue.suspend(suspended.id, 2, replace(EVALUATED, step=6))
    queue.stop(suspended, "Others are better.")
    assert queue.store.get(suspended.id).is_suspended
    queue.cancel(suspended.id)
    queue.stop(suspended, "Others are better.")
    assert queue.store.get(suspended.id).reason == ""


def test_a_job_that_is_cancelled_as_it_comes_to_its_step_has_ended(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.enqueue(replace(training(tmp_path), until=3)).id
    start(queue, job)
    queue.cancel(job)
    assert queue.suspend(job, 1, EVALUATED)
    assert queue.store.get(job).state is JobState.CANCELLED


def test_an_evaluation_is_reported_once_also_if_its_own_event_was_lost(queue: JobQueue, tmp_path: Path) -> None:
    for told in ([], [EVALUATED]):
        job = queue.enqueue(replace(training(tmp_path), until=3)).id
        start(queue, job)
        assert queue.store.report(job, 1, [TimedEvent(each) for each in told])
        assert queue.suspend(job, 1, EVALUATED)
        assert events_of(queue, job).count(EVALUATED) == 1


def test_an_earlier_attempt_changes_nothing(queue: JobQueue, job: str) -> None:
    start(queue, job)
    queue.lose(job, 1, "The worker is gone")
    start(queue, job, 2)
    before = queue.store.get(job), events_of(queue, job)
    assert not queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))], new_tokens=5)
    assert not queue.give_back(job, 1) and not queue.lose(job, 1, "late")
    assert not queue.store.is_current(job, 1) and queue.store.is_current(job, 2)
    assert (queue.store.get(job), events_of(queue, job)) == before and queue.store.tokens() == 0


def test_a_run_that_gets_further_may_crash_again(queue: JobQueue, redis: Redis, job: str) -> None:
    for attempt in range(1, 3 * len(BACKOFF_S)):
        start(queue, job, attempt)
        queue.store.report(job, attempt, [TimedEvent(replace(STARTED, first_step=10 * attempt))])
        queue.lose(job, attempt, "It crashed")
        assert queue.store.get(job).state is JobState.QUEUED and queue.attempts.waiting() == [(job, attempt + 1)]


@pytest.mark.parametrize(
    "foreign",
    [
        {"f": "os.system", "args": ("touch {}",)},
        # Only the name of the function differs.
        {"f": "os.mkdir", "args": ("id", 1)},
        {"f": JOB_FUNCTION, "args": ("id", "1")},
        {"f": JOB_FUNCTION, "args": ("id", 1), "kwargs": {"x": 1}},
        {"f": JOB_FUNCTION, "args": ("id", 1), "on_success": Callback("os.getcwd")},
        {"f": JOB_FUNCTION, "args": ("id", 1), "on_failure": Callback("os.getcwd")},
        {"f": JOB_FUNCTION, "args": ("id", 1), "on_stopped": Callback("os.getcwd")},
    ],
)
def test_the_worker_rejects_foreign_rq_jobs(redis: Redis, foreign: dict[str, Any]) -> None:
    put = Queue("gptloop-0123456789abcdef", connection=redis, serializer=JSONSerializer).enqueue(**foreign)
    with pytest.raises(NoSuchJobError):
        AttemptJob.fetch(put.id, connection=redis, serializer=JSONSerializer)


def test_the_worker_calls_no_method_of_what_a_job_carries(redis: Redis) -> None:
    queue = Queue("gptloop-0123456789abcdef", connection=redis, serializer=JSONSerializer)
    put = queue.create_job(JOB_FUNCTION, args=("id", 1))
    put.instance = "something"
    put.save()
    with pytest.raises(NoSuchJobError):
        AttemptJob.fetch(put.id, connection=redis, serializer=JSONSerializer)


def test_an_unknown_job_is_not_found(queue: JobQueue) -> None:
    with pytest.raises(NotFound, match="no job 'x'"):
        queue.store.get("x")


def test_a_job_is_held_while_its_attempt_renews_its_lease(queue: JobQueue, admin: Redis, job: str) -> None:
    queue.store.renew_attempt(job, 1)
    assert queue.store.get(job).is_held
    assert 0 < int(str(admin.ttl(queue.store.keys.lease(job)))) <= LEASE_S
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    assert not queue.store.get(job).is_held


def test_a_worker_takes_the_first_attempt_whose_needs_it_meets(queue: JobQueue, tmp_path: Path) -> None:
    needs = ("gpu", "", "gpu,memory=64G", "")
    on_gpu, first, large, second = (queue.enqueue(training(tmp_path, needs=each)).id for each in needs)
    cpu, gpu = Offer(memory_bytes=16 << 30), Offer(gpus=1, memory_bytes=40 << 30)
    assert queue.take(cpu) == (first, 1) and queue.store.get(first).is_held
    assert queue.take(cpu) == (second, 1)
    assert queue.take(cpu) is None
    assert queue.take(gpu) == (on_gpu, 1)
    assert queue.take(gpu) is None
    assert queue.attempts.waiting() == [(large, 1)]


def test_the_ranks_of_a_run_are_a_need_of_its_training_alone(queue: JobQueue, tmp_path: Path) -> None:
    prepared = queue.enqueue(preparation(training(tmp_path, world_size="4"))).id
    job = queue.enqueue(training(tmp_path, name="wide", world_size="4")).id
    assert queue.take(Offer(ranks=2)) == (prepared, 1)
    assert queue.take(Offer(ranks=2)) is None
    assert queue.store.get(job).awaited == "a worker with 4 ranks"
    assert queue.take(Offer(ranks=4)) == (job, 1)


def test_an_attempt_that_comes_back_is_taken_in_the_order_of_the_tickets(queue: JobQueue, tmp_path: Path) -> None:
    first, second = (queue.enqueue(training(tmp_path)).id for _ in range(2))
    assert queue.take(Offer()) == (first, 1)
    queue.give_back(first, 1)
    assert queue.take(Offer()) == (first, 2)
    assert queue.take(Offer()) == (second, 1)


def test_an_attempt_that_nobody_wants_any_more_is_dropped(queue: JobQueue, admin: Redis, tmp_path: Path) -> None:
    cancelled, replaced, gone, last = (queue.enqueue(training(tmp_path)).id for _ in range(4))
    admin.hset(queue.store.keys.job(cancelled), "state", "cancelled")
    admin.hset(queue.store.keys.job(replaced), "attempt", "2")
    admin.delete(queue.store.keys.job(gone))
    assert queue.take(Offer()) == (last, 1)
    assert queue.attempts.waiting() == []


def test_many_workers_that_race_take_each_attempt_once(
    redis_server: RedisServer, queue: JobQueue, tmp_path: Path
) -> None:
    jobs = [queue.enqueue(training(tmp_path)).id for _ in range(12)]
    taken: list[tuple[str, int]] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        with redis_server.connect() as connection:
            own = JobQueue(connection, queue.registry)
            barrier.wait()
            while attempt := own.take(Offer()):
                taken.append(attempt)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted((job, 1) for job in jobs)


def test_a_job_names_the_worker_that_it_waits_for(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.enqueue(training(tmp_path, needs="gpu")).id
    queue.store.workers.renew("a", Offer())
    assert queue.store.get(job).awaited == "a worker with a GPU"
    queue.store.workers.renew("b", Offer(gpus=1))
    assert queue.store.get(job).awaited == ""
    queue.store.workers.end("b")
    queue.cancel(job)
    assert queue.store.get(job).awaited == ""


def test_without_redis_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    queue = JobQueue(connect(RedisAddress(f"unix://{tmp_path}/none.sock")), "none")
    with pytest.raises(Unavailable, match="gptloop up"):
        list(queue.store.jobs())


def test_each_story_counts_as_progress_of_a_job_that_crashes(queue: JobQueue) -> None:
    job = queue.enqueue(StoriesSpec("s", 1000, 1.0)).id
    attempts = iter(range(1, 100))
    for stories in (0, 1, 2, 3, 4, 5, 5, 5, 5):
        attempt = next(attempts)
        start(queue, job, attempt)
        preparation = Preparation(f"writing stories: {stories} of 1,000", stories / 1000)
        assert queue.store.report(job, attempt, [TimedEvent(preparation)])
        assert queue.store.get(job).preparation == preparation
        assert queue.lose(job, attempt, "It crashed")
    record = queue.store.get(job)
    assert record.state is JobState.FAILED
    assert record.reason == f"It crashed. The job crashed {len(BACKOFF_S) + 1} times without progress."
