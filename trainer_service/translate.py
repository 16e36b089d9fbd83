"""Jobs and events as protobuf messages; protobuf stops here."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from shared.errors import InvalidArgument
from shared.pb.training.v1 import training_pb2 as pb
from trainer_service import events
from trainer_service.events import JobState, TimedEvent
from trainer_service.kinds import EvaluationSpec, JobRequest, Kind
from trainer_service.records import JobRecord
from trainer_service.spec import TrainingRequest

STATES = {
    JobState.QUEUED: pb.JOB_STATE_QUEUED,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.CANCELLING: pb.JOB_STATE_CANCELLING,
    JobState.FINISHED: pb.JOB_STATE_FINISHED,
    JobState.FAILED: pb.JOB_STATE_FAILED,
    JobState.CANCELLED: pb.JOB_STATE_CANCELLED,
}


KINDS = {
    Kind.PREPARE: pb.JOB_KIND_PREPARE,
    Kind.TRAIN: pb.JOB_KIND_TRAIN,
    Kind.EVALUATE: pb.JOB_KIND_EVALUATE,
}


def request_from_pb(message: pb.EnqueueJobRequest) -> JobRequest:
    """What a client asks for; raises `InvalidArgument` on a kind that does not exist."""
    training = TrainingRequest(
        preset=message.preset,
        dataset=tuple(message.dataset),
        validation=tuple(message.validation),
        resume=message.resume if message.HasField("resume") else None,
        overrides=dict(message.overrides),
    )
    (kind,) = kinds_from_pb([message.kind or pb.JOB_KIND_TRAIN])
    return JobRequest(kind, training, message.version, tuple(message.after))


def kinds_from_pb(numbers: Sequence[int]) -> list[Kind]:
    """Kinds of jobs; raises `InvalidArgument` where one does not exist."""
    kinds = [kind for kind, number in KINDS.items() if number in numbers]
    if len(kinds) != len(set(numbers)):
        raise InvalidArgument("There is no such kind of job.")
    return kinds


def job_to_pb(record: JobRecord) -> pb.Job:
    """A job as it stands."""
    spec = record.spec
    named = {"version": spec.version} if isinstance(spec, EvaluationSpec) else {"run": spec.run, "preset": spec.preset}
    return pb.Job(
        id=record.id,
        **named,
        kind=KINDS[record.kind],
        after=record.after,
        attempt=record.attempt,
        state=STATES[record.state],
        dataset=spec.data.dataset,
        enqueued_at=_timestamp(record.enqueued_at),
        started_at=_timestamp(record.started_at) if record.started_at else None,
        ended_at=_timestamp(record.ended_at) if record.ended_at else None,
        progress=_progress(record.progress) if record.progress else None,
        evaluation=pb.Evaluation(**vars(record.evaluation)) if record.evaluation else None,
        reason=record.reason,
    )


def event_to_pb(timed: TimedEvent) -> pb.WatchJobResponse:
    """One event of a job."""
    response = pb.WatchJobResponse(time=_timestamp(timed.time))
    match timed.event:
        case events.StateChanged(state, reason):
            response.state_changed.CopyFrom(pb.StateChanged(state=STATES[state], reason=reason))
        case events.Preparation(stage, fraction):
            response.preparation.CopyFrom(pb.Preparation(stage=stage, fraction=fraction))
        case events.RunStarted() as started:
            response.run_started.CopyFrom(pb.RunStarted(**vars(started)))
        case events.Progress() as progress:
            response.progress.CopyFrom(_progress(progress))
        case events.Evaluation() as evaluation:
            response.evaluation.CopyFrom(pb.Evaluation(**vars(evaluation)))
        case events.VersionPublished() as published:
            response.version_published.CopyFrom(pb.VersionPublished(**vars(published)))
        case events.Notice(text):
            response.notice.CopyFrom(pb.Notice(text=text))
    return response


def _progress(progress: events.Progress) -> pb.Progress:
    values = dict(vars(progress))
    values["eta_seconds"] = values.pop("eta_s")
    return pb.Progress(**values)


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(seconds * 1e9))
    return timestamp
