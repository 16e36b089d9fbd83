import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue
from rq.exceptions import NoSuchJobError
from rq.serializers import JSONSerializer

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
from trainer_service.kinds import EvaluationSpec, JobRequest, Kind, complete, spec_from_json
from trainer_service.queue import BACKOFF_S, LEASE_S, JobQueue
from trainer_service.records import JobRecord
from trainer_service.redis_server import connect
from trainer_service.reporter import Reporter
from trainer_service.rq_jobs import JOB_FUNCTION, AttemptJob
from trainer_service.settings import TrainerSettings
from trainer_service.spec import JobSpec, TrainingRequest, parse_overrides, resolve
from trainer_service.training.corpus import DatasetSpec


def spec(tmp_path: Path) -> JobSpec:
    return resolve(TrainingRequest(overrides={"max_steps": "7"}), Registry(tmp_path / "registry"))


@pytest.fixture
def job(queue: JobQueue, tmp_path: Path) -> str:
    """The id of a job that waits."""
    return queue.enqueue(Kind.TRAIN, spec(tmp_path)).id


def start(queue: JobQueue, job: str, attempt: int = 1) -> None:
    """As a worker and its process do."""
    queue.rq.remove(f"{job}-{attempt}")
    assert queue.tell(job, attempt, [TimedEvent(StateChanged(JobState.RUNNING))])


def told(queue: JobQueue, job: str) -> list[object]:
    return [timed.event for _, timed in queue.read_events(job)]


def test_a_job_can_be_read_back_as_it_was_put_on_the_queue(queue: JobQueue, tmp_path: Path) -> None:
    wanted = spec(tmp_path)
    record = queue.enqueue(Kind.TRAIN, wanted)
    assert record.spec == wanted and record.kind is Kind.TRAIN
    assert (record.state, record.attempt, record.is_held) == (JobState.QUEUED, 1, False)
    assert (record.started_at, record.ended_at, record.progress, record.reason) == (None, None, None, "")
    assert queue.waiting() == 1 and queue.rq.job_ids == [f"{record.id}-1"]
    assert told(queue, record.id) == [StateChanged(JobState.QUEUED)]


def test_jobs_are_listed_newest_first_by_state_kind_and_age(queue: JobQueue, tmp_path: Path) -> None:
    first, second, third = (queue.enqueue(Kind.TRAIN, spec(tmp_path)) for _ in range(3))
    measured = queue.enqueue(Kind.EVALUATE, EvaluationSpec("3", DatasetSpec(())))
    start(queue, second.id)

    def ids(records: Iterable[JobRecord]) -> list[str]:
        return [record.id for record in records]

    assert ids(queue.jobs()) == [measured.id, third.id, second.id, first.id]
    assert ids(queue.jobs([JobState.QUEUED], [Kind.TRAIN])) == [third.id, first.id]
    assert ids(queue.jobs(before=third.enqueued_at)) == [second.id, first.id]
    assert queue.get(measured.id).spec == EvaluationSpec("3", DatasetSpec(()))


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
    assert queue.tell(job, 1, [timed])
    assert queue.read_events(job)[-1][1] == timed


def test_what_a_job_tells_is_what_its_record_says(queue: JobQueue, job: str) -> None:
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.RUNNING), 1.0), TimedEvent(PROGRESS)])
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.QUEUED)), TimedEvent(StateChanged(JobState.RUNNING), 2.0)])
    queue.tell(job, 1, [TimedEvent(Evaluation(3, 2.0, 3.0, 1.1)), TimedEvent(StateChanged(JobState.FAILED, "no"), 3.0)])
    record = queue.get(job)
    assert (record.started_at, record.ended_at, record.state, record.reason) == (1.0, 3.0, JobState.FAILED, "no")
    assert record.progress == PROGRESS and record.evaluation == Evaluation(3, 2.0, 3.0, 1.1)


