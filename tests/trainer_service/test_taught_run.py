"""Runs with teachers, without queue or worker: tiny models on a text file."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.errors import AlreadyExists, CorruptCheckpoint, DataError, FailedPrecondition, NotFound
from shared.gpt.weights import load_arrays
from shared.registry.manifest import TeacherRecord, VersionManifest
from shared.registry.registry import Checkpoint
from shared.registry.retention import Retention, prune
from shared.registry.teachers import Teachers
from tests.jobs import preparation
from tests.registries import run_folder, state_folder
from tests.trainer_service.site import TINY_RUN, Site
from trainer_service.jobs.attempt import Stopped
from trainer_service.jobs.events import Notice
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import Teacher, TrainSpec
from trainer_service.run import TrainingRun, prepare_data

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with two models to learn from, the versions 3 and 6; the second is wider and has seen other text."""
    site = Site(tmp_path_factory.mktemp("trained"))
    site.train(site.spec())
    site.train(student(site, "3", dataset=site.other_text, width="32", distillation_alpha="0"))
    assert [version.version for version in site.registry.versions()] == [*range(1, 7)]
    return site


@pytest.fixture
def taught(trained: Site, site: Site) -> Site:
    """A site of the test's own with the same registry and prepared text."""
    shutil.copytree(trained.directories.var, site.directories.var)
    return site


def student(site: Site, *teachers: str, resume: int | None = None, dataset: str = "", **values: str) -> TrainSpec:
    """A run with random numbers in every step."""
    request = TrainRequest(
        dataset=(dataset,) if dataset else (),
        teachers=teachers,
        resume=resume,
        overrides={"dropout": "0.1"} | values if resume is None else values,
        force=True,
    )
    return request.resolve(site.registry)


def state(site: Site, spec: TrainSpec) -> dict[str, bytes]:
    """The bits of every array in the last state of a run."""
    folder = state_folder(site.registry, spec.run, site.registry.states(spec.run)[-1])
    arrays = {name: array for file in folder.glob("*.safetensors") for name, array in load_arrays(file).items()}
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def last(site: Site) -> VersionManifest:
    return site.registry.versions()[-1]


def begin(site: Site, spec: TrainSpec) -> None:
    """Trains a run until it has a state."""
    assert not site.train(spec, stop_requested=lambda: bool(site.registry.states(spec.run)))


def lose(site: Site, *numbers: int) -> None:
    """Removes versions, and the states that continue them."""
    for number in numbers:
        version = site.registry.version(number)
        site.registry.remove(Checkpoint(number))
        site.registry.remove(Checkpoint(version.step, version.run))


def test_a_run_that_was_stopped_and_whose_teachers_were_pruned_equals_one_that_was_not(taught: Site) -> None:
    whole, spec = (student(taught, "6", "3") for _ in range(2))
    assert taught.train(whole)
    assert last(taught).teachers == tuple(
        TeacherRecord(number, taught.registry.version(number).digest) for number in (6, 3)
    )
    begin(taught, spec)
    teachers = taught.registry.version(6), taught.registry.version(3)
    lose(taught, 3, 6)
    assert taught.train(spec)
    assert state(taught, spec) == state(taught, whole)
    assert last(taught).run == spec.run
    assert last(taught).teachers == tuple(TeacherRecord(each.version, each.digest) for each in teachers)


def test_a_teacher_changes_what_is_learned(taught: Site) -> None:
    specs = [student(taught, "3", distillation_alpha=alpha) for alpha in ("0.5", "0.9", "0")]
    for spec in specs:
        assert taught.train(spec)
    assert len({str(state(taught, spec)) for spec in specs}) == 3


class Killed(BaseException):
    """Ends an attempt as SIGKILL does: nothing catches it."""


@pytest.mark.parametrize("name", ["take", "keep"])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_killed_while_it_takes_its_teachers_takes_all_of_them(
    taught: Site, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    act: Callable[..., None] = getattr(Teachers, name)

    def die(teachers: Teachers, *given: object) -> None:
        if after:
            act(teachers, *given)
        raise Killed

    spec = student(taught, "3", "6")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Teachers, name, die)
        taught.train(spec)
    assert taught.train(spec)
    assert [each.version for each in last(taught).teachers] == [3, 6]


def test_a_run_that_was_stopped_before_its_first_step_needs_only_what_it_keeps(taught: Site) -> None:
    spec = student(taught, "3")
    with pytest.raises(Stopped):
        taught.train(spec, stop_requested=lambda: True)
    assert taught.registry.teachers.runs() == [spec.run]
    lose(taught, 3)
    assert taught.train(spec)
    assert [each.version for each in last(taught).teachers] == [3]


def test_a_label_is_resolved_once(taught: Site) -> None:
    spec = student(taught, "latest", "6", dataset=taught.other_text)
    assert spec.teachers == (Teacher("latest"), Teacher("6", taught.registry.version(6).digest))
    begin(taught, spec)
    taught.train(taught.spec(max_steps="3"))
    assert taught.train(spec)
    assert [each.version for each in last(taught).teachers] == [6]


