"""Sweeps whose candidates the tests train by hand: a real Redis and a registry, and no process."""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from shared.registry.history import EvaluationLine, ReportLine
from tests.events import PROGRESS
from tests.jobs import start
from tests.registries import disk_registry
from tests.shared.registry.scenarios import write_model
from trainer_service.jobs.events import Evaluation, Event, JobState, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import TrainSpec
from trainer_service.sweep.grid import members, parse_tries
from trainer_service.sweep.halving import Halving
from trainer_service.sweep.sweep import Sweep

TRIED = "seed=1,2,3,4"


@dataclass
class Played:
    """A sweep of four candidates with rungs at the steps 10, 20 and 40."""

    queue: JobQueue
    folder: Path
    tried: str = TRIED
    keep: Fraction = Fraction(1, 2)
    overrides: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = disk_registry(self.folder / "registry")

    def sweep(self) -> Sweep:
        """Returns the sweep as each call of the command makes it."""
        values = {"max_steps": "40", "evaluation_interval": "10"} | self.overrides
        common = TrainRequest(name="try", overrides=values)
        found = members(common, parse_tries(self.tried), self.registry)
        halving = Halving.of(len(found), 40, 10, 3, self.keep)
        return Sweep("try", found, halving, self.queue, self.registry, self.folder / "data")

    def job(self, number: int) -> JobRecord:
        """Returns the job of a candidate."""
        (job,) = (job for job in self.queue.store.jobs() if job.spec and job.spec.run == f"try-{number}")
        return job

    def until(self, number: int) -> int | None:
        """Returns the step to which a candidate trains."""
        spec = self.job(number).spec
        assert isinstance(spec, TrainSpec)
        return spec.until

    def train(self, number: int, loss: float) -> None:
        """Trains a candidate to its next rung, or to its end, as a worker and its process do."""
        job = self.job(number)
        assert isinstance(job.spec, TrainSpec) and job.spec.until is not None and not job.is_suspended
        step = job.spec.until
        start(self.queue, job.id, job.attempt)
        measured = Evaluation(step, loss, loss, loss / 2)
        events: list[Event] = [replace(PROGRESS, step=step, max_steps=40), measured]
        assert self.queue.store.report(job.id, job.attempt, [TimedEvent(event) for event in events])
        fence = self.registry.take_over(job.spec.run)
        self.registry.histories.writer(fence, step - 1).append(
            ReportLine(step, 100 * step, loss, 0.0, 0.0, 50.0, 0, 0, 0, 0.0, 1),
            EvaluationLine(step, 100 * step, loss, loss / 2, None, 0.0, 1),
        )
        self.registry.write_state(fence, step, write_model)
        if step == 40:
            self.end(number, JobState.FINISHED)
        else:
            assert self.queue.suspend(job.id, job.attempt, measured)

    def end(self, number: int, state: JobState, reason: str = "") -> None:
        """Ends the job of a candidate."""
        job = self.job(number)
        if job.state is JobState.QUEUED:
            start(self.queue, job.id, job.attempt)
        assert self.queue.store.report(job.id, job.attempt, [TimedEvent(StateChanged(state, reason))])
