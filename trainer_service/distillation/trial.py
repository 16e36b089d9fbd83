"""The trial of a distillation: the student's run, a control without the teacher, and the evaluation of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared.errors import InvalidArgument, shown
from shared.registry.decisions import run_label
from shared.registry.registry import Registry
from trainer_service.distillation.readiness import require_trained
from trainer_service.evaluation.verdict import CONTROL
from trainer_service.jobs.requests import DEFAULT_DATASET, DEFAULT_PRESET, EvaluateRequest, TrainRequest
from trainer_service.jobs.specs import new_run
from trainer_service.presets import find_preset
from trainer_service.text.corpus import TEACHER
from trainer_service.training.config import TrainingConfig

_FEWEST_GENERATIONS, _MOST_GENERATIONS = 2, 20


@dataclass(frozen=True)
class Trial:
    """The runs to train, each after the one before it if they are a chain, and the evaluation that follows all."""

    runs: tuple[TrainRequest, ...]
    evaluation: EvaluateRequest
    is_chain: bool = False


def trial_of_teachers(common: TrainRequest, teachers: Sequence[int], registry: Registry) -> Trial:
    """Returns the trial of a student that learns the mean prediction of some versions.

    `common` has the values of all runs. Raises `NotFound` if the first teacher, or the version that is continued, does
    not exist, and `InvalidArgument` if nothing would be learned from the teachers.
    """
    alpha = {name: value for name, value in common.overrides.items() if name == "distillation_alpha"}
    _require_teaching(find_preset(DEFAULT_PRESET).override(alpha))
    common = _continued(common, registry) if common.resume is not None else common
    common = _named(common, common.preset or registry.version(common.resume or teachers[0]).preset)
    student = replace(common, teachers=tuple(map(str, teachers)))
    # The control takes the teachers' tokenizer, values and text, and learns nothing else from them.
    control = _control(replace(student, overrides={**student.overrides, "distillation_alpha": "0"}))
    return Trial((student, control), _evaluation(student, control, {f"teacher {each}": str(each) for each in teachers}))


def trial_of_generations(common: TrainRequest, count: int) -> Trial:
    """Returns the trial of a chain of models, each taught by the one before it; the first one is the control.

    Each generation has the next seed. Raises `InvalidArgument` for another number of generations or invalid values.
    """
    if not _FEWEST_GENERATIONS <= count <= _MOST_GENERATIONS:
        raise InvalidArgument(
            f"generations is {count}, but must be from {_FEWEST_GENERATIONS} to {_MOST_GENERATIONS}: the first one has "
            "no teacher."
        )
    if common.resume is not None:
        raise InvalidArgument("Each generation begins anew, so a chain continues no version; leave --resume out.")
    common = _named(common, common.preset or DEFAULT_PRESET)
    config = find_preset(common.preset or DEFAULT_PRESET).override(common.overrides)
    _require_teaching(config)
    names = [f"{common.name}-g{number}" for number in range(1, count + 1)]
    runs = tuple(
        replace(
            common,
            name=name,
            overrides={**common.overrides, "seed": str(config.seed + at)},
            teachers=(run_label(names[at - 1]),) if at else (),
        )
        for at, name in enumerate(names)
    )
    first, *others = names[:-1]
    rivals = {CONTROL: run_label(first)}
    rivals |= {f"generation {number}": run_label(name) for number, name in enumerate(others, start=2)}
    return Trial(runs, EvaluateRequest(version=run_label(names[-1]), rivals=rivals, speed=False), is_chain=True)


def trial_of_stories(common: TrainRequest, name: str, registry: Registry) -> Trial:
    """Returns the trial of a student that reads a set of a large teacher's stories among other text.

    The control reads the other text alone. Raises `FailedPrecondition` if the version that both continue is hardly
    trained, and `NotFound` or `InvalidArgument`.
    """
    if sets := [each for each in common.dataset if each.startswith(TEACHER)]:
        raise InvalidArgument(
            f"The stories {shown(sets[0])} are named beside --stories {shown(name)}, but the control reads all that "
            "--dataset names, and no stories; leave them out."
        )
    preset, text, validation = common.preset or DEFAULT_PRESET, common.dataset, common.validation
    if common.resume is not None:
        version = registry.version(common.resume)
        require_trained(version, common.force)
        if not text:
            text, validation = version.dataset_files, validation or version.validation_files
        common = _continued(common, registry)
        preset = version.preset
    text = tuple(each for each in text or (DEFAULT_DATASET,) if not each.startswith(TEACHER))
    if not text:
        raise InvalidArgument("The control needs other text than the teacher's stories; name it with --dataset.")
    common = _named(common, preset)
    student = replace(common, dataset=(f"{TEACHER}{name}", *text), validation=validation)
    # Without stories their prompts are no choice.
    overrides = {key: value for key, value in common.overrides.items() if key != "teacher_prompts"}
    control = _control(replace(student, dataset=text, overrides=overrides))
    evaluation = _evaluation(student, control, {})
    return Trial((student, control), replace(evaluation, dataset=text, validation=validation))


def _continued(common: TrainRequest, registry: Registry) -> TrainRequest:
    """Returns the values of runs that continue a version, by default for as many steps again as its schedule had."""
    assert common.resume is not None
    version = registry.version(common.resume)
    begun = TrainingConfig.from_dict(version.training)
    steps = version.step + begun.max_steps - begun.schedule_start
    return replace(common, overrides={"max_steps": str(steps), **common.overrides})


def _require_teaching(config: TrainingConfig) -> None:
    if not config.distillation_alpha:
        raise InvalidArgument(
            "distillation_alpha is 0, so the student would learn nothing from its teacher and be the control; set it "
            "above 0, or leave it out."
        )


def _named(common: TrainRequest, preset: str) -> TrainRequest:
    return replace(common, name=common.name or new_run(preset))


def _control(student: TrainRequest) -> TrainRequest:
    return replace(student, name=f"{student.name}-{CONTROL}")


def _evaluation(student: TrainRequest, control: TrainRequest, teachers: dict[str, str]) -> EvaluateRequest:
    rivals = {CONTROL: run_label(control.name)}
    if student.resume is not None:
        rivals["before"] = str(student.resume)
    return EvaluateRequest(version=run_label(student.name), rivals={**rivals, **teachers}, speed=False)