def test_a_student_takes_the_tokenizer_of_its_teachers(site: Site) -> None:
    # A request that names only a label cannot know the tokenizer.
    site.train(site.spec(vocabulary_size="270"))
    request = TrainRequest(teachers=("latest",), dataset=(site.other_text,), overrides=TINY_RUN, force=True)
    spec = request.resolve(site.registry)
    assert spec.config.vocabulary_size == 300
    prepared = prepare_data(preparation(spec), site.attempt())
    assert prepared.tokenizer.digest == site.registry.version(3).tokenizer_digest
    begin(site, spec)
    assert site.train(spec)
    assert last(site).tokenizer_digest == site.registry.version(3).tokenizer_digest
    assert last(site).training["vocabulary_size"] == last(site).model["vocabulary_size"] == 270


@pytest.mark.parametrize(
    ("values", "force", "message"),
    [
        ({"context_length": "32"}, True, "context_length is 32, but the teacher, version 3, sees only 16 tokens"),
        ({}, False, r"Version 3 has \d\.\d\d bits per byte, but a teacher"),
    ],
)
def test_a_label_that_names_a_version_that_cannot_teach_fails_the_run(
    site: Site, values: dict[str, str], force: bool, message: str
) -> None:
    site.train(site.spec())
    request = TrainRequest(
        teachers=("latest",), dataset=(site.text,), overrides=TINY_RUN | values, force=force, name="student"
    )
    with pytest.raises(FailedPrecondition, match=message):
        site.train(request.resolve(site.registry))
    assert not run_folder(site.registry, "student").exists()


def test_a_run_whose_text_cannot_be_read_keeps_neither_its_teachers_nor_its_name(taught: Site) -> None:
    text = Path(taught.write(Path(taught.text).with_name("own.txt"), 0))
    request = TrainRequest(teachers=("3",), dataset=(str(text),), name="student", force=True)
    spec = request.resolve(taught.registry)
    text.write_text("Short.")
    with pytest.raises(DataError):
        taught.train(spec)
    assert taught.registry.teachers.runs() == []
    taught.write(text, 0)
    assert taught.train(request.resolve(taught.registry))
    with pytest.raises(AlreadyExists):
        request.resolve(taught.registry)


def test_a_teacher_that_saw_other_text_is_a_notice(taught: Site) -> None:
    taught.train(student(taught, "3", "6"))
    said = [event.text for event in taught.all_told(Notice) if "held-out" in event.text]
    assert said == [
        "The teacher, version 6, was trained on other text than its student, so it may have seen the student's "
        "held-out text; the held-out loss may then be too low."
    ]


def test_a_version_that_was_taught_is_continued_with_its_teachers(taught: Site) -> None:
    begun = student(taught, "3", max_steps="6")
    assert taught.train(begun)
    parent = last(taught)
    lose(taught, 3)
    spec = student(taught, resume=parent.version, max_steps="9")
    assert [each.version for each in spec.teachers] == ["3"]
    begin(taught, spec)
    # Once it has begun, it needs neither its version nor that version's run.
    lose(taught, parent.version)
    taught.registry.teachers.remove(begun.run)
    assert taught.train(spec)
    assert last(taught).teachers == parent.teachers


def test_the_teachers_of_a_run_that_nothing_keeps_are_gone(taught: Site) -> None:
    spec = student(taught, "3")
    taught.train(spec)
    assert taught.registry.teachers.runs() == [spec.run]
    for teacher in (run_folder(taught.registry, spec.run) / "teachers").iterdir():
        os.utime(teacher, (0, 0))
    other = taught.spec()
    taught.train(other, retention=Retention(states=1, best=1, newest=1, runs=1))
    for checkpoint in [Checkpoint(step, spec.run) for step in taught.registry.states(spec.run)]:
        taught.registry.remove(checkpoint)
    prune(taught.registry, Retention())
    assert taught.registry.teachers.runs() == []


def test_a_control_takes_the_tokenizer_and_keeps_no_teachers(taught: Site) -> None:
    spec = student(taught, "3", distillation_alpha="0")
    begin(taught, spec)
    assert taught.registry.teachers.runs() == []
    lose(taught, 3)
    assert taught.train(spec)
    assert last(taught).teachers == ()
    plain = replace(spec, run="plain", teachers=())
    assert taught.train(plain)
    assert state(taught, plain) == state(taught, spec)


def test_a_damaged_teacher_ends_a_run_with_a_sentence(taught: Site) -> None:
    spec = student(taught, "3")
    begin(taught, spec)
    weights = (run_folder(taught.registry, spec.run) / "teachers") / "3" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"teachers/3 lacks files of its manifest: model\.safetensors has"):
        taught.train(spec)


def test_a_teacher_that_is_gone_before_the_run_begins_ends_it_with_a_sentence(taught: Site) -> None:
    spec = student(taught, "3")
    lose(taught, 3)
    with pytest.raises(NotFound, match="The teacher, version 3, is no longer in the registry; name another one"):
        TrainingRun(spec, taught.attempt())
