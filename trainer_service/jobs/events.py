"""What a job tells while it goes on, as values that travel through Redis as JSON."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from typing import get_args

from trainer_service.training.report import Report


class JobState(Enum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self in (JobState.FINISHED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class StateChanged:
    """The job is in another state; `reason` says why, where that is not plain."""

    state: JobState
    reason: str = ""


@dataclass(frozen=True)
class Preparation:
    """Work before the first step; `fraction` from 0 to 1 where the end is known."""

    stage: str
    fraction: float | None = None


@dataclass(frozen=True)
class RunStarted:
    """The first step is about to be taken; the run has trained on `first_tokens` tokens before.

    `preparation_s` is what the attempt took until here.
    """

    parameters: int
    embedding_parameters: int
    train_tokens: int
    validation_tokens: int
    tokenizer: str
    first_step: int
    first_tokens: int
    max_steps: int
    device: str
    preparation_s: float | None = None


@dataclass(frozen=True)
class Progress(Report):
    """Steps were taken, of `max_steps`."""

    max_steps: int
    active_memory_bytes: int
    cache_memory_bytes: int
    peak_memory_bytes: int
    resident_memory_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss was measured, in nats per token and bits per byte.

    In training `training_loss` is that of the last steps. An evaluation of its own has no such loss, but says what it
    measured on what: `version`, and how many `windows` of which `text`.
    """

    step: int
    training_loss: float | None
    validation_loss: float
    bits_per_byte: float
    version: int | None = None
    windows: int | None = None
    text: str = ""


@dataclass(frozen=True)
class VersionPublished:
    """A version can be served."""

    version: int
    step: int
    validation_loss: float
    bits_per_byte: float
    best: bool


@dataclass(frozen=True)
class Notice:
    """Something that a person should know."""

    text: str


Event = StateChanged | Preparation | RunStarted | Progress | Evaluation | VersionPublished | Notice

_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (StateChanged, Preparation, RunStarted, Progress, Evaluation, VersionPublished, Notice)
}


@dataclass(frozen=True)
class TimedEvent:
    """An event and when it happened, in seconds since the epoch."""

    event: Event
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """As Redis holds it."""
        values = asdict(self.event)
        if isinstance(self.event, StateChanged):
            values["state"] = self.event.state.value
        return json.dumps({"kind": type(self.event).__name__, "time": self.time, "values": values})

    @classmethod
    def from_json(cls, text: str | bytes) -> "TimedEvent":
        """The inverse of `to_json`; raises `ValueError` where the text is no event."""
        try:
            data = json.loads(text)
            return cls(_typed(_KINDS[data["kind"]], data["values"]), _number(data["time"]))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no event: {error!r}") from error


def _typed(kind: type[Event], values: Mapping[str, object]) -> Event:
    """An event from what JSON holds: others than this program may have written to Redis."""
    typed: dict[str, object] = {}
    for each in fields(kind):
        if each.name not in values and each.default is not MISSING:
            continue
        value, kinds = values[each.name], get_args(each.type) or (each.type,)
        if JobState in kinds:
            value = JobState(value)
        elif float in kinds and value is not None:
            value = _number(value)
        if type(value) not in kinds or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            raise TypeError(f"{each.name} is of another kind")
        typed[each.name] = value
    return kind(**typed)  # type: ignore[arg-type]


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise TypeError("there is something else than a number")
    return float(value)  # type: ignore[arg-type]
