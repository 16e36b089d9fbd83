"""Prometheus metrics of the trainer, computed at each scrape from the records of the jobs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.errors import StoreFailed, Unavailable
from shared.pb.training.v1 import training_pb2
from shared.registry.registry import Registry
from trainer_service.jobs.events import JobState, Progress
from trainer_service.jobs.job_store import WORKING, JobStore
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.specs import TrainSpec


class TrainingCollector(Collector):
    """Series of the runs in training, or else of the run that trained last.

    If Redis does not answer, `gptloop_training_redis_up` is 0 and the only series.
    """

    def __init__(self, queue: JobQueue, registry: Registry) -> None:
        self._queue = queue
        self._registry = registry

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yields every metric family of the page."""
        try:
            store = self._queue.store
            counts, tokens, open_jobs = store.counts(), store.tokens(), store.open_jobs()
            shown = _shown(store, open_jobs)
            workers, diverged = store.workers.count(), store.diverged()
        except Unavailable:
            yield GaugeMetricFamily("gptloop_training_redis_up", "Whether Redis answers.", value=0)
            return
        yield GaugeMetricFamily("gptloop_training_redis_up", "Whether Redis answers.", value=1)
        yield CounterMetricFamily("gptloop_training_tokens", "Tokens trained on by all jobs ever.", value=tokens)
        yield from _queued([job for job in open_jobs if job.state is JobState.QUEUED])
        yield GaugeMetricFamily("gptloop_training_workers", "Workers that are alive.", value=workers)
        yield _jobs(counts)
        yield CounterMetricFamily(
            "gptloop_training_diverged", "Jobs that failed because their loss was not finite.", value=diverged
        )
        written_at: dict[str, float] = {}
        with suppress(StoreFailed):  # the series of a registry that cannot be read are absent
            newest = max(self._registry.store.versions(), default=0)
            written_at = {run: _written_at(run, self._registry) for run in shown}
            yield GaugeMetricFamily(
                "gptloop_training_newest_version", "Number of the newest version in the registry.", value=newest
            )
        yield from _runs(shown, written_at)


def make_metrics(queue: JobQueue, registry: Registry) -> CollectorRegistry:
    """Returns the collectors of what `/metrics` serves: the jobs of a queue and the checkpoints of its registry."""
    collectors = CollectorRegistry()
    collectors.register(TrainingCollector(queue, registry))
    return collectors


def show_certificate(collectors: CollectorRegistry, ends_at: Callable[[], float]) -> None:
    """Adds when the certificate of the service ends."""
    gauge = Gauge(
        "gptloop_training_tls_certificate_expiry_timestamp_seconds",
        "When the certificate of the service ends.",
        registry=collectors,
    )
    gauge.set_function(ends_at)


