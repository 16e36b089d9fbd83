"""What the work on a job is given."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.device.accelerator import Accelerator
from shared.registry.bucket import Bucket
from shared.registry.decisions import BestBy
from shared.registry.registry import Registry
from shared.registry.retention import Retention
from shared.service.settings import Directories
from trainer_service.distillation.groq_settings import GroqSettings
from trainer_service.jobs.events import Evaluation, Event, Preparation
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.text.shared_tokens import SharedTokens


@dataclass(frozen=True)
class Attempt:
    """An attempt at a job: its number, its folders, what stays in the registry, its device, and where it sends events.

    The work calls `stop_requested` at short intervals, and ends if it returns True. `began_s` is a time of the
    monotonic clock, `best_by` what the label `best` compares, and `groq` the large teacher. `job` is the id of the job,
    empty if there is none, and `settle` keeps a specification without labels for the attempts that follow.
    """

    number: int
    directories: Directories
    retention: Retention
    device: Accelerator
    emit: Callable[[Event], None]
    stop_requested: Callable[[], bool]
    began_s: float = field(default_factory=time.monotonic)
    best_by: BestBy = BestBy.TRAINING
    groq: GroqSettings = field(default_factory=GroqSettings)
    job: str = ""
    settle: Callable[[EvaluateSpec], object] = lambda _: None

    def open_registry(self) -> Registry:
        """Returns the registry."""
        return self.directories.open_registry(self.best_by)

    def shared_tokens(self) -> SharedTokens | None:
        """Returns where machines share what they have prepared."""
        return shared_tokens(self.directories)


def shared_tokens(directories: Directories) -> SharedTokens | None:
    """Returns where machines share prepared tokens: beside a registry in object storage; None if it is on a disk."""
    return SharedTokens(Bucket(directories.registry_url)) if directories.registry_url else None


class Stopped(Exception):
    """The work was stopped before it had a result to keep."""


class Paused(Exception):
    """The work can go on only at a later time, in seconds since the epoch; its text is a sentence that says why."""

    def __init__(self, until: float, reason: str) -> None:
        super().__init__(reason)
        self.until = until


class Suspended(Exception):
    """The run has come to the step at which its job waits; `evaluation` is that of this step."""

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__()
        self.evaluation = evaluation


def preparation_report(attempt: Attempt) -> Callable[[str, float | None], None]:
    """Returns a function that takes the current stage of some work and the fraction that is done.

    It can be called at any rate: it emits an event when the stage or the percentage has changed. It raises `Stopped`
    if the attempt has to end.
    """
    last: tuple[str, int | None] | None = None

    def report(stage: str, fraction: float | None) -> None:
        nonlocal last
        if attempt.stop_requested():
            raise Stopped
        now = (stage, None if fraction is None else int(100 * fraction))
        if now != last:
            attempt.emit(Preparation(stage, fraction))
            last = now

    return report
