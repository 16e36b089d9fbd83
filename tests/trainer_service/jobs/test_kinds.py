from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidArgument, NotFound
from shared.registry.store import Registry
from trainer_service.jobs.kinds import EvaluationSpec, JobRequest, Kind, complete, spec_from_json
from trainer_service.jobs.spec import JobSpec, TrainingRequest, parse_overrides, resolve
from trainer_service.settings import TrainerSettings
from trainer_service.training.corpus import DatasetSpec


def test_overrides_are_read_from_one_line() -> None:
    assert parse_overrides(" max_steps=5  seed=1 ") == {"max_steps": "5", "seed": "1"}
    for wrong in ("max_steps", "=5", "max_steps="):
        with pytest.raises(InvalidArgument, match="is not of the form name=value"):
            parse_overrides(wrong)


def test_only_a_whole_job_can_be_understood(settings: TrainerSettings) -> None:
    whole = resolve(TrainingRequest(), Registry(settings.directories.registry)).to_json()
    assert JobSpec.from_json(whole).to_json() == whole
    elsewhere = whole.replace('"run": "demo', '"run": "../demo')
    for text in ("", "[]", "{}", whole.replace('"max_steps"', '"steps"'), elsewhere):
        with pytest.raises(InvalidArgument):
            JobSpec.from_json(text)


def test_an_evaluation_is_completed_and_checked(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")

    def completed(version: str = "", after: tuple[str, ...] = (), **training: Any) -> object:
        return complete(JobRequest(Kind.EVALUATE, TrainingRequest(**training), version, after), registry)

    wanted = completed(after=("a",), dataset=("builtin",))
    assert wanted == EvaluationSpec("best", DatasetSpec(("builtin",)))
    assert spec_from_json(Kind.EVALUATE, wanted.to_json()) == wanted
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("Once")
    assert completed(after=("a",), validation=(str(held_out),)) == EvaluationSpec(
        "best", DatasetSpec((), (str(held_out),))
    )
    for version in ("best", "3"):
        with pytest.raises(NotFound, match="empty"):
            completed(version)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        completed(after=("a",), validation=(str(tmp_path / "absent.txt"),))
    for wrong in ({"version": "newest"}, {"after": ("a",), "preset": "demo"}):
        with pytest.raises(InvalidArgument):
            completed(**wrong)
    with pytest.raises(InvalidArgument, match="for evaluations"):
        complete(JobRequest(Kind.TRAIN, TrainingRequest(), "3"), registry)


def test_what_cannot_be_trained_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(NotFound, match="still empty"):
        resolve(TrainingRequest(resume=3), registry)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        resolve(TrainingRequest(dataset=(str(tmp_path / "absent.txt"),)), registry)
