"""The record of a job, and how it is read from Redis."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from shared.errors import InvalidArgument, shown
from trainer_service.jobs.events import Evaluation, JobState, Preparation, Progress, RunStarted, TimedEvent
from trainer_service.jobs.needs import Needs
from trainer_service.jobs.specs import Kind, Spec, spec_from_json

# The fields of a job's hash.
Fields = dict[str, str]

Kept = TypeVar("Kept", Preparation, RunStarted, Progress, Evaluation)

# The end of the year 9999, in seconds since the epoch.
_LATEST_S = 253402300800
# The field that holds the evaluation with the lowest loss.
BEST = "best"
# The field of a job that waits until somebody extends it.
SUSPENDED = "suspended"


@dataclass(frozen=True)
class JobRecord:
    """The current state of a job; times in seconds since the epoch, None for what has not happened.

    `kind` and `spec` are None if Redis holds an invalid job; then `reason` says so. A job with an invalid state or
    attempt counts as failed. `ticket` numbers all jobs in the order in which they were enqueued, from 1, and `ahead` is
    the number of jobs that come before a queued one. `awaited` names the worker that a queued job waits for if no live
    one meets its needs, as in `a worker with a GPU`, and is empty otherwise. `attempt` counts from 1; `sent` is the
    last attempt that was handed to the workers; the next one follows after `delay_s`, and not before `until` if the job
    is paused. `is_suspended` says that a queued job waits at its step until somebody extends it; it then has neither
    `ahead` nor `awaited`. `after` names the jobs that must finish first. `lease` is the lease of the latest attempt.
    `stepping_since` is when the latest attempt that trains began its first step. `best` is the evaluation with the
    lowest loss.
    """

    id: str
    kind: Kind | None
    spec: Spec | None
    after: tuple[str, ...]
    state: JobState
    ticket: int
    ahead: int | None
    awaited: str
    attempt: int
    sent: int | None
    delay_s: float
    until: float | None
    is_suspended: bool
    lease: "Lease | None"
    enqueued_at: float | None
    started_at: float | None
    ended_at: float | None
    preparation: Preparation | None
    started: RunStarted | None
    stepping_since: float | None
    progress: Progress | None
    evaluation: Evaluation | None
    best: Evaluation | None
    reason: str

    @property
    def needs(self) -> Needs:
        """What the job needs of a worker; nothing if the job is invalid."""
        return self.spec.wants if self.spec else Needs()

    @property
    def is_ready(self) -> bool:
        """Whether the job waits for nothing but a worker."""
        return self.state is JobState.QUEUED and self.sent == self.attempt

    @property
    def is_held(self) -> bool:
        """Whether a process works on the job now."""
        return self.lease is not None


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


def read_record(job_id: str, fields: Fields, ticket: int = 0, lease: Lease | None = None) -> JobRecord:
    """Reads the record of a job from its fields, except `ahead` and `awaited`; invalid fields are left out."""
    kind, spec, reason = None, None, fields.get("reason", "")
    attempt, state = attempt_of(fields), state_of(fields) or JobState.FAILED
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
        state=state,
        ticket=ticket,
        ahead=None,
        awaited="",
        attempt=attempt or 1,
        sent=attempt_of(fields, "sent"),
        delay_s=seconds_of(fields, "delay_s") or 0.0,
        until=seconds_of(fields, "until"),
        is_suspended=state is JobState.QUEUED and SUSPENDED in fields,
        lease=lease if lease and lease.attempt == attempt else None,
        enqueued_at=seconds_of(fields, "enqueued_at"),
        started_at=seconds_of(fields, "started_at"),
        ended_at=seconds_of(fields, "ended_at"),
        preparation=last_event(Preparation, fields),
        started=last_event(RunStarted, fields),
        stepping_since=_time_of(RunStarted, fields),
        progress=last_event(Progress, fields),
        evaluation=last_event(Evaluation, fields),
        best=last_event(Evaluation, fields, BEST),
        reason=reason,
    )


def state_of(fields: Fields) -> JobState | None:
    """Returns the state of a job; None if the state or the number of the attempt is invalid."""
    try:
        return None if attempt_of(fields) is None else JobState(fields.get("state"))
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
    timed = _timed(fields, name or kind.__name__)
    return timed.event if timed and isinstance(timed.event, kind) else None


def _time_of(kind: type[Kept], fields: Fields) -> float | None:
    timed = _timed(fields, kind.__name__)
    return timed.time if timed else None


def _timed(fields: Fields, name: str) -> TimedEvent | None:
    try:
        return TimedEvent.from_json(fields[name])
    except (KeyError, ValueError):
        return None


def seconds_of(fields: Fields, name: str) -> float | None:
    """Returns a time or a duration in seconds; None if it is missing or invalid."""
    try:
        seconds = float(fields.get(name, "nan"))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds < _LATEST_S else None
