"""The events of a job, which travel through Redis as JSON."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from typing import get_args

from trainer_service.training.report import Report


class JobState(Enum):
    """The state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether no other state follows."""
        return self in (JobState.FINISHED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class StateChanged:
    """The job has a new state; `reason` says why, if that is not obvious."""

    state: JobState
    reason: str = ""


@dataclass(frozen=True)
class Preparation:
    """Work before the first step; `fraction` is from 0 to 1, None if the end is not known."""

    stage: str
    fraction: float | None = None


@dataclass(frozen=True)
class RunStarted:
    """The first step begins; the run has trained on `first_tokens` tokens before.

    `preparation_s` is the time that the attempt took until this event, and `memory_limit_bytes` the resident memory
    that its process may use.
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
    memory_limit_bytes: int | None = None


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

    In training, `training_loss` is the loss of the last steps. A job that evaluates has no such loss, but has the
    `version` that it measured, the number of `windows`, the name of the `text`, and the `method_digest` of the
    record in the registry.
    """

    step: int
    training_loss: float | None
    validation_loss: float
    bits_per_byte: float
    version: int | None = None
    windows: int | None = None
    text: str = ""
    method_digest: str = ""


@dataclass(frozen=True)
class VersionPublished:
    """A version was published and can be served."""

    version: int
    step: int
    validation_loss: float
    bits_per_byte: float
    best: bool


@dataclass(frozen=True)
class Notice:
    """A sentence that a user should read."""

    text: str


Event = StateChanged | Preparation | RunStarted | Progress | Evaluation | VersionPublished | Notice

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


@dataclass(frozen=True)
class TimedEvent:
    """An event and when it happened, in seconds since the epoch."""

    event: Event
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """Returns the text that Redis stores."""
        values = asdict(self.event)
        if isinstance(self.event, StateChanged):
            values["state"] = self.event.state.value
        return json.dumps({"kind": type(self.event).__name__, "time": self.time, "values": values})

    @classmethod
    def from_json(cls, text: str | bytes) -> "TimedEvent":
        """Reads what `to_json` writes; raises `ValueError` for any other text."""
        try:
            data = json.loads(text)
            return cls(_typed(_KINDS[data["kind"]], data["values"]), _number(data["time"]))
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"it is not an event: {error!r}") from error


def _typed(kind: type[Event], values: Mapping[str, object]) -> Event:
    """Checks the types of all values: other programs may have written to Redis."""
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
            raise TypeError(f"{each.name} has another type")
        typed[each.name] = value
    return kind(**typed)  # type: ignore[arg-type]


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise TypeError("the value is not a finite number")
    return float(value)  # type: ignore[arg-type]
