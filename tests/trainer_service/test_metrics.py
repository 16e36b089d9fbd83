"""The trainer's metrics page, from a real Redis and a registry on disk."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from shared.registry.registry import Checkpoint, Registry
from tests.events import PROGRESS, STARTED
from tests.fakes import publish_tiny_version
from tests.jobs import finish, report, start, training
from tests.registries import disk_registry
from trainer_service.jobs.events import Evaluation, JobState, StateChanged, TimedEvent
from trainer_service.jobs.job_store import JobStore
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.metrics import make_metrics
from trainer_service.redis_client import RedisAddress, connect


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return disk_registry(tmp_path / "registry")


@pytest.fixture
def metrics(queue: JobQueue, registry: Registry) -> CollectorRegistry:
    return make_metrics(queue, registry)


def value(metrics: CollectorRegistry, name: str, **labels: str) -> float | None:
    return metrics.get_sample_value(f"gptloop_training_{name}", labels)


def run_of(queue: JobQueue, job: str) -> str:
    spec = queue.store.get(job).spec
    assert spec is not None
    return spec.run


def test_they_show_the_run_while_it_runs_and_its_last_numbers_afterwards(
    queue: JobQueue, metrics: CollectorRegistry, job: str
) -> None:
    run, started = run_of(queue, job), replace(STARTED, memory_limit_bytes=5)
    assert value(metrics, "jobs", state="queued") == 1
    assert value(metrics, "loss", run=run) is None
    queue.store.renew_attempt(job, 1)
    report(queue, job, StateChanged(JobState.RUNNING), started, PROGRESS, Evaluation(1, 10.8, 10.7, 3.5))
    assert value(metrics, "tokens_per_second", run=run) == 1234.5
    assert value(metrics, "validation_loss", run=run) == 10.7
    assert value(metrics, "memory_bytes", run=run, kind="resident") == 4
    assert value(metrics, "memory_limit_bytes", run=run, kind="resident") == 5
    assert value(metrics, "attempt", run=run) == 1
    finish(queue, job)
    assert value(metrics, "tokens_per_second", run=run) == 0
    assert value(metrics, "loss", run=run) == 10.8344
    assert value(metrics, "memory_bytes", run=run, kind="resident") is None
    assert value(metrics, "memory_limit_bytes", run=run, kind="resident") is None
    assert value(metrics, "checkpoint_timestamp_seconds", run=run) is None


def test_a_job_is_ready_once_it_waits_for_nothing_but_a_worker(
    queue: JobQueue, metrics: CollectorRegistry, job: str, tmp_path: Path
) -> None:
    later = queue.enqueue(training(tmp_path), after=[job]).id
    assert (value(metrics, "queue_depth"), value(metrics, "ready_jobs")) == (2, 1)
    assert value(metrics, "oldest_waiting_timestamp_seconds") == queue.store.get(job).enqueued_at
    start(queue, job)
    assert (value(metrics, "queue_depth"), value(metrics, "ready_jobs")) == (1, 0)
    assert value(metrics, "oldest_waiting_timestamp_seconds") == queue.store.get(later).enqueued_at
    queue.cancel(later)
    assert value(metrics, "oldest_waiting_timestamp_seconds") is None


def test_a_job_that_waits_at_a_rung_is_not_the_oldest_that_waits(
    queue: JobQueue, metrics: CollectorRegistry, tmp_path: Path
) -> None:
    candidate = queue.enqueue(replace(training(tmp_path), until=3)).id
    start(queue, candidate)
    assert queue.suspend(candidate, 1, Evaluation(3, 10.8, 10.7, 3.5))
    assert (value(metrics, "queue_depth"), value(metrics, "oldest_waiting_timestamp_seconds")) == (1, None)
    later = queue.enqueue(training(tmp_path)).id
    assert value(metrics, "oldest_waiting_timestamp_seconds") == queue.store.get(later).enqueued_at
    queue.extend(queue.store.get(candidate), 6)
    assert value(metrics, "oldest_waiting_timestamp_seconds") == queue.store.get(candidate).enqueued_at


def test_a_job_that_needs_what_no_live_worker_has_is_counted(
    queue: JobQueue, metrics: CollectorRegistry, job: str, tmp_path: Path
) -> None:
    queue.enqueue(training(tmp_path, needs="gpu"))
    queue.store.workers.renew("a", Offer())
    assert (value(metrics, "ready_jobs"), value(metrics, "unmet_jobs")) == (2, 1)
    queue.store.workers.renew("b", Offer(gpus=1))
    assert value(metrics, "unmet_jobs") == 0


def test_a_pause_is_no_wait_for_a_worker_and_the_next_attempt_counts(
    queue: JobQueue, metrics: CollectorRegistry, job: str
) -> None:
    start(queue, job)
    queue.store.renew_attempt(job, 1)
    report(queue, job, STARTED, PROGRESS)
    queue.pause(job, 1, time.time() + 3600, "The limit of today is used up.")
    assert (value(metrics, "queue_depth"), value(metrics, "ready_jobs")) == (1, 0)
    assert value(metrics, "attempt", run=run_of(queue, job)) == 2


def test_the_time_of_a_checkpoint_is_that_of_the_last_state_or_of_the_first_step_of_the_attempt(
    queue: JobQueue, metrics: CollectorRegistry, registry: Registry, job: str
) -> None:
    run = run_of(queue, job)
    queue.store.renew_attempt(job, 1)
    report(queue, job, StateChanged(JobState.RUNNING))
    started_at = time.time() - 3600
    assert queue.store.report(job, 1, [TimedEvent(STARTED, started_at), TimedEvent(PROGRESS)])
    assert value(metrics, "checkpoint_timestamp_seconds", run=run) == started_at
    fence = registry.take_over(run, 1)
    for step in (9, 10):
        registry.write_state(fence, step, lambda folder: (folder / "model.safetensors").touch())
    written_at = registry.written_at(Checkpoint(10, run))
    assert value(metrics, "checkpoint_timestamp_seconds", run=run) == written_at > started_at
    resumed_at = written_at + 3600
    assert queue.store.report(job, 1, [TimedEvent(STARTED, resumed_at)])
    assert value(metrics, "checkpoint_timestamp_seconds", run=run) == resumed_at


def test_the_newest_version_of_the_registry_is_shown(metrics: CollectorRegistry, registry: Registry) -> None:
    assert value(metrics, "newest_version") == 0
    for number in (1, 2):
        publish_tiny_version(registry, 1.0)
        assert value(metrics, "newest_version") == number


def test_jobs_that_diverged_are_counted(queue: JobQueue, metrics: CollectorRegistry, job: str) -> None:
    assert value(metrics, "diverged_total") == 0
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FAILED, "The loss is nan."))], diverged=True)
    assert value(metrics, "diverged_total") == value(metrics, "jobs", state="failed") == 1


def test_a_job_without_a_time_of_its_own_hides_no_other(
    queue: JobQueue, redis: Redis, metrics: CollectorRegistry, job: str, tmp_path: Path
) -> None:
    other = queue.enqueue(training(tmp_path)).id
    redis.hset(queue.store.keys.job(job), "enqueued_at", "soon")
    assert value(metrics, "queue_depth") == 2
    assert value(metrics, "oldest_waiting_timestamp_seconds") == queue.store.get(other).enqueued_at


def test_the_page_stands_while_redis_is_gone(tmp_path: Path, registry: Registry) -> None:
    metrics = make_metrics(JobQueue(connect(RedisAddress(f"unix://{tmp_path}/none.sock")), "none"), registry)
    assert value(metrics, "redis_up") == 0


def test_a_scrape_reads_each_open_job_once(
    queue: JobQueue, metrics: CollectorRegistry, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = queue.enqueue(training(tmp_path, name="waiting")).id
    queue.store.renew_attempt(job, 1)
    report(queue, job, StateChanged(JobState.RUNNING), STARTED, PROGRESS)
    ids: list[str] = []
    read = JobStore.read

    def reading(store: JobStore, asked: Sequence[str]) -> list[JobRecord | None]:
        ids.extend(asked)
        return read(store, asked)

    monkeypatch.setattr(JobStore, "read", reading)
    assert value(metrics, "queue_depth") == 1 and ids == [job, waiting]
