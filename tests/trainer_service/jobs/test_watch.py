import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from redis import Redis

from shared.errors import FailedPrecondition, NotFound, Unavailable
from tests.jobs import EVALUATION, finish, report, start, training
from trainer_service.jobs.events import Evaluation, JobState, StateChanged
from trainer_service.jobs.job_store import LEASE_S
from trainer_service.jobs.queue import BACKOFF_S, LONGEST_PAUSE_S, JobQueue
from trainer_service.jobs.watch import GRACE_S, Watch
from trainer_service.redis_client import RedisAddress, connect


@dataclass
class Clock:
    """Stands still until somebody moves it."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def looked_for(watch: Watch, clock: Clock, seconds: float) -> set[tuple[str, int]]:
    """Returns the attempts that are given up while time passes, second by second."""
    given_up = set()
    for _ in range(round(seconds)):
        clock.now_s += 1
        given_up |= watch.look()
    return given_up


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(queue: JobQueue, clock: Clock) -> Watch:
    return Watch(queue, clock)


def test_crashes_at_one_step_delay_attempts_longer_each_time_and_then_fail_the_job(
    queue: JobQueue, watch: Watch, clock: Clock, job: str
) -> None:
    for attempt, delay_s in enumerate(BACKOFF_S, start=1):
        start(queue, job, attempt)
        assert queue.lose(job, attempt, "It crashed")
        assert queue.store.get(job).reason.endswith(f"in {delay_s:.0f} s." if delay_s else "now.")
        watch.look()
        assert queue.attempts.waiting() == ([] if delay_s else [(job, attempt + 1)])
        clock.now_s += max(delay_s - 0.1, 0)
        watch.look()
        assert queue.attempts.waiting() == ([] if delay_s else [(job, attempt + 1)])
        clock.now_s += 0.2
        for _ in range(2):
            watch.look()
        assert queue.attempts.waiting() == [(job, attempt + 1)]
    start(queue, job, len(BACKOFF_S) + 1)
    queue.lose(job, len(BACKOFF_S) + 1, "It crashed")
    record = queue.store.get(job)
    assert record.state is JobState.FAILED
    assert record.reason == f"It crashed. The job crashed {len(BACKOFF_S) + 1} times without progress."


@pytest.mark.parametrize("step_s", [-1e9, 1e9])
def test_no_wait_depends_on_the_time_of_day(
    queue: JobQueue, watch: Watch, clock: Clock, job: str, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    for attempt in (1, 2):
        start(queue, job, attempt)
        queue.lose(job, attempt, "It crashed")
    watch.look()
    monkeypatch.setattr("time.time", lambda: 1e9 + step_s)
    watch.look()
    assert queue.attempts.waiting() == []
    clock.now_s += BACKOFF_S[1]
    watch.look()
    assert queue.attempts.waiting() == [(job, 3)]


def test_an_attempt_is_given_up_when_it_neither_waits_nor_has_a_lease(
    queue: JobQueue, redis: Redis, watch: Watch, clock: Clock, job: str
) -> None:
    def is_given_up() -> bool:
        watch.look()
        clock.now_s += GRACE_S
        return watch.look() == {(job, 1)}

    assert not is_given_up()
    queue.attempts.remove(job, 1)  # a worker took it, and died before its process said anything
    queue.store.renew_attempt(job, 1)
    assert not is_given_up()
    start(queue, job)
    assert not is_given_up()
    redis.delete(queue.store.keys.lease(job))
    queue.store.renew_attempt(job, 2)  # not of this attempt
    watch.look()
    queue.store.renew_attempt(job, 1)
    assert not is_given_up()
    redis.delete(queue.store.keys.lease(job))
    assert is_given_up()
    assert queue.store.get(job).attempt == 2 and queue.attempts.waiting() == [(job, 2)]


def test_a_lease_that_is_not_renewed_counts_as_none_although_redis_still_has_it(
    queue: JobQueue, redis: Redis, watch: Watch, clock: Clock, job: str
) -> None:
    start(queue, job)
    queue.store.renew_attempt(job, 1)
    # As if the clock of Redis had been set back.
    redis.persist(queue.store.keys.lease(job))
    assert watch.look() == set()
    assert not looked_for(watch, clock, LEASE_S)
    queue.store.renew_attempt(job, 1)
    redis.persist(queue.store.keys.lease(job))
    assert not looked_for(watch, clock, LEASE_S)
    assert looked_for(watch, clock, GRACE_S + 1) == {(job, 1)}


def test_a_watch_that_was_frozen_gives_up_no_attempt_for_that_time(
    queue: JobQueue, watch: Watch, clock: Clock, job: str
) -> None:
    start(queue, job)
    queue.store.renew_attempt(job, 1)
    assert watch.look() == set()
    clock.now_s += 1000
    assert watch.look() == set() and not looked_for(watch, clock, LEASE_S)
    assert looked_for(watch, clock, GRACE_S + 1) == {(job, 1)}


def test_after_an_outage_of_redis_every_attempt_has_its_time_again(
    queue: JobQueue, watch: Watch, clock: Clock, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(queue, job)
    watch.look()
    clock.now_s += 100
    with monkeypatch.context() as patch:
        patch.setattr(queue, "store", JobQueue(connect(RedisAddress("unix:///none.sock")), queue.registry).store)
        with pytest.raises(Unavailable):
            watch.look()
    assert watch.look() == set()
    clock.now_s += GRACE_S
    assert watch.look() == {(job, 1)}


def test_a_job_that_waits_at_its_step_is_neither_sent_nor_given_up(
    queue: JobQueue, watch: Watch, clock: Clock, tmp_path: Path
) -> None:
    job = queue.enqueue(replace(training(tmp_path), until=3)).id
    start(queue, job)
    queue.suspend(job, 1, Evaluation(3, 2.0, 1.9, 0.9))
    assert looked_for(watch, clock, 100) == set() and queue.attempts.waiting() == []
    queue.extend(queue.store.get(job), 6)
    assert looked_for(watch, clock, 100) == set() and queue.attempts.waiting() == [(job, 2)]


def test_a_job_waits_for_those_before_it(queue: JobQueue, watch: Watch, job: str, tmp_path: Path) -> None:
    other = queue.enqueue(training(tmp_path)).id
    last = queue.enqueue(EVALUATION, after=[job, other])
    assert last.after == (job, other) and (last.id, 1) not in queue.attempts.waiting()
    for each in (job, other):
        watch.look()
        assert (last.id, 1) not in queue.attempts.waiting()
        start(queue, each)
        finish(queue, each)
    for _ in range(2):
        watch.look()
    assert queue.attempts.waiting() == [(last.id, 1)]


def test_jobs_run_in_the_order_in_which_they_were_enqueued(
    queue: JobQueue, watch: Watch, job: str, tmp_path: Path
) -> None:
    measured = queue.enqueue(EVALUATION, after=[job]).id
    second, third = (queue.enqueue(training(tmp_path)).id for _ in range(2))
    last = queue.enqueue(EVALUATION, after=[job]).id
    start(queue, job)
    assert queue.attempts.waiting() == [(second, 1), (third, 1)]
    finish(queue, job)
    watch.look()
    assert queue.attempts.waiting() == [(measured, 1), (second, 1), (third, 1), (last, 1)]
    # An interrupted one goes on before those that came later.
    start(queue, second)
    assert queue.give_back(second, 1)
    assert queue.attempts.waiting() == [(measured, 1), (second, 2), (third, 1), (last, 1)]


def test_a_job_that_waits_for_a_failed_job_is_cancelled_with_the_reason(
    queue: JobQueue, watch: Watch, job: str, tmp_path: Path
) -> None:
    second = queue.enqueue(training(tmp_path), after=[job]).id
    third = queue.enqueue(training(tmp_path), after=[second]).id
    start(queue, job)
    report(queue, job, StateChanged(JobState.FAILED, "bad data"))
    for _ in range(2):
        watch.look()
    for waiting, before in ((second, job), (third, second)):
        record = queue.store.get(waiting)
        assert record.state is JobState.CANCELLED
        assert record.reason == f"The job {before}, which comes before it, has not finished."
    with pytest.raises(FailedPrecondition, match="nothing can come after it"):
        queue.enqueue(training(tmp_path), after=[job])
    with pytest.raises(NotFound):
        queue.enqueue(training(tmp_path), after=["x"])


def test_an_invalid_job_does_not_delay_others(
    queue: JobQueue, redis: Redis, watch: Watch, job: str, tmp_path: Path
) -> None:
    odd = [queue.enqueue(training(tmp_path)).id for _ in range(3)]
    last = queue.enqueue(EVALUATION, after=[job]).id
    redis.hset(queue.store.keys.job(odd[0]), "state", "?")
    redis.hset(queue.store.keys.job(odd[1]), "attempt", "9" * 5000)
    redis.delete(queue.store.keys.job(odd[2]))
    redis.set(queue.store.keys.job(odd[2]), "no hash")
    start(queue, job)
    finish(queue, job)
    watch.look()
    assert (last, 1) in queue.attempts.waiting() and len(queue.store.waiting()) == 1


@dataclass
class Day:
    """A time of day that stands still until somebody sets it."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    day = Day()
    monkeypatch.setattr("trainer_service.jobs.queue.time.time", day)
    return day


