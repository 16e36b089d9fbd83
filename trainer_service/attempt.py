"""What an attempt at a job is given to work with."""

from collections.abc import Callable
from dataclasses import dataclass

from shared.accelerator import Accelerator
from shared.registry.retention import Retention
from shared.settings import Directories
from trainer_service.events import Event


@dataclass(frozen=True)
class Attempt:
    """Which attempt it is, where it computes and writes, what it leaves of what was written before, and whom it tells.

    It asks `stop_requested` between any two pieces of work, and ends where that says so.
    """

    number: int
    directories: Directories
    retention: Retention
    device: Accelerator
    tell: Callable[[Event], None]
    stop_requested: Callable[[], bool]


class Stopped(Exception):
    """The work was ended before it had anything to keep."""
