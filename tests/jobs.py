"""Jobs as the tests of the trainer's parts put them on the queue and work on them."""

from pathlib import Path

from shared.registry.store import Registry
from trainer_service.jobs.events import Event, JobState, StateChanged, TimedEvent
from trainer_service.jobs.kinds import EvaluationSpec
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.spec import JobSpec, TrainingRequest, resolve
from trainer_service.training.corpus import DatasetSpec

EVALUATION = EvaluationSpec("best", DatasetSpec(()))


def training(tmp_path: Path, name: str = "", notes: str = "", **overrides: str) -> JobSpec:
    """A run on the built-in stories."""
    request = TrainingRequest(overrides={"max_steps": "7"} | overrides, name=name, notes=notes)
    return resolve(request, Registry(tmp_path / "registry"))


def start(queue: JobQueue, job: str, attempt: int = 1) -> None:
    """As a worker and its process do."""
    queue.line.remove(job, attempt)
    assert queue.tell(job, attempt, [TimedEvent(StateChanged(JobState.RUNNING))])


def tell(queue: JobQueue, job: str, *events: Event) -> None:
    """As the first attempt does."""
    assert queue.tell(job, 1, [TimedEvent(event) for event in events])


def finish(queue: JobQueue, job: str) -> None:
    """As the first attempt does at its end."""
    tell(queue, job, StateChanged(JobState.FINISHED))


def told(queue: JobQueue, job: str) -> list[Event]:
    """All that a job told."""
    return [timed.event for _, timed in queue.read_events(job)]
