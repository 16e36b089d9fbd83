import os
import time
from types import SimpleNamespace

import pytest
from redis import Redis

from tests.events import PROGRESS, STARTED
from tests.jobs import events_of, start
from tests.waiting import wait_until
from trainer_service.jobs import reporter as reporter_module
from trainer_service.jobs.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.reporter import Reporter

pytestmark = pytest.mark.slow


def test_the_reporter_sends_every_event_counts_new_tokens_and_renews_the_lease(queue: JobQueue, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60)
    reporter.emit(STARTED)
    reporter.emit(PROGRESS)
    wait_until(lambda: queue.store.get(job).is_held)
    queue.cancel(job)
    wait_until(lambda: reporter.cancelled)
    assert reporter.stop_requested()
    reporter.close(lambda: queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.CANCELLED))]))
    assert queue.store.tokens() == PROGRESS.tokens - STARTED.first_tokens == 200
    states = [StateChanged(JobState.CANCELLING), StateChanged(JobState.CANCELLED)]
    assert events_of(queue, job)[-3:] == [PROGRESS, *states]
    assert not queue.store.get(job).is_held


def test_after_an_outage_the_reporter_sends_every_event_in_order(queue: JobQueue, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60)
    for number in range(2500):
        reporter.emit(Notice(str(number)))
    reporter.close(None)
    last, notices = "0", []
    while batch := queue.store.read_events(job, last):
        last = batch[-1][0]
        notices += [timed.event.text for _, timed in batch if isinstance(timed.event, Notice)]
    assert notices == [str(number) for number in range(2500)]


def test_the_lease_is_kept_only_while_there_is_progress(
    queue: JobQueue, redis: Redis, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=time.sleep))
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=3.0)

    def exchange() -> None:
        """Waits for a turn of the reporter."""
        count = len(events_of(queue, job))
        reporter.emit(PROGRESS)
        wait_until(lambda: len(events_of(queue, job)) > count)

    wait_until(lambda: queue.store.get(job).is_held)
    now_s = 4.0  # without progress
    exchange()
    redis.delete(queue.store.keys.lease(job))
    for _ in range(2):
        exchange()
    assert not queue.store.get(job).is_held
    assert not reporter.stop_requested()
    wait_until(lambda: queue.store.get(job).is_held)
    reporter.close(None)


def test_a_reporter_whose_job_has_another_attempt_sends_nothing_and_requests_a_stop(queue: JobQueue, job: str) -> None:
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60)
    queue.lose(job, 1, "The worker is gone")
    before = events_of(queue, job)
    reporter.emit(PROGRESS)
    wait_until(reporter.stop_requested)
    assert reporter.superseded and not reporter.cancelled
    reporter.close(lambda: queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))]))
    assert events_of(queue, job) == before


def test_a_process_that_was_frozen_is_not_taken_for_stuck(
    queue: JobQueue, redis: Redis, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + frozen_s, sleep=time.sleep)
    monkeypatch.setattr(reporter_module, "time", clock)
    start(queue, job)
    reporter = Reporter(queue, job, 1, os.getppid(), stuck_s=60.0)
    wait_until(lambda: queue.store.get(job).is_held)
    frozen_s = 1000.0
    # Leases that were renewed after it.
    for _ in range(3):
        redis.delete(queue.store.keys.lease(job))
        wait_until(lambda: queue.store.get(job).is_held)
    reporter.close(None)
