from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataError, InvalidArgument, NotFound
from shared.registry.registry import Registry
from tests.registries import disk_registry
from trainer_service.jobs.requests import EvaluateRequest, StoriesRequest, TrainRequest, parse_overrides
from trainer_service.jobs.specs import EvaluateSpec, Kind, TrainSpec, spec_from_json
from trainer_service.presets import find_preset
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig


def registry_with(config: TrainingConfig, step: int) -> Registry:
    """Returns a registry whose version 3 is that step of a run with these values."""
    version = SimpleNamespace(
        run="r",
        step=step,
        preset="demo",
        training=config.to_dict(),
        dataset_files=("builtin",),
        validation_files=(),
        teachers=(),
    )
    return cast(Registry, SimpleNamespace(version=lambda _: version, verified_state=lambda *_: None))


def resume(config: TrainingConfig, step: int, **overrides: str) -> TrainSpec:
    return TrainRequest(resume=3, overrides=overrides).resolve(registry_with(config, step))


DEMO = replace(find_preset("demo"), max_steps=400)


def test_a_version_before_the_end_continues_the_schedule_of_its_run() -> None:
    assert resume(DEMO, 160).config == DEMO
    assert resume(DEMO, 160, max_steps="400", dropout="0.1").config.schedule_start == 0


def test_another_end_begins_a_schedule_at_the_version() -> None:
    longer = resume(DEMO, 400, max_steps="800").config
    assert (longer.schedule_start, longer.max_steps) == (400, 800)
    assert (longer.learning_rate, longer.schedule_start_ratio) == (DEMO.learning_rate_at(399), 1.0)
    # It survives an interruption, and a second continuation begins another schedule.
    assert resume(longer, 600).config == longer
    longest = resume(longer, 800, max_steps="1200").config
    assert (longest.schedule_start, longest.warmup_end) == (800, 800)
    shorter = resume(longer, 600, max_steps="700").config
    assert (shorter.schedule_start, shorter.max_steps) == (600, 700)


def test_the_start_of_the_schedule_is_part_of_the_job() -> None:
    spec = resume(DEMO, 400, max_steps="800")
    assert spec_from_json(Kind.TRAIN, spec.to_json()) == spec


def test_a_fresh_run_begins_its_schedule_at_its_first_step() -> None:
    spec = TrainRequest().resolve(registry_with(DEMO, 0))
    assert (spec.config.schedule_start, spec.config.schedule_start_ratio) == (0, 0.0)


@pytest.mark.parametrize("max_steps", ["400", "399", "5"])
def test_a_version_at_or_past_the_end_is_rejected_with_the_value_to_set(max_steps: str) -> None:
    longer = resume(DEMO, 400, max_steps="800").config
    with pytest.raises(InvalidArgument, match=rf'Version 3 is at step 400 of {max_steps}, .* --set "max_steps=800"'):
        resume(DEMO, 400, max_steps=max_steps)
    with pytest.raises(InvalidArgument, match=rf"Version 3 is at step 600 of {max_steps}, so nothing is left to do"):
        resume(longer, 600, max_steps=max_steps)


def test_a_continued_run_keeps_its_model_and_its_optimizer() -> None:
    for name, value, kept in (("optimizer", "adamw", "muon"), ("width", "320", "160")):
        with pytest.raises(InvalidArgument, match=f"{name} is {kept} in version 3 and cannot change"):
            resume(DEMO, 160, **{name: value})
    assert resume(replace(DEMO, optimizer="adamw"), 160).config.optimizer == "adamw"


def test_the_start_of_the_schedule_cannot_be_set() -> None:
    with pytest.raises(InvalidArgument, match="Unknown training value 'schedule_start'"):
        resume(DEMO, 160, schedule_start="5")


