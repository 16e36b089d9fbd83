"""What a job tells while it goes on, as values that travel through Redis as JSON."""

import json
import time
from dataclasses import asdict, dataclass, field
from enum import Enum


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
    """The first step is about to be taken; the run has trained on `first_tokens` tokens before."""

    parameters: int
    embedding_parameters: int
    train_tokens: int
    validation_tokens: int
    tokenizer: str
    first_step: int
    first_tokens: int
    max_steps: int
    device: str


@dataclass(frozen=True)
class Progress:
    """Steps were taken. Losses in nats per token; `tokens` counts those of resumed parts too."""

    step: int
    max_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    eta_s: float
    best_validation_loss: float | None
    active_memory_bytes: int
    cache_memory_bytes: int
    peak_memory_bytes: int
    resident_memory_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss was measured, in nats per token and bits per byte."""

    step: int
    training_loss: float
    validation_loss: float
    bits_per_byte: float


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
        """The inverse of `to_json`."""
        data = json.loads(text)
        values = data["values"]
        kind = _KINDS[data["kind"]]
        if kind is StateChanged:
            values["state"] = JobState(values["state"])
        return cls(kind(**values), data["time"])