class CallMetrics:
    """Counts the calls of the API, in a registry of metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "gptloop_training_calls_total",
            "Calls that ended, by method and status code.",
            ["method", "code"],
            registry=registry,
        )
        for method in training_pb2.DESCRIPTOR.services_by_name["TrainingService"].methods:
            self._calls.labels(method.name, "ok")

    def called(self, method: str, code: grpc.StatusCode, reason: str | None) -> None:
        """Counts a call that has ended."""
        self._calls.labels(method, code.name.lower()).inc()


def _queued(waiting: Sequence[JobRecord]) -> Iterator[GaugeMetricFamily]:
    yield GaugeMetricFamily(
        "gptloop_training_queue_depth",
        "Jobs that wait for a worker, for others, for their next attempt or at a rung of their sweep.",
        value=len(waiting),
    )
    yield GaugeMetricFamily(
        "gptloop_training_ready_jobs",
        "Jobs that wait for nothing but a worker.",
        value=sum(job.is_ready for job in waiting),
    )
    yield GaugeMetricFamily(
        "gptloop_training_unmet_jobs",
        "Jobs that wait and need what no live worker has.",
        value=sum(bool(job.awaited) for job in waiting),
    )
    oldest = GaugeMetricFamily(
        "gptloop_training_oldest_waiting_timestamp_seconds",
        "When the job that waits, except at a rung, and was queued first was queued; absent if none waits.",
    )
    since = [job.enqueued_at for job in waiting if job.enqueued_at is not None and not job.is_suspended]
    if since:
        oldest.add_metric([], min(since))
    yield oldest


def _jobs(counts: Mapping[JobState, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily("gptloop_training_jobs", "Jobs in each state.", labels=["state"])
    for state in JobState:
        family.add_metric([state.value], counts[state])
    return family


def _shown(store: JobStore, open_jobs: Iterable[JobRecord]) -> dict[str, tuple[JobRecord, Progress]]:
    """Returns the runs on the page: those in training, or else the newest that has trained."""
    working = dict(_trained(filter(_is_working, open_jobs)))
    return working or dict(islice(_trained(store.jobs()), 1))


def _trained(jobs: Iterable[JobRecord]) -> Iterator[tuple[str, tuple[JobRecord, Progress]]]:
    for record in jobs:
        if record.progress and isinstance(record.spec, TrainSpec):
            yield record.spec.run, (record, record.progress)


def _is_working(record: JobRecord) -> bool:
    return record.state in WORKING and record.is_held


def _written_at(run: str, registry: Registry) -> float:
    """Returns when the newest state of a run was written; 0 if it has none."""
    return max(registry.store.run(run).states.values(), default=0.0)


def _runs(
    runs: Mapping[str, tuple[JobRecord, Progress]], written_at: Mapping[str, float]
) -> Iterator[GaugeMetricFamily]:
    def family(name: str, text: str, values: dict[str, float | None]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"gptloop_training_{name}", text, labels=["run"])
        for run, value in values.items():
            if value is not None:
                gauge.add_metric([run], value)
        return gauge

    def kept_at(record: JobRecord, run: str) -> float | None:
        if run not in written_at:
            return None
        return max(written_at[run], record.stepping_since or 0.0) or None

    yield family(
        "tokens_per_second",
        "Tokens trained on per second since the last report; 0 when the run does not run.",
        {run: progress.tokens_per_second if _is_working(record) else 0.0 for run, (record, progress) in runs.items()},
    )
    yield family("loss", "Training loss in nats per token.", {run: p.loss for run, (_, p) in runs.items()})
    yield family(
        "validation_loss",
        "Held-out loss of the last evaluation in nats per token.",
        {run: r.evaluation.validation_loss if r.evaluation else None for run, (r, _) in runs.items()},
    )
    yield family("step", "Steps taken.", {run: p.step for run, (_, p) in runs.items()})
    yield family(
        "learning_rate", "Learning rate of the last step.", {run: p.learning_rate for run, (_, p) in runs.items()}
    )
    yield family(
        "attempt",
        "Number of the attempt at the job of the run, from 1: each interruption adds 1.",
        {run: float(record.attempt) for run, (record, _) in runs.items()},
    )
    yield family(
        "checkpoint_timestamp_seconds",
        "When a run in training last kept a state, or began its first step if that is later.",
        {run: kept_at(record, run) for run, (record, _) in runs.items() if _is_working(record)},
    )
    memory = GaugeMetricFamily(
        "gptloop_training_memory_bytes", "Memory of the training process.", labels=["run", "kind"]
    )
    for run, (record, progress) in runs.items():
        if _is_working(record):
            memory.add_metric([run, "active"], progress.active_memory_bytes)
            memory.add_metric([run, "cache"], progress.cache_memory_bytes)
            memory.add_metric([run, "peak"], progress.peak_memory_bytes)
            memory.add_metric([run, "resident"], progress.resident_memory_bytes)
    yield memory
    limit = GaugeMetricFamily(
        "gptloop_training_memory_limit_bytes", "The most that the training process may use.", labels=["run", "kind"]
    )
    for run, (record, _) in runs.items():
        if _is_working(record) and record.started and record.started.memory_limit_bytes:
            limit.add_metric([run, "resident"], record.started.memory_limit_bytes)
    yield limit