def test_a_rate_that_is_set_is_warmed_up_to_even_if_it_is_that_of_before() -> None:
    longer = resume(DEMO, 400, max_steps="800", learning_rate=str(DEMO.learning_rate)).config
    assert (longer.learning_rate, longer.warmup_end) == (DEMO.learning_rate, 450)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps", "'max_steps' is not of the form name=value"),
        ("max_steps = 5", "'max_steps' is not of the form name=value"),
        ("max_steps=5 max_steps=6", "'max_steps' is set twice, to '5' and to '6'"),
    ],
)
def test_an_invalid_override_is_rejected(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse_overrides(text)


def test_overrides_are_read_from_one_line() -> None:
    assert parse_overrides(" max_steps=5  seed=1 ") == {"max_steps": "5", "seed": "1"}
    for wrong in ("max_steps", "=5", "max_steps="):
        with pytest.raises(InvalidArgument, match="is not of the form name=value"):
            parse_overrides(wrong)


def test_an_evaluation_is_completed_and_checked(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path / "registry")
    spec = EvaluateRequest(after=("a",), dataset=("builtin",)).resolve(registry)
    assert spec == EvaluateSpec("best", DatasetSpec(("builtin",)))
    assert spec_from_json(Kind.EVALUATE, spec.to_json()) == spec
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("Once")
    spec = EvaluateRequest(after=("a",), validation=(str(held_out),)).resolve(registry)
    assert spec == EvaluateSpec("best", DatasetSpec((), (str(held_out),)))
    for version in ("best", "3"):
        with pytest.raises(NotFound, match="empty"):
            EvaluateRequest(version=version).resolve(registry)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        EvaluateRequest(after=("a",), validation=(str(tmp_path / "absent.txt"),)).resolve(registry)
    with pytest.raises(InvalidArgument, match="must be a number, best, latest or run:<name>"):
        EvaluateRequest(version="newest").resolve(registry)


def test_a_bad_file_of_minimal_pairs_is_rejected_before_the_job_waits(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    spec = EvaluateRequest(after=("a",), pairs=(str(path),)).resolve(disk_registry(tmp_path))
    assert spec.pairs == (str(path),)
    path.write_text('{"sentence_good": "a"}\n')
    with pytest.raises(DataError, match=r"Line 1 of 'pairs\.jsonl' has no \"sentence_bad\""):
        EvaluateRequest(after=("a",), pairs=(str(path),)).resolve(disk_registry(tmp_path))


def test_a_run_that_cannot_start_is_rejected(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path / "registry")
    with pytest.raises(NotFound, match="still empty"):
        TrainRequest(resume=3).resolve(registry)
    with pytest.raises(NotFound, match=r"absent\.txt"):
        TrainRequest(dataset=(str(tmp_path / "absent.txt"),)).resolve(registry)


@pytest.mark.parametrize(
    ("dataset", "values", "sentence"),
    [
        (
            ("builtin", "teacher:a"),
            {"teacher_share": "0"},
            "would read none of the stories of teacher:a; set it above 0",
        ),
        (("builtin",), {"teacher_prompts": "true"}, "mixes no stories of a large teacher with other text; name both"),
        (("teacher:a",), {"teacher_prompts": "true"}, "mixes no stories of a large teacher with other text; name both"),
    ],
)
def test_values_about_stories_that_nothing_would_read_are_refused(
    dataset: tuple[str, ...], values: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        TrainRequest(dataset=dataset, overrides=values).resolve(disk_registry(tmp_path))


def test_rivals_are_checked_and_a_label_of_a_coming_run_waits_for_its_job(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path / "registry")
    rivals = {"control": "run:wide-control", "the best one": "best"}
    spec = EvaluateRequest(after=("a",), version="run:wide", rivals=rivals, promote=True).resolve(registry)
    assert (spec.version, spec.rivals, spec.promote) == ("run:wide", rivals, True)
    assert spec_from_json(Kind.EVALUATE, spec.to_json()) == spec
    with pytest.raises(NotFound, match="run:wide"):
        EvaluateRequest(version="run:wide").resolve(registry)
    with pytest.raises(NotFound, match="empty"):
        EvaluateRequest(after=("a",), rivals={"teacher": "7"}).resolve(registry)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"version": "run:"}, "version is 'run:', but must be a number, best, latest or run:<name>"),
        ({"version": "stable"}, "version is 'stable', but must be"),
        ({"rivals": {"control": "run:a/b"}}, "the rival 'control' is 'run:a/b', but must be a number"),
        ({"rivals": {"": "best"}}, "The role of a rival is '', but must have from 1 to 40 printable characters"),
        ({"rivals": {"a\nb": "best"}}, "The role of a rival is 'a\\\\nb', but"),
        ({"rivals": {"x" * 41: "best"}}, "must have from 1 to 40 printable characters"),
        ({"rivals": {str(number): "best" for number in range(33)}}, "names 33 rivals, but a version has at most 32"),
        ({"promote": True}, "names no rival that it must be better than"),
        ({"judge_usd": 0.5}, "names no rival to judge the version beside"),
        ({"judge_usd": -1.0}, "judge_usd is -1.0, but must be an amount above 0 and up to 10,000 US dollars"),
        ({"judge_usd": float("nan")}, "judge_usd is nan, but must be an amount"),
    ],
)
def test_wrong_rivals_are_refused_with_what_would_be_right(values: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        EvaluateRequest(after=("a",), **values).resolve(disk_registry(tmp_path))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "../x"}, "The name of a set of stories is '../x', but must have from 1 to 64 letters"),
        ({"count": 0}, "count is 0, but must be from 1 to 1,000,000 stories"),
        ({"count": 10**30}, "count is 1000000000000000000000000000000, but must be"),
        ({"max_cost_usd": 0.0}, "max_cost_usd is 0.0, but must be an amount above 0 and up to 10,000 US dollars"),
        ({"max_cost_usd": -1.0}, "max_cost_usd is -1.0, but"),
        ({"max_cost_usd": 0.0000001}, "max_cost_usd is 1e-07, but"),
        ({"max_cost_usd": float("nan")}, "max_cost_usd is nan, but"),
        ({"max_cost_usd": float("inf")}, "max_cost_usd is inf, but"),
        ({"max_cost_usd": 10_000.5}, "max_cost_usd is 10000.5, but"),
        ({"after": ("a",) * 101}, "waits for 101 jobs"),
    ],
)
def test_wrong_requests_for_stories_are_refused_with_what_would_be_right(
    values: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        StoriesRequest(**{"name": "s", "count": 5, "max_cost_usd": 0.5, **values}).resolve(disk_registry(tmp_path))


@given(st.integers(1, 10**10))
def test_the_cap_of_a_set_of_stories_is_exact(millionths: int) -> None:
    cap_usd = Decimal(millionths).scaleb(-6)
    spec = StoriesRequest(name="s", count=5, max_cost_usd=float(cap_usd)).resolve(disk_registry(Path("none")))
    assert spec_from_json(Kind.STORIES, spec.to_json()) == spec
    assert spec.cap_usd == cap_usd