def test_a_waiting_job_that_is_cancelled_never_starts(queue: JobQueue, job: str) -> None:
    assert queue.cancel(job).state is JobState.CANCELLED
    assert queue.waiting() == 0 and queue.rq.job_ids == []
    assert not queue.tell(job, 1, [TimedEvent(StateChanged(JobState.RUNNING))])
    with pytest.raises(FailedPrecondition, match="cancelled already"):
        queue.cancel(job)


def test_a_running_job_is_asked_to_end(queue: JobQueue, job: str) -> None:
    start(queue, job)
    assert not queue.cancel_requested(job)
    assert queue.cancel(job).state is JobState.CANCELLING
    assert queue.cancel_requested(job)


def test_a_job_that_is_to_end_and_whose_process_is_gone_has_ended(queue: JobQueue, job: str) -> None:
    start(queue, job)
    queue.cancel(job)
    assert queue.lose(job, 1, "The process is gone")
    assert queue.get(job).state is JobState.CANCELLED and queue.rq.job_ids == []


def test_an_interrupted_attempt_is_followed_by_another(queue: JobQueue, job: str) -> None:
    start(queue, job)
    assert queue.give_back(job, 1, "stopped")
    record = queue.get(job)
    assert (record.state, record.attempt, record.reason) == (JobState.QUEUED, 2, "stopped")
    assert queue.rq.job_ids == [f"{job}-2"]


def test_an_earlier_attempt_can_say_nothing_any_more(queue: JobQueue, job: str) -> None:
    start(queue, job)
    queue.lose(job, 1, "The worker is gone")
    start(queue, job, 2)
    before = queue.get(job), told(queue, job)
    assert not queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))], new_tokens=5)
    assert not queue.give_back(job, 1, "late") and not queue.lose(job, 1, "late")
    assert not queue.is_current(job, 1) and queue.is_current(job, 2)
    assert (queue.get(job), told(queue, job)) == before and queue.tokens() == 0


def test_crashes_at_one_step_are_followed_by_attempts_ever_later_and_then_by_none(
    queue: JobQueue, redis: Redis, job: str
) -> None:
    for attempt, delay_s in enumerate(BACKOFF_S, start=1):
        start(queue, job, attempt)
        before_s = time.time()
        assert queue.lose(job, attempt, "It crashed")
        assert queue.get(job).reason.endswith(f"in {delay_s:.0f} s." if delay_s else "now.")
        assert queue.rq.job_ids == ([f"{job}-{attempt + 1}"] if delay_s == 0 else [])
        ready_at = float(redis.hget(f"gptloop:job:{job}", "ready_at"))  # type: ignore[arg-type]
        assert before_s + delay_s <= ready_at <= time.time() + delay_s
        queue.send_ready()
        assert (queue.rq.job_ids == []) == (delay_s > 0)
        redis.hset(f"gptloop:job:{job}", "ready_at", 0)
        queue.send_ready()
        queue.send_ready()
        assert queue.rq.job_ids == [f"{job}-{attempt + 1}"]
    start(queue, job, len(BACKOFF_S) + 1)
    queue.lose(job, len(BACKOFF_S) + 1, "It crashed")
    record = queue.get(job)
    assert record.state is JobState.FAILED and record.reason == "It crashed, too often without getting any further."


def test_a_run_that_gets_further_may_crash_again(queue: JobQueue, redis: Redis, job: str) -> None:
    for attempt in range(1, 3 * len(BACKOFF_S)):
        start(queue, job, attempt)
        queue.tell(job, attempt, [TimedEvent(replace(STARTED, first_step=10 * attempt))])
        queue.lose(job, attempt, "It crashed")
        assert queue.get(job).state is JobState.QUEUED and queue.rq.job_ids == [f"{job}-{attempt + 1}"]


def test_a_job_is_unattended_when_it_neither_waits_nor_has_a_lease(queue: JobQueue, redis: Redis, job: str) -> None:
    assert queue.unattended() == {}
    queue.rq.remove(f"{job}-1")  # a worker took it, and died before its process said anything
    assert queue.unattended() == {job: 1}
    queue.renew_job_lease(job, 1)
    assert queue.unattended() == {}
    start(queue, job)
    redis.delete(f"gptloop:lease:{job}")
    assert queue.unattended() == {job: 1}
    queue.renew_job_lease(job, 2)  # not of this attempt
    assert queue.unattended() == {job: 1}
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    assert queue.unattended() == {}


