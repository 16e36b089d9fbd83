"""Translates protobuf messages to values and back; besides this file only `server.py` and `client.py` see messages."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from shared.errors import InvalidArgument
from shared.pb.training.v1 import training_pb2 as pb
from shared.text import shorten, valid_unicode
from trainer_service.jobs import events
from trainer_service.jobs.events import JobState, TimedEvent
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import EvaluateRequest, JobRequest, PrepareRequest, StoriesRequest, TrainRequest
from trainer_service.jobs.specs import EvaluateSpec, Kind, RunSpec

STATES: dict[JobState, pb.JobState] = {state: getattr(pb, f"JOB_STATE_{state.name}") for state in JobState}
KINDS: dict[Kind, pb.JobKind] = {kind: getattr(pb, f"JOB_KIND_{kind.name}") for kind in Kind}

# The field of the response for each event, by the name of the message, which is also the name of the event.
_EVENTS = {each.message_type.name: each.name for each in pb.WatchJobResponse.DESCRIPTOR.fields if each.message_type}
# Values whose fields have another name.
_RENAMED = {"eta_s": "eta_seconds", "preparation_s": "preparation_seconds"}

# Limits on the names of a job's files together, and on any text.
_FILES_LENGTH = 16_384
_TEXT_LENGTH = 4096
# The years 1 and 9999, which a timestamp cannot leave, in seconds since the epoch.
_EARLIEST_S, _LATEST_S = -62135596800, 253402300799

_REQUESTS: dict[Kind, type[JobRequest]] = {
    request.kind: request for request in (PrepareRequest, TrainRequest, EvaluateRequest, StoriesRequest)
}


def request_from_pb(message: pb.EnqueueJobRequest) -> JobRequest:
    """Reads a request; raises `InvalidArgument` if its kind is unknown or has no such field.

    The fields of the message have the names of the requests' fields.
    """
    (kind,) = kinds_from_pb([message.kind or pb.JOB_KIND_TRAIN])
    known = [each.name for each in dataclasses.fields(_REQUESTS[kind])]
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name == "kind":
            continue
        if field.name not in known:
            raise InvalidArgument(
                f"{field.name} is set, but a job of the kind {kind.value} has only {', '.join(known)}."
            )
        if isinstance(value, Mapping):
            value = dict(value)
        elif not isinstance(value, str | int | float):
            value = tuple(value)
        values[field.name] = value
    return _REQUESTS[kind](**values)


def request_to_pb(request: JobRequest) -> pb.EnqueueJobRequest:
    """Writes a request."""
    return pb.EnqueueJobRequest(kind=KINDS[request.kind], **vars(request))


def kinds_from_pb(numbers: Sequence[int]) -> list[Kind]:
    """Reads kinds of jobs; raises `InvalidArgument` if one of them is unknown."""
    kinds = [kind for kind, number in KINDS.items() if number in numbers]
    if len(kinds) != len(set(numbers)):
        raise InvalidArgument("There is no such kind of job.")
    return kinds


def job_to_pb(record: JobRecord) -> pb.Job:
    """Writes the current state of a job, shortened to what a message may hold."""
    spec = record.spec
    named: dict[str, str] = {}
    if isinstance(spec, EvaluateSpec):
        named = {"version": _text(spec.version)}
    elif isinstance(spec, RunSpec):
        named = {"run": _text(spec.run), "preset": _text(spec.preset), "notes": _text(spec.notes)}
    return pb.Job(
        id=_text(record.id),
        **named,
        kind=KINDS[record.kind] if record.kind else pb.JOB_KIND_UNSPECIFIED,
        after=[_text(job) for job in record.after],
        attempt=record.attempt,
        state=STATES[record.state],
        dataset=_files(spec.data.dataset) if spec else [],
        enqueued_at=_time_to_pb(record.enqueued_at) if record.enqueued_at else None,
        started_at=_time_to_pb(record.started_at) if record.started_at else None,
        ended_at=_time_to_pb(record.ended_at) if record.ended_at else None,
        progress=_values(record.progress) if record.progress else None,
        evaluation=_values(record.evaluation) if record.evaluation else None,
        reason=_text(record.reason),
        jobs_ahead=record.ahead,
        needs=_text(spec.needs) if isinstance(spec, RunSpec | EvaluateSpec) else "",
        awaited=record.awaited,
        best_evaluation=_values(record.best) if record.best else None,
    )


def event_to_pb(timed: TimedEvent) -> pb.WatchJobResponse:
    """Writes an event of a job."""
    values: dict[str, Any] = {_EVENTS[type(timed.event).__name__]: _values(timed.event)}
    return pb.WatchJobResponse(time=_time_to_pb(timed.time), **values)


def _values(event: events.Event) -> dict[str, Any]:
    """Returns the fields of the message of an event."""
    return {_RENAMED.get(name, name): _value(value) for name, value in vars(event).items()}


def _value(value: object) -> object:
    if isinstance(value, JobState):
        return STATES[value]
    return _text(value) if isinstance(value, str) else value


def _files(names: Sequence[str]) -> list[str]:
    """Returns the first names, up to a limit on their total length, and the number of the others."""
    listed: list[str] = []
    room = _FILES_LENGTH
    for name in names:
        text = _text(name)
        if len(text) > room:
            return [*listed, f"… and {len(names) - len(listed):,} more"]
        room -= len(text)
        listed.append(text)
    return listed


def _text(text: str) -> str:
    """Shortens a text for a message, and escapes bytes that are not UTF-8."""
    return valid_unicode(shorten(text, _TEXT_LENGTH))


def _time_to_pb(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(min(max(seconds, _EARLIEST_S), _LATEST_S) * 1e9))
    return timestamp
