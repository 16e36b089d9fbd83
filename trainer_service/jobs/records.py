"""A job as it stands, and as Redis holds it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from shared.errors import InvalidArgument, shown
from trainer_service.jobs.events import Evaluation, JobState, Progress, RunStarted, TimedEvent
from trainer_service.jobs.kinds import Kind, Spec, spec_from_json

# The fields of a job's hash.
Fields = dict[str, str]

Told = TypeVar("Told", RunStarted, Progress, Evaluation)

# The end of the year 9999, in seconds since the epoch.
_LATEST_S = 253402300800
# Under this name a hash has the evaluation with the lowest loss of all that the job told.
BEST = "best"


@dataclass(frozen=True)
class JobRecord:
    """A job as it stands; times in seconds since the epoch, None for what has not happened.

    `kind` and `spec` are None if what Redis holds cannot be understood; `reason` says so then, and a state that is not
    known counts as failed. `place` orders all jobs by when they were enqueued, from 1 on, and `ahead` says how many
    others come before one that is queued. `attempt` counts from 1. `after` names the jobs that must finish first.
    `is_held` says whether a process works on it now. `best` is the evaluation with the lowest loss.
    """

    id: str
    kind: Kind | None
    spec: Spec | None
    after: tuple[str, ...]
    state: JobState
    place: int
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


def read_record(job_id: str, fields: Fields, place: int = 0, is_held: bool = False) -> JobRecord:
    """The record of a job from its fields, as far as they can be understood; how many are ahead is not known yet."""
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
        place=place,
        ahead=None,
        attempt=attempt_of(fields) or 1,
        enqueued_at=_moment(fields, "enqueued_at"),
        started_at=_moment(fields, "started_at"),
        ended_at=_moment(fields, "ended_at"),
        started=last_told(RunStarted, fields),
        progress=last_told(Progress, fields),
        evaluation=last_told(Evaluation, fields),
        best=last_told(Evaluation, fields, BEST),
        reason=reason,
        is_held=is_held,
    )


def state_of(fields: Fields) -> JobState | None:
    """Where a job stands; None if that cannot be understood."""
    try:
        return JobState(fields.get("state"))
    except ValueError:
        return None


def attempt_of(fields: Mapping[str, str], name: str = "attempt") -> int | None:
    """The number of an attempt; None if there is none, or one that cannot be understood."""
    return number_of(fields.get(name, ""))


def number_of(text: str) -> int | None:
    """A number that is not negative and has at most nine digits; None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= 9 else None


def last_told(kind: type[Told], fields: Fields, name: str = "") -> Told | None:
    """The last event of a kind that a job told, or the one under another name; None if it cannot be understood."""
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
