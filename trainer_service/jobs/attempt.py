"""What an attempt at a job is given to work with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.device.accelerator import Accelerator
from shared.registry.retention import Retention
from shared.service.settings import Directories
from trainer_service.jobs.events import Event, Preparation


@dataclass(frozen=True)
class Attempt:
    """Which attempt it is, where it computes and writes, what it leaves of what was written before, and whom it tells.

    It asks `stop_requested` between any two pieces of work, and ends where that says so. `began_s` is a moment of the
    monotonic clock.
    """

    number: int
    directories: Directories
    retention: Retention
    device: Accelerator
    tell: Callable[[Event], None]
    stop_requested: Callable[[], bool]
    began_s: float = field(default_factory=time.monotonic)


class Stopped(Exception):
    """The work was ended before it had anything to keep."""


def preparation_report(attempt: Attempt) -> Callable[[str, float | None], None]:
    """Returns a function that takes the stage of some work and how much of it is done, as often as one likes.

    It raises `Stopped` if the attempt is to end, and tells what has changed by a percent.
    """
    told: tuple[str, int | None] | None = None

    def report(stage: str, fraction: float | None) -> None:
        nonlocal told
        if attempt.stop_requested():
            raise Stopped
        now = (stage, None if fraction is None else int(100 * fraction))
        if now != told:
            attempt.tell(Preparation(stage, fraction))
            told = now

    return report
