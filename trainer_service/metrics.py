"""Prometheus metrics of the trainer, computed from what jobs told Redis at the moment of the scrape."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import grpc
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.errors import Unavailable
from shared.pb.training.v1 import training_pb2
from trainer_service.jobs.events import JobState, Progress
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.spec import JobSpec

_WORKING = (JobState.RUNNING, JobState.CANCELLING)


class TrainingCollector(Collector):
    """Series of the jobs that run, and of the one that ran last; gone runs leave the page.

    Where Redis does not answer, only `gptloop_training_redis_up` is there, and it is 0.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Every metric family of the page."""
        try:
            counts, shown = self._queue.counts(), _shown(self._queue)
            tokens, waiting, workers = self._queue.tokens(), self._queue.waiting(), self._queue.live_workers()
        except Unavailable:
            yield GaugeMetricFamily("gptloop_training_redis_up", "Whether Redis answers.", value=0)
            return
        yield GaugeMetricFamily("gptloop_training_redis_up", "Whether Redis answers.", value=1)
        yield CounterMetricFamily("gptloop_training_tokens", "Tokens trained on by all jobs ever.", value=tokens)
        yield GaugeMetricFamily(
            "gptloop_training_queue_depth",
            "Jobs that wait for a worker, for others or for their next attempt.",
            value=waiting,
        )
        yield GaugeMetricFamily("gptloop_training_workers", "Workers that are alive.", value=workers)
        yield _jobs(counts)
        yield from _runs(shown)


def make_metrics(queue: JobQueue) -> CollectorRegistry:
    """The registry that `/metrics` serves."""
    registry = CollectorRegistry()
    registry.register(TrainingCollector(queue))
    return registry


class CallMetrics:
    """Counts the calls of the API, on the page that a registry gives."""

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
        """A call ended."""
        self._calls.labels(method, code.name.lower()).inc()


def _jobs(counts: Mapping[JobState, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily("gptloop_training_jobs", "Jobs in each state.", labels=["state"])
    for state in JobState:
        family.add_metric([state.value], counts[state])
    return family


def _shown(queue: JobQueue) -> dict[str, tuple[JobRecord, Progress]]:
    """The runs whose progress is on the page: those in training, else the newest that was."""

    def told(states: Sequence[JobState]) -> Iterator[tuple[str, tuple[JobRecord, Progress]]]:
        for record in queue.jobs(states):
            if record.progress and isinstance(record.spec, JobSpec):
                yield record.spec.run, (record, record.progress)

    working = {run: each for run, each in told(_WORKING) if each[0].is_held}
    return working or dict(islice(told(()), 1))


def _runs(runs: Mapping[str, tuple[JobRecord, Progress]]) -> Iterator[GaugeMetricFamily]:
    def family(name: str, text: str, values: dict[str, float | None]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"gptloop_training_{name}", text, labels=["run"])
        for run, value in values.items():
            if value is not None:
                gauge.add_metric([run], value)
        return gauge

    def working(record: JobRecord) -> bool:
        return record.state in _WORKING and record.is_held

    yield family(
        "tokens_per_second",
        "Tokens trained on per second since the last report; 0 when the run does not run.",
        {run: progress.tokens_per_second if working(record) else 0.0 for run, (record, progress) in runs.items()},
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
    memory = GaugeMetricFamily(
        "gptloop_training_memory_bytes", "Memory of the training process.", labels=["run", "kind"]
    )
    for run, (record, progress) in runs.items():
        if working(record):
            memory.add_metric([run, "active"], progress.active_memory_bytes)
            memory.add_metric([run, "cache"], progress.cache_memory_bytes)
            memory.add_metric([run, "peak"], progress.peak_memory_bytes)
            memory.add_metric([run, "resident"], progress.resident_memory_bytes)
    yield memory