def test_a_job_waits_for_those_before_it(queue: JobQueue, job: str, tmp_path: Path) -> None:
    other = queue.enqueue(Kind.TRAIN, spec(tmp_path)).id
    last = queue.enqueue(Kind.EVALUATE, EvaluationSpec("best", DatasetSpec(())), after=[job, other])
    assert last.after == (job, other) and f"{last.id}-1" not in queue.rq.job_ids
    for each in (job, other):
        queue.send_ready()
        assert f"{last.id}-1" not in queue.rq.job_ids
        start(queue, each)
        queue.tell(each, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    queue.send_ready()
    queue.send_ready()
    assert queue.rq.job_ids == [f"{last.id}-1"]


def test_what_waits_for_a_job_that_fails_is_cancelled_with_the_reason(
    queue: JobQueue, job: str, tmp_path: Path
) -> None:
    second = queue.enqueue(Kind.TRAIN, spec(tmp_path), after=[job]).id
    third = queue.enqueue(Kind.TRAIN, spec(tmp_path), after=[second]).id
    start(queue, job)
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FAILED, "bad data"))])
    for _ in range(2):
        queue.send_ready()
    for waiting, before in ((second, job), (third, second)):
        record = queue.get(waiting)
        assert record.state is JobState.CANCELLED
        assert record.reason == f"The job {before}, which comes before it, has not finished."
    with pytest.raises(FailedPrecondition, match="nothing can come after it"):
        queue.enqueue(Kind.TRAIN, spec(tmp_path), after=[job])
    with pytest.raises(NotFound):
        queue.enqueue(Kind.TRAIN, spec(tmp_path), after=["x"])


@pytest.mark.parametrize(
    "foreign",
    [
        {"f": "os.system", "args": ("touch {}",)},
        {"f": JOB_FUNCTION, "args": ("id", "1")},
        {"f": JOB_FUNCTION, "args": ("id", 1), "kwargs": {"x": 1}},
        {"f": JOB_FUNCTION, "args": ("id", 1), "on_success": Callback("os.getcwd")},
        {"f": JOB_FUNCTION, "args": ("id", 1), "on_failure": Callback("os.getcwd")},
    ],
)
def test_what_is_no_attempt_at_a_job_is_none_for_the_worker(redis: Redis, foreign: dict[str, Any]) -> None:
    put = Queue("gptloop", connection=redis, serializer=JSONSerializer).enqueue(**foreign)
    with pytest.raises(NoSuchJobError):
        AttemptJob.fetch(put.id, connection=redis, serializer=JSONSerializer)


def test_an_unknown_job_is_not_found(queue: JobQueue) -> None:
    with pytest.raises(NotFound, match="no job 'x'"):
        queue.get("x")


def test_workers_and_holders_are_known_while_they_renew_their_leases(queue: JobQueue, redis: Redis, job: str) -> None:
    queue.renew_worker_lease("a")
    queue.renew_job_lease(job, 1)
    assert queue.live_workers() == 1 and queue.get(job).is_held
    assert 0 < int(str(redis.ttl("gptloop:worker:a"))) <= LEASE_S
    queue.end_worker_lease("a")
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    assert queue.live_workers() == 0 and not queue.get(job).is_held


def test_without_redis_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    queue = JobQueue(connect(f"unix://{tmp_path}/none.sock"))
    with pytest.raises(Unavailable, match="make up"):
        list(queue.jobs())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "The condition did not come true."
        time.sleep(0.02)


