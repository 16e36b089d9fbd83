"""The client and the server together, over a real connection and a real Redis."""

from collections.abc import Iterator

import pytest

from shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shared.pb.training.v1 import training_pb2 as pb
from tests.jobs import finish, start
from tests.trainer_service.serving import listening
from trainer_service.client import TrainerClient
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import PrepareRequest, TrainRequest
from trainer_service.jobs.specs import Kind
from trainer_service.server import TrainingServicer


@pytest.fixture
def client(servicer: TrainingServicer) -> Iterator[TrainerClient]:
    with listening(servicer) as address, TrainerClient(address) as client:
        yield client


def test_a_job_is_submitted_watched_listed_and_cancelled(client: TrainerClient, queue: JobQueue) -> None:
    answer = client.submit(TrainRequest(name="wide", notes="twice the width"))
    job = answer.job.id
    assert (answer.job.run, answer.job.notes, answer.live_workers) == ("wide", "twice the width", 0)
    waiting = client.submit(PrepareRequest(after=(job,))).job
    assert client.cancel(waiting.id).state == pb.JOB_STATE_CANCELLED
    start(queue, job)
    finish(queue, job)
    states = [event.state_changed.state for event in client.watch(job)]
    assert states == [pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING, pb.JOB_STATE_FINISHED]
    assert client.job(job).state == pb.JOB_STATE_FINISHED
    assert [each.id for each in client.jobs()] == [waiting.id, job]
    assert [each.id for each in client.jobs([JobState.FINISHED], [Kind.TRAIN])] == [job]


def test_an_error_of_the_server_is_raised_as_its_type(client: TrainerClient) -> None:
    client.submit(TrainRequest(name="wide"))
    with pytest.raises(AlreadyExists, match="choose another name"):
        client.submit(TrainRequest(name="wide"))
    with pytest.raises(InvalidArgument, match="Unknown preset"):
        client.submit(TrainRequest(preset="x"))
    with pytest.raises(InvalidArgument, match="not valid Unicode"):
        client.submit(TrainRequest(notes="\udce9"))
    with pytest.raises(InvalidArgument, match="cannot be sent"):
        client.submit(TrainRequest(resume=2**64))
    for call in (client.job, client.cancel, lambda job: next(client.watch(job))):
        with pytest.raises(NotFound, match="There is no job 'x'"):
            call("x")
    job = next(client.jobs()).id
    client.cancel(job)
    with pytest.raises(FailedPrecondition, match="cancelled already"):
        client.cancel(job)


def test_without_a_server_a_sentence_says_what_to_do() -> None:
    with TrainerClient("127.0.0.1:1") as client, pytest.raises(Unavailable, match="gptloop up"):
        client.submit(TrainRequest())
