from pathlib import Path

import pytest

from shared.errors import FailedPrecondition, InvalidArgument, NotFound
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from tests.registries import disk_registry
from tests.shared.registry.scenarios import publish
from trainer_service.distillation.trial import trial_of_generations, trial_of_stories, trial_of_teachers
from trainer_service.jobs.requests import EvaluateRequest, TrainRequest
from trainer_service.presets import find_preset
from trainer_service.training.config import TrainingConfig

DEMO = find_preset("demo")
COMMON = TrainRequest(name="wide", notes="a trial", after=("3f2a91c4",), force=True)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return disk_registry(tmp_path)


def publish_version(registry: Registry, config: TrainingConfig = DEMO, **values: object) -> VersionManifest:
    return publish(registry, None, training=config.to_dict(), step=config.max_steps, **values)


def test_a_control_differs_from_the_student_in_nothing_but_the_teaching(registry: Registry) -> None:
    publish_version(registry)
    trial = trial_of_teachers(COMMON, [1, 7], registry)
    student, control = trial.runs
    assert student == TrainRequest(**{**vars(COMMON), "teachers": ("1", "7")})
    changed = {"name": "wide-control", "overrides": {"distillation_alpha": "0"}}
    assert control == TrainRequest(**{**vars(student), **changed})
    assert not trial.is_chain
    rivals = {"control": "run:wide-control", "teacher 1": "1", "teacher 7": "7"}
    assert trial.evaluation == EvaluateRequest(version="run:wide", rivals=rivals, speed=False)


def test_a_continued_version_is_a_rival_and_both_runs_take_as_many_steps_again(registry: Registry) -> None:
    longer = TrainingConfig.from_dict({**DEMO.to_dict(), "max_steps": 700, "schedule_start": 400})
    publish_version(registry, longer)
    trial = trial_of_teachers(TrainRequest(resume=1, overrides={"dropout": "0.1"}), [2], registry)
    assert [each.overrides["max_steps"] for each in trial.runs] == ["1000", "1000"]
    assert [each.overrides["dropout"] for each in trial.runs] == ["0.1", "0.1"]
    student, control = (each.name for each in trial.runs)
    assert student.startswith("demo-") and control == f"{student}-control"
    assert trial.evaluation.rivals == {"control": f"run:{control}", "before": "1", "teacher 2": "2"}
    chosen = trial_of_teachers(TrainRequest(resume=1, overrides={"max_steps": "800"}), [2], registry)
    assert chosen.runs[0].overrides["max_steps"] == "800"


def test_each_generation_learns_from_the_one_before_it_with_the_next_seed() -> None:
    trial = trial_of_generations(TrainRequest(name="line", overrides={"seed": "5", "max_steps": "9"}), 3)
    assert trial.is_chain
    assert [(each.name, each.overrides["seed"], each.teachers) for each in trial.runs] == [
        ("line-g1", "5", ()),
        ("line-g2", "6", ("run:line-g1",)),
        ("line-g3", "7", ("run:line-g2",)),
    ]
    assert all(each.overrides["max_steps"] == "9" for each in trial.runs)
    assert trial.evaluation.version == "run:line-g3"
    assert trial.evaluation.rivals == {"control": "run:line-g1", "generation 2": "run:line-g2"}
    assert [each.overrides["seed"] for each in trial_of_generations(TrainRequest(), 2).runs] == ["1337", "1338"]


@pytest.mark.parametrize("count", [-1, 0, 1, 21])
def test_a_chain_has_at_least_two_generations(count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"generations is {count}, but must be from 2 to 20"):
        trial_of_generations(TrainRequest(), count)


def test_a_chain_continues_no_version() -> None:
    with pytest.raises(InvalidArgument, match="leave --resume out"):
        trial_of_generations(TrainRequest(resume=1), 2)
    with pytest.raises(InvalidArgument, match="seed is 'x', but must be a whole number"):
        trial_of_generations(TrainRequest(overrides={"seed": "x"}), 2)


def test_the_control_of_stories_reads_the_other_text_alone(registry: Registry) -> None:
    given = TrainRequest(name="wide", dataset=("a.txt", "b.txt"), validation=("c.txt",))
    trial = trial_of_stories(given, "bedtime", registry)
    student, control = trial.runs
    assert student.dataset == ("teacher:bedtime", "a.txt", "b.txt")
    assert control == TrainRequest(**{**vars(given), "name": "wide-control"})
    evaluation = trial.evaluation
    assert (evaluation.dataset, evaluation.validation) == (("a.txt", "b.txt"), ("c.txt",))
    assert evaluation.rivals == {"control": "run:wide-control"}
    default = trial_of_stories(TrainRequest(), "bedtime", registry)
    assert [each.dataset for each in default.runs] == [("teacher:bedtime", "builtin"), ("builtin",)]


def test_stories_are_mixed_with_the_text_of_the_version_that_is_continued(registry: Registry) -> None:
    publish_version(registry, dataset_files=("teacher:old", "a.txt"), validation_files=("c.txt",))
    trial = trial_of_stories(TrainRequest(resume=1), "bedtime", registry)
    assert [each.dataset for each in trial.runs] == [("teacher:bedtime", "a.txt"), ("a.txt",)]
    assert [each.validation for each in trial.runs] == [("c.txt",)] * 2
    assert trial.runs[0].overrides == {"max_steps": str(2 * DEMO.max_steps)}
    assert trial.evaluation.rivals["before"] == "1"
    publish_version(registry, dataset_files=("teacher:old",))
    with pytest.raises(InvalidArgument, match="needs other text than the teacher's stories; name it with --dataset"):
        trial_of_stories(TrainRequest(resume=2), "bedtime", registry)


def test_stories_do_not_continue_a_hardly_trained_version_unless_that_is_forced(registry: Registry) -> None:
    publish_version(registry, bits_per_byte=2.4)
    with pytest.raises(FailedPrecondition, match=r"Version 1 has 2\.40 bits per byte, .*--force \(FORCE=1\)"):
        trial_of_stories(TrainRequest(resume=1), "bedtime", registry)
    assert trial_of_stories(TrainRequest(resume=1, force=True), "bedtime", registry).runs[0].force


def test_a_trial_needs_its_versions(registry: Registry) -> None:
    for resume in (None, 3):
        with pytest.raises(NotFound, match="no version 3"):
            trial_of_teachers(TrainRequest(resume=resume), [3], registry)


@pytest.mark.parametrize("alpha", ["0", "0.0"])
def test_a_student_that_learns_nothing_from_its_teacher_is_refused(registry: Registry, alpha: str) -> None:
    publish_version(registry)
    common = TrainRequest(overrides={"distillation_alpha": alpha})
    for ask in (lambda: trial_of_teachers(common, [1], registry), lambda: trial_of_generations(common, 2)):
        with pytest.raises(InvalidArgument, match="distillation_alpha is 0, so the student would learn nothing"):
            ask()


def test_other_stories_beside_the_named_set_are_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArgument, match="The stories 'teacher:old' are named beside --stories 'new'"):
        trial_of_stories(TrainRequest(dataset=("builtin", "teacher:old")), "new", registry)


def test_the_control_of_stories_reads_no_prompts(registry: Registry) -> None:
    common = TrainRequest(overrides={"teacher_prompts": "true", "seed": "3"})
    student, control = trial_of_stories(common, "bedtime", registry).runs
    assert (student.overrides, control.overrides) == (common.overrides, {"seed": "3"})
    for run in (student, control):
        assert run.resolve(registry).config.teacher_prompts is (run is student)