def test_a_job_that_is_paused_until_the_next_day_begins_then_and_not_earlier(
    queue: JobQueue, clock: Clock, day: Day, job: str
) -> None:
    start(queue, job)
    assert queue.pause(job, 1, day.now + 8 * 3600, "The limit of the day is reached.")
    record = queue.store.get(job)
    at = time.strftime("%H:%M:%S on %A, %d %B (%Z)", time.localtime(day.now + 8 * 3600))
    assert (record.state, record.attempt, record.until) == (JobState.QUEUED, 2, day.now + 8 * 3600)
    assert record.reason == f"The limit of the day is reached. The job goes on at {at}."
    watch = Watch(queue, clock, day)
    for hour in range(8):
        watch.look()
        assert queue.attempts.waiting() == [], hour
        day.now += 3600
        clock.now_s += 3600
        # A worker that starts meanwhile watches the same pause.
        watch = Watch(queue, clock, day)
    day.now -= 0.1
    watch.look()
    assert queue.attempts.waiting() == []
    day.now += 0.2
    for _ in range(2):
        watch.look()
    assert queue.attempts.waiting() == [(job, 2)]


@pytest.mark.parametrize("set_s", [-1e9, -2 * LONGEST_PAUSE_S, 3600.0, 1e9])
def test_a_clock_that_is_set_ends_a_pause_instead_of_losing_the_job(
    queue: JobQueue, clock: Clock, day: Day, job: str, set_s: float
) -> None:
    start(queue, job)
    queue.pause(job, 1, day.now + 3600, "Limit.")
    watch = Watch(queue, clock, day)
    watch.look()
    day.now += set_s
    watch.look()
    assert queue.attempts.waiting() == [(job, 2)]


