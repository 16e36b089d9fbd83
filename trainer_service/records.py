"""A job as it stands, and as Redis holds it."""

import logging
from dataclasses import dataclass
from typing import TypeVar

from shared.errors import InvalidArgument
from trainer_service.events import Evaluation, JobState, Progress, RunStarted, TimedEvent
from trainer_service.kinds import Kind, Spec, spec_from_json

logger = logging.getLogger(__name__)

# The fields of a job's hash.
Fields = dict[str, str]

Told = TypeVar("Told", RunStarted, Progress, Evaluation)


@dataclass(frozen=True)
class JobRecord:
    """A job as it stands; times in seconds since the epoch, None for what has not happened.

    `attempt` counts from 1. `after` names the jobs that must finish first. `is_held` says whether a process works on it
    now.
    """

    id: str
    kind: Kind
    spec: Spec
    after: tuple[str, ...]
    state: JobState
    attempt: int
    enqueued_at: float
    started_at: float | None
    ended_at: float | None
    started: RunStarted | None
    progress: Progress | None
    evaluation: Evaluation | None
    reason: str
    is_held: bool


def read_record(job_id: str, fields: Fields, is_held: bool) -> JobRecord | None:
    """The record of a job, None where it has no fields, or some that cannot be understood."""

    def moment(name: str) -> float | None:
        return float(fields[name]) if name in fields else None

    if not fields:
        return None
    try:
        kind = Kind(fields["kind"])
        spec = spec_from_json(kind, fields["spec"])
    except (InvalidArgument, ValueError, KeyError) as error:
        logger.warning("job %s is left out: %s", job_id, error)
        return None
    return JobRecord(
        id=job_id,
        kind=kind,
        spec=spec,
        after=tuple(fields["after"].split()),
        state=JobState(fields["state"]),
        attempt=int(fields["attempt"]),
        enqueued_at=float(fields["enqueued_at"]),
        started_at=moment("started_at"),
        ended_at=moment("ended_at"),
        started=last_told(RunStarted, fields),
        progress=last_told(Progress, fields),
        evaluation=last_told(Evaluation, fields),
        reason=fields.get("reason", ""),
        is_held=is_held,
    )


def last_told(kind: type[Told], fields: Fields) -> Told | None:
    """The last event of a kind that a job told."""
    if kind.__name__ not in fields:
        return None
    event = TimedEvent.from_json(fields[kind.__name__]).event
    assert isinstance(event, kind)
    return event
