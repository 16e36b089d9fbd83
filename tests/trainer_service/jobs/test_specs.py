import pytest

from shared.errors import InvalidArgument
from tests.registries import disk_registry
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import Kind, spec_from_json
from trainer_service.settings import TrainerSettings


def test_only_a_complete_specification_is_valid(settings: TrainerSettings) -> None:
    whole = TrainRequest().resolve(disk_registry(settings.directories.registry)).to_json()
    assert spec_from_json(Kind.TRAIN, whole).to_json() == whole
    assert spec_from_json(Kind.PREPARE, whole).kind is Kind.PREPARE
    # A job that an older program has queued says nothing of stories.
    assert spec_from_json(Kind.TRAIN, whole.replace(', "stories": null', "")).to_json() == whole
    elsewhere = whole.replace('"run": "demo', '"run": "../demo')
    for text in (
        "",
        "[]",
        "{}",
        whole.replace('"max_steps"', '"steps"'),
        elsewhere,
        whole.replace('"stories": null', '"stories": "3"'),
    ):
        with pytest.raises(InvalidArgument):
            spec_from_json(Kind.TRAIN, text)
