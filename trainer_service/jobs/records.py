"""The record of a job, and how it is read from Redis."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from shared.errors import InvalidArgument, shown
from trainer_service.jobs.events import Evaluation, JobState, Progress, RunStarted, TimedEvent
from trainer_service.jobs.specs import Kind, Spec, spec_from_json

# The fields of a job's hash.
Fields = dict[str, str]

Kept = TypeVar("Kept", RunStarted, Progress, Evaluation)

# The end of the year 9999, in seconds since the epoch.
_LATEST_S = 253402300800
# The field that holds the evaluation with the lowest loss.
BEST = "best"


@dataclass(frozen=True)
class JobRecord:
    """The current state of a job; times in seconds since the epoch, None for what has not happened.

    `kind` and `spec` are None if Redis holds an invalid job; then `reason` says so, and an unknown state counts as
    failed. `ticket` numbers all jobs in the order in which they were enqueued, from 1, and `ahead` is the number of
    jobs that come before a queued one. `attempt` counts from 1. `after` names the jobs that must finish first.
    `is_held` says whether a process works on the job now. `best` is the evaluation with the lowest loss.
    """

    id: str
    kind: Kind | None
    spec: Spec | None
    after: tuple[str, ...]
    state: JobState
    ticket: int
    ahead: int | None
    attempt: int
    enqueued_at: float | None
    started_at: float | None
    ended_at: float | None
    started: RunStarted | None
    progress: Progress | None
    evaluation: Evaluation | None
    best: Evaluation | None
    reason: str
    is_held: bool


@dataclass(frozen=True)
class Lease:
    """The lease of an attempt that makes progress: how many seconds it lasts, and a beat that no other renewal has."""

    attempt: int
    seconds: int
    beat: str

    def to_text(self) -> str:
        """Returns the text that Redis stores."""
        return f"{self.attempt} {self.seconds} {self.beat}"

    @classmethod
    def from_text(cls, text: bytes | None) -> Self | None:
        """Reads what `to_text` writes; returns None for any other text."""
        parts = (text or b"").decode(errors="replace").split()
        if len(parts) != 3 or not (parts[0].isdecimal() and parts[1].isdecimal()) or len(parts[0] + parts[1]) > 18:
            return None
        return cls(int(parts[0]), int(parts[1]), parts[2])


@dataclass(frozen=True)
class OpenJob:
    """A job that has not ended. `lease` is the lease of its latest attempt, None if that attempt has none."""

    fields: Fields
    state: JobState
    attempt: int
    lease: Lease | None

    @property
    def is_sent(self) -> bool:
        """Whether the latest attempt has been handed to the workers."""
        return attempt_of(self.fields, "sent") == self.attempt


def read_record(job_id: str, fields: Fields, ticket: int = 0, is_held: bool = False) -> JobRecord:
    """Reads the record of a job from its fields, except `ahead`; invalid fields are left out."""
    kind, spec, reason = None, None, fields.get("reason", "")
    try:
        kind = Kind(fields["kind"])
        spec = spec_from_json(kind, fields["spec"])
    except (InvalidArgument, ValueError, KeyError) as error:
        reason = f"This job cannot be understood: {shown(error, 160)}"
    return JobRecord(
        id=job_id,
        kind=kind,
        spec=spec,
        after=tuple(fields.get("after", "").split()),
        state=state_of(fields) or JobState.FAILED,
        ticket=ticket,
        ahead=None,
        attempt=attempt_of(fields) or 1,
        enqueued_at=_moment(fields, "enqueued_at"),
        started_at=_moment(fields, "started_at"),
        ended_at=_moment(fields, "ended_at"),
        started=last_event(RunStarted, fields),
        progress=last_event(Progress, fields),
        evaluation=last_event(Evaluation, fields),
        best=last_event(Evaluation, fields, BEST),
        reason=reason,
        is_held=is_held,
    )


def state_of(fields: Fields) -> JobState | None:
    """Returns the state of a job; None if it is invalid."""
    try:
        return JobState(fields.get("state"))
    except ValueError:
        return None


def attempt_of(fields: Mapping[str, str], name: str = "attempt") -> int | None:
    """Returns the number of an attempt; None if it is missing or invalid."""
    return number_of(fields.get(name, ""))


def number_of(text: str) -> int | None:
    """Reads a number of at most nine digits; returns None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= 9 else None


def last_event(kind: type[Kept], fields: Fields, name: str = "") -> Kept | None:
    """Returns the last event of a kind, or the one in the field `name`; None if it is missing or invalid."""
    try:
        event = TimedEvent.from_json(fields[name or kind.__name__]).event
    except (KeyError, ValueError):
        return None
    return event if isinstance(event, kind) else None


def _moment(fields: Fields, name: str) -> float | None:
    try:
        seconds = float(fields.get(name, "nan"))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds < _LATEST_S else None