def test_a_clock_that_is_set_back_by_hours_delays_a_job_by_a_day_at_most(
    queue: JobQueue, clock: Clock, day: Day, job: str
) -> None:
    start(queue, job)
    queue.pause(job, 1, day.now + 3600, "Limit.")
    watch = Watch(queue, clock, day)
    day.now -= LONGEST_PAUSE_S - 3600
    watch.look()
    assert queue.attempts.waiting() == []
    day.now += LONGEST_PAUSE_S
    watch.look()
    assert queue.attempts.waiting() == [(job, 2)]


@pytest.mark.parametrize("pause_s", [1e12, float("inf"), -5.0])
def test_no_pause_is_longer_than_a_day(queue: JobQueue, clock: Clock, day: Day, job: str, pause_s: float) -> None:
    start(queue, job)
    queue.pause(job, 1, day.now + pause_s, "Limit.")
    until = queue.store.get(job).until
    assert until is not None and day.now <= until <= day.now + LONGEST_PAUSE_S
    day.now += LONGEST_PAUSE_S
    Watch(queue, clock, day).look()
    assert queue.attempts.waiting() == [(job, 2)]


def test_a_pause_ends_with_its_attempt(queue: JobQueue, clock: Clock, day: Day, job: str) -> None:
    start(queue, job)
    queue.pause(job, 1, day.now + 60, "Limit.")
    day.now += 60
    watch = Watch(queue, clock, day)
    watch.look()
    start(queue, job, 2)
    # Another process of the first attempt changes nothing, and a stop does not bring the pause back.
    assert not queue.pause(job, 1, day.now + 60, "Limit.")
    assert queue.give_back(job, 2) and queue.store.get(job).until is None
    assert queue.attempts.waiting() == [(job, 3)]


def test_a_paused_job_lets_others_run_and_can_be_cancelled(
    queue: JobQueue, clock: Clock, day: Day, job: str, tmp_path: Path
) -> None:
    other = queue.enqueue(training(tmp_path)).id
    start(queue, job)
    queue.pause(job, 1, day.now + 60, "Limit.")
    watch = Watch(queue, clock, day)
    watch.look()
    assert queue.attempts.waiting() == [(other, 1)]
    assert queue.cancel(job).state is JobState.CANCELLED
    day.now += 100
    watch.look()
    assert queue.attempts.waiting() == [(other, 1)]


def test_a_job_that_is_cancelled_as_it_pauses_has_ended(queue: JobQueue, day: Day, job: str) -> None:
    start(queue, job)
    queue.cancel(job)
    assert queue.pause(job, 1, day.now + 60, "Limit.")
    assert queue.store.get(job).state is JobState.CANCELLED
