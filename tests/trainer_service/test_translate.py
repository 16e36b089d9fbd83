from pathlib import Path

import pytest

from shared.errors import InvalidArgument
from shared.pb.training.v1 import training_pb2 as pb
from tests.registries import disk_registry
from trainer_service.jobs.requests import EvaluateRequest, JobRequest, PrepareRequest, StoriesRequest, TrainRequest
from trainer_service.translate import request_from_pb, request_to_pb

DATA = {"dataset": ("a.txt", "b.txt"), "validation": ("c.txt",), "after": ("1234abcd",), "needs": "gpu,memory=16G"}
RUN = {**DATA, "preset": "small", "resume": 3, "overrides": {"max_steps": "5"}}


@pytest.mark.parametrize(
    "request_",
    [
        TrainRequest(),
        TrainRequest(**RUN, name="wide", notes="twice the width"),  # type: ignore[arg-type]
        PrepareRequest(),
        TrainRequest(teachers=("7", "run:wide"), force=True),
        PrepareRequest(**RUN),  # type: ignore[arg-type]
        EvaluateRequest(),
        EvaluateRequest(**DATA, version="7", window=64, pairs=("pairs.jsonl",), speed=False, again=True),  # type: ignore[arg-type]
        EvaluateRequest(version="7", rivals={"control": "3"}, promote=True, judge_usd=0.5),
        StoriesRequest(name="bedtime", count=20, max_cost_usd=0.05, after=("1234abcd",)),
    ],
)
def test_every_request_survives_its_message(request_: JobRequest) -> None:
    message = pb.EnqueueJobRequest.FromString(request_to_pb(request_).SerializeToString())
    assert request_from_pb(message) == request_


def test_an_empty_message_trains_the_default() -> None:
    assert request_from_pb(pb.EnqueueJobRequest()) == TrainRequest()
    assert request_from_pb(pb.EnqueueJobRequest(kind=pb.JOB_KIND_EVALUATE)).version == "best"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        ("name", "The name of a set of stories is '', but must have from 1 to 64 letters"),
        ("count", "count is 0, but must be from 1"),
        ("max_cost_usd", "max_cost_usd is 0.0, but must be an amount above 0"),
    ],
)
def test_a_message_for_stories_that_lacks_a_value_is_refused_with_a_sentence(
    left_out: str, sentence: str, tmp_path: Path
) -> None:
    message = pb.EnqueueJobRequest(kind=pb.JOB_KIND_STORIES, name="bedtime", count=20, max_cost_usd=0.05)
    message.ClearField(left_out)
    with pytest.raises(InvalidArgument, match=sentence):
        request_from_pb(message).resolve(disk_registry(tmp_path))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.EnqueueJobRequest(version="3"), "version"),
        (pb.EnqueueJobRequest(kind=pb.JOB_KIND_PREPARE, name="wide"), "name"),
        (pb.EnqueueJobRequest(kind=pb.JOB_KIND_PREPARE, notes="wide"), "notes"),
        (pb.EnqueueJobRequest(kind=pb.JOB_KIND_EVALUATE, preset="demo"), "preset"),
        (pb.EnqueueJobRequest(kind=pb.JOB_KIND_EVALUATE, resume=3), "resume"),
        (pb.EnqueueJobRequest(kind=pb.JOB_KIND_EVALUATE, overrides={"seed": "1"}), "overrides"),
        (pb.EnqueueJobRequest(kind=pb.JOB_KIND_EVALUATE, notes="wide"), "notes"),
    ],
)
def test_a_field_of_another_kind_of_job_is_rejected_by_its_name(message: pb.EnqueueJobRequest, field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field} is set, but a job of the kind"):
        request_from_pb(message)