def test_the_reporter_tells_everything_counts_new_tokens_and_keeps_the_lease(queue: JobQueue, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60)
    reporter.tell(STARTED)
    reporter.tell(PROGRESS)
    wait_until(lambda: queue.get(job).is_held)
    queue.cancel(job)
    wait_until(lambda: reporter.cancelled)
    assert reporter.stop_requested()
    reporter.close(lambda queue: queue.tell(job, 1, [TimedEvent(StateChanged(JobState.CANCELLED))]))
    assert queue.tokens() == PROGRESS.tokens - STARTED.first_tokens == 200
    states = [StateChanged(JobState.CANCELLING), StateChanged(JobState.CANCELLED)]
    assert told(queue, job)[-3:] == [PROGRESS, *states]
    assert not queue.get(job).is_held


def test_after_an_outage_a_reporter_tells_everything_in_its_order(queue: JobQueue, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60)
    for number in range(2500):
        reporter.tell(Notice(str(number)))
    reporter.close(None)
    last, notices = "0", []
    while batch := queue.read_events(job, last):
        last = batch[-1][0]
        notices += [timed.event.text for _, timed in batch if isinstance(timed.event, Notice)]
    assert notices == [str(number) for number in range(2500)]


def test_the_lease_is_kept_only_while_there_is_progress(queue: JobQueue, redis: Redis, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=1.0)
    wait_until(lambda: queue.get(job).is_held)
    time.sleep(1.5)  # without progress
    redis.delete(f"gptloop:lease:{job}")
    time.sleep(1.0)
    assert not queue.get(job).is_held
    assert not reporter.stop_requested()
    wait_until(lambda: queue.get(job).is_held)
    reporter.close(None)


def test_a_reporter_whose_job_is_anothers_says_nothing_and_asks_for_the_end(queue: JobQueue, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60)
    queue.lose(job, 1, "The worker is gone")
    before = told(queue, job)
    reporter.tell(PROGRESS)
    wait_until(reporter.stop_requested)
    assert reporter.superseded and not reporter.cancelled
    reporter.close(lambda queue: queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))]))
    assert told(queue, job) == before


def test_overrides_are_read_from_one_line() -> None:
    assert parse_overrides(" max_steps=5  seed=1 ") == {"max_steps": "5", "seed": "1"}
    for wrong in ("max_steps", "=5", "max_steps="):
        with pytest.raises(InvalidArgument, match="is not of the form name=value"):
            parse_overrides(wrong)


def test_only_a_whole_job_can_be_understood(settings: TrainerSettings) -> None:
    whole = resolve(TrainingRequest(), Registry(settings.directories.registry)).to_json()
    assert JobSpec.from_json(whole).to_json() == whole
    elsewhere = whole.replace('"run": "demo', '"run": "../demo')
    for text in ("", "[]", "{}", whole.replace('"max_steps"', '"steps"'), elsewhere):
        with pytest.raises(InvalidArgument):
            JobSpec.from_json(text)


def test_an_evaluation_is_completed_and_checked(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")

    def completed(version: str = "", after: tuple[str, ...] = (), **training: Any) -> object:
        return complete(JobRequest(Kind.EVALUATE, TrainingRequest(**training), version, after), registry)

    wanted = completed(after=("a",), dataset=("builtin",))
    assert wanted == EvaluationSpec("best", DatasetSpec(("builtin",)))
    assert spec_from_json(Kind.EVALUATE, wanted.to_json()) == wanted
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("Once")
    assert completed(after=("a",), validation=(str(held_out),)) == EvaluationSpec(
        "best", DatasetSpec((), (str(held_out),))
    )
    for version in ("best", "3"):
        with pytest.raises(NotFound, match="empty"):
            completed(version)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        completed(after=("a",), validation=(str(tmp_path / "absent.txt"),))
    for wrong in ({"version": "newest"}, {"after": ("a",), "preset": "demo"}):
        with pytest.raises(InvalidArgument):
            completed(**wrong)
    with pytest.raises(InvalidArgument, match="for evaluations"):
        complete(JobRequest(Kind.TRAIN, TrainingRequest(), "3"), registry)


def test_what_cannot_be_trained_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(NotFound, match="still empty"):
        resolve(TrainingRequest(resume=3), registry)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        resolve(TrainingRequest(dataset=(str(tmp_path / "absent.txt"),)), registry)
