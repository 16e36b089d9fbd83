"""Requests for runs with teachers, on a registry of versions without weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition, InvalidArgument, NotFound
from shared.registry.manifest import IMPORTED, TeacherRecord, VersionManifest
from shared.registry.registry import Registry
from tests.registries import disk_registry
from tests.shared.registry.scenarios import publish, write_state
from trainer_service.jobs.requests import PrepareRequest, TrainRequest
from trainer_service.jobs.specs import Kind, Teacher, TrainSpec, spec_from_json
from trainer_service.presets import find_preset
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig

DEMO = find_preset("demo")
# Values of a version that differ from those of every preset.
OWN = replace(DEMO, vocabulary_size=500, layers=2, validation_share=0.2, seed=7, distillation_alpha=0.0)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return disk_registry(tmp_path / "registry")


def teach(registry: Registry, config: TrainingConfig = OWN, **values: object) -> VersionManifest:
    """Publishes a version that was trained with these values, with its state."""
    given: dict[str, object] = {"training": config.to_dict(), "model": config.gpt.to_dict(), "step": config.max_steps}
    write_state(registry, step=config.max_steps)
    return publish(registry, None, **given | values)


def ask(registry: Registry, *teachers: str, resume: int | None = None, preset: str = "", **values: str) -> TrainSpec:
    request = TrainRequest(teachers=teachers, resume=resume, preset=preset, overrides=values)
    spec = request.resolve(registry)
    assert spec_from_json(Kind.TRAIN, spec.to_json()) == spec
    return spec


def test_a_student_takes_the_values_and_the_text_of_its_first_teacher(registry: Registry, tmp_path: Path) -> None:
    text, held_out = tmp_path / "text.txt", tmp_path / "held-out.txt"
    for path in (text, held_out):
        path.write_text("Once upon a time. " * 100)
    version = teach(registry, dataset_files=(str(text),), validation_files=(str(held_out),))
    other = teach(registry, replace(OWN, layers=3))
    spec = ask(registry, "1", "2", max_steps="50")
    assert spec.teachers == (Teacher("1", version.digest), Teacher("2", other.digest))
    assert (spec.preset, spec.data) == ("demo", DatasetSpec((str(text),), (str(held_out),)))
    assert spec.config == replace(OWN, max_steps=50, distillation_alpha=DEMO.distillation_alpha)
    # Other text has other held-out text.
    named = TrainRequest(teachers=("1",), dataset=("builtin",)).resolve(registry)
    assert (named.data, named.config.validation_share) == (DatasetSpec(("builtin",)), 0.2)
    assert PrepareRequest(teachers=("1",)).resolve(registry).teachers == spec.teachers[:1]


def test_a_preset_leaves_the_tokenizer_and_the_held_out_text_to_the_teacher(registry: Registry) -> None:
    teach(registry)
    small = find_preset("small")
    spec = ask(registry, "1", preset="small", context_length="128")
    expected = replace(small, vocabulary_size=500, validation_share=0.2, context_length=128)
    assert (spec.preset, spec.config) == ("small", expected)
    assert ask(registry, "1", preset="tinystories-53m", context_length="64").config.tokenizer == "bpe"
    assert ask(registry, "1", validation_share="0.3").config.validation_share == 0.3


def test_a_student_of_a_continued_version_begins_a_schedule_of_its_own(registry: Registry) -> None:
    longer = replace(DEMO, max_steps=800).continuing(DEMO, DEMO.max_steps)
    assert longer.learning_rate < DEMO.learning_rate
    teach(registry, longer)
    assert ask(registry, "1").config == replace(DEMO, max_steps=800)


def test_a_label_is_resolved_by_the_run(registry: Registry) -> None:
    with pytest.raises(NotFound, match="No version has the label 'run:first'"):
        ask(registry, "run:first")
    spec = TrainRequest(teachers=("run:first", "best"), after=("a",)).resolve(registry)
    assert spec.teachers == (Teacher("run:first"), Teacher("best"))
    assert (spec.preset, spec.config) == ("demo", DEMO)
    teach(registry)
    assert ask(registry, "latest", "1").teachers == (Teacher("latest"), Teacher("1", registry.version(1).digest))


@pytest.mark.parametrize(
    ("teachers", "values", "message"),
    [
        (["9"], {}, "There is no version 9"),
        (["newest"], {}, "A teacher is 'newest', but must be a number or a label, such as best"),
        (["²"], {}, "A teacher is '²', but must be a number"),
        (["1" * 200], {}, "A teacher is '111.*, but must be a number"),
        (["1", "1"], {}, "The teacher 1 is named twice; name each one once"),
        (["1"] * 17, {}, "names 17 teachers, but a run has at most 16"),
        (["1"], {"context_length": "256"}, "context_length is 256, but the teacher, version 1, sees only 128 tokens"),
        (["1"], {"vocabulary_size": "700"}, "vocabulary_size is 500 in version 1, whose tokenizer its student takes"),
        (["1", "2"], {}, "Version 2 has another tokenizer than version 1, but the teachers of a run"),
        (["3"], {}, "Version 3 was imported or continues an imported one, so its student has no preset; name one"),
    ],
)
def test_a_teacher_that_cannot_teach_is_rejected_with_what_would_be_right(
    registry: Registry, teachers: list[str], values: dict[str, str], message: str
) -> None:
    teach(registry)
    teach(registry, tokenizer_digest="other")
    teach(registry, preset=IMPORTED)
    with pytest.raises((InvalidArgument, NotFound), match=message):
        TrainRequest(teachers=tuple(teachers), overrides=values).resolve(registry)


def test_a_hardly_trained_version_neither_teaches_nor_is_taught_unless_it_is_forced(registry: Registry) -> None:
    teach(registry, bits_per_byte=2.5)
    teach(registry, DEMO, bits_per_byte=1.0)
    for teachers, resume in (("1",), None), (("2",), 1):
        values = {"max_steps": "900", "distillation_alpha": "0.5"}
        request = TrainRequest(teachers=teachers, resume=resume, overrides=values)
        with pytest.raises(FailedPrecondition, match=r"Version 1 has 2\.50 bits per byte"):
            request.resolve(registry)
        assert replace(request, force=True).resolve(registry).force
    # It is continued as ever without teachers, and it may be the pattern of a control.
    assert ask(registry, resume=1, max_steps="900").teachers == ()
    assert ask(registry, "1", distillation_alpha="0").teachers == (Teacher("1", registry.version(1).digest),)


def test_a_version_that_was_taught_goes_on_with_its_teachers(registry: Registry) -> None:
    record = TeacherRecord(5, "digest")
    taught = replace(DEMO, distillation_alpha=0.3)
    teach(registry, taught, teachers=(record,))
    spec = ask(registry, resume=1, max_steps="800")
    assert (spec.teachers, spec.config.distillation_alpha) == ((Teacher("5", "digest"),), 0.3)
    other = teach(registry, taught)
    assert ask(registry, "2", resume=1, max_steps="800").teachers == (Teacher("2", other.digest),)
    assert ask(registry, resume=1, max_steps="800", distillation_alpha="0").teachers == ()


def test_a_version_that_is_continued_must_share_its_tokenizer_and_learn_from_its_teachers(registry: Registry) -> None:
    teach(registry)
    teach(registry, tokenizer_digest="other")
    with pytest.raises(InvalidArgument, match=r"distillation_alpha is 0 in version 1, .* set it too, as in --set"):
        ask(registry, "1", resume=1, max_steps="800")
    with pytest.raises(InvalidArgument, match="Version 2 has another tokenizer than version 1"):
        ask(registry, "2", resume=1, max_steps="800", distillation_alpha="0.5")
