"""Jobs, as the tests of the trainer queue them and work on them."""

from pathlib import Path

from tests.registries import disk_registry
from trainer_service.jobs.events import Event, JobState, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import EvaluateSpec, PrepareSpec, TrainSpec
from trainer_service.text.corpus import DatasetSpec

EVALUATION = EvaluateSpec("best", DatasetSpec(()))


def training(tmp_path: Path, name: str = "", notes: str = "", needs: str = "", **overrides: str) -> TrainSpec:
    """Returns a run on the built-in stories."""
    request = TrainRequest(overrides={"max_steps": "7"} | overrides, name=name, notes=notes, needs=needs)
    return request.resolve(disk_registry(tmp_path / "registry"))


def preparation(spec: TrainSpec) -> PrepareSpec:
    """Returns the job that prepares the tokens of a run."""
    return PrepareSpec(**{name: value for name, value in vars(spec).items() if name != "until"})


def start(queue: JobQueue, job: str, attempt: int = 1) -> None:
    """Starts an attempt, as a worker and its process do."""
    queue.attempts.remove(job, attempt)
    assert queue.store.report(job, attempt, [TimedEvent(StateChanged(JobState.RUNNING))])


def report(queue: JobQueue, job: str, *events: Event) -> None:
    """Reports events, as the first attempt does."""
    assert queue.store.report(job, 1, [TimedEvent(event) for event in events])


def finish(queue: JobQueue, job: str) -> None:
    """Finishes a job, as its first attempt does."""
    report(queue, job, StateChanged(JobState.FINISHED))


def events_of(queue: JobQueue, job: str) -> list[Event]:
    """Returns all events of a job."""
    return [timed.event for _, timed in queue.store.read_events(job)]
