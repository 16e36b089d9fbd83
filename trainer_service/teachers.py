"""The teachers of a run: the versions that its specification names, whether they fit, and what the run keeps of them.

Loads no model framework.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from shared.errors import CorruptCheckpoint, FailedPrecondition, InvalidArgument, NotFound, shown
from shared.registry.decisions import check_label
from shared.registry.manifest import IMPORTED, TeacherRecord, VersionManifest
from shared.registry.numbering import is_number
from shared.registry.registry import Registry
from shared.registry.teachers import TeacherVersion
from trainer_service.distillation.readiness import require_trained
from trainer_service.jobs.specs import RunSpec, Teacher
from trainer_service.presets import PRESETS, find_preset
from trainer_service.training.config import TrainingConfig

# A run holds the weights of all its teachers in memory.
_MOST = 16


def named_teachers(names: Sequence[str], registry: Registry, waits: bool) -> tuple[Teacher, ...]:
    """Returns the teachers with these numbers and labels. A label stays one: the run resolves it when it begins.

    waits: whether the run comes after other jobs, which may publish what a label names.

    Raises `InvalidArgument` for a name that cannot be one, and `NotFound` if there is no such version.
    """
    if len(names) > _MOST:
        raise InvalidArgument(f"The request names {len(names)} teachers, but a run has at most {_MOST}.")
    found = []
    for name in names:
        if is_number(name):
            found.append(Teacher(name, registry.version(int(name)).digest))
            continue
        try:
            found.append(Teacher(check_label(name)))
        except InvalidArgument:
            raise InvalidArgument(
                f"A teacher is {shown(name)}, but must be a number or a label, such as best, latest or run:<name>."
            ) from None
        if not waits:
            registry.resolve(name)
    for teacher in found:
        if found.count(teacher) > 1:
            raise InvalidArgument(f"The teacher {teacher.version} is named twice; name each one once.")
    return tuple(found)


def student_config(teacher: VersionManifest, preset: str, overrides: Mapping[str, str]) -> TrainingConfig:
    """Returns the values of a new run that learns from a version: of a preset, or else those of the version.

    Raises `InvalidArgument` if a value cannot be, or if there must be a preset.
    """
    taught = TrainingConfig.from_dict(teacher.training)
    if preset:
        # Held-out text of the student must not be text that the teacher was trained on.
        config = replace(find_preset(preset), validation_share=taught.validation_share)
    elif teacher.preset == IMPORTED:
        raise InvalidArgument(
            f"Version {teacher.version} was imported or continues an imported one, so its student has no preset; name "
            "one, as in --preset small."
        )
    else:
        config = _as_new(taught, teacher.preset)
    config = with_tokenizer(config, teacher.tokenizer, taught.vocabulary_size)
    chosen = config.override(overrides)
    for name in ("tokenizer", "vocabulary_size"):
        if getattr(chosen, name) != getattr(config, name):
            raise InvalidArgument(
                f"{name} is {getattr(config, name)} in version {teacher.version}, whose tokenizer its student takes, "
                "and cannot change."
            )
    return chosen


def _as_new(config: TrainingConfig, preset: str) -> TrainingConfig:
    """Returns the values of a version for a new run, without those that belong to what the version continued."""
    if config.schedule_start and preset in PRESETS:
        # A schedule that continued another one has a low rate, too low for new weights.
        config = replace(config, learning_rate=PRESETS[preset].learning_rate)
    return replace(
        config,
        schedule_start=0,
        schedule_start_ratio=0.0,
        distillation_alpha=TrainingConfig.distillation_alpha,
        distillation_temperature=TrainingConfig.distillation_temperature,
    )


def with_tokenizer(config: TrainingConfig, name: str, vocabulary_size: int) -> TrainingConfig:
    """Returns the values of a student with the tokenizer of its teachers, which has a name and a size."""
    return replace(config, tokenizer="gpt2" if name == "gpt2" else "bpe", vocabulary_size=vocabulary_size)


def misfit(
    teachers: Sequence[VersionManifest], config: TrainingConfig, continued: VersionManifest | None = None
) -> str:
    """Returns a sentence that says why these versions cannot teach a run; an empty text if they can.

    Predictions compare token by token, so all of them need one tokenizer; and a teacher reads the student's windows.
    """
    if not teachers:
        return ""
    first = continued or teachers[0]
    for teacher in teachers:
        if teacher.tokenizer_digest != first.tokenizer_digest:
            return (
                f"Version {teacher.version} has another tokenizer than version {first.version}, but the teachers of a "
                "run, and the version that it continues, need the same one."
            )
        if config.context_length > (longest := teacher.model["context_length"]):
            return (
                f"context_length is {config.context_length}, but the teacher, version {teacher.version}, sees only "
                f"{longest} tokens: a student sees at most as many."
            )
    return ""


def find(teacher: Teacher, registry: Registry, resume: int | None) -> TeacherVersion:
    """Returns a version that teaches a run which has not begun: from the versions, or from the run of the version
    `resume` that it continues, which keeps its own teachers. Raises `NotFound` if it is in neither."""
    if not is_number(teacher.version):
        version = registry.resolve(teacher.version)
        return TeacherVersion(version, registry.fetch(version))
    number = int(teacher.version)
    try:
        version = registry.version(number)
        if version.digest == teacher.digest:
            return TeacherVersion(version, registry.fetch(version))
    except NotFound:
        pass
    if resume is not None:
        kept = registry.teachers.taught_by(registry.version(resume).run, number, teacher.digest)
        if kept is not None:
            return kept
    raise NotFound(f"The teacher, version {number}, is no longer in the registry; name another one.")


def teachers_of(spec: RunSpec, registry: Registry) -> list[TeacherVersion]:
    """Returns the teachers that a run keeps, or, if it has not begun, those that it will keep, each version once.

    Raises as `find` does, and `CorruptCheckpoint` if a manifest cannot be read.
    """
    if kept := registry.teachers.of(spec.run):
        return kept
    found = [find(teacher, registry, spec.resume) for teacher in spec.teachers]
    return list({each.manifest.version: each for each in found}.values())


def keep_teachers(spec: RunSpec, registry: Registry, attempt: int) -> list[TeacherVersion]:
    """Returns the teachers of a run from its own folder, verified; the first attempt puts them there.

    None teaches if `distillation_alpha` is 0. Raises `FailedPrecondition` if a label names a version that does not fit,
    and the errors of `teachers_of` and `Teachers.keep`.
    """
    if not spec.teachers or not spec.config.distillation_alpha:
        return []
    kept = registry.teachers
    if kept.of(spec.run):
        kept.verify(spec.run)
        return kept.of(spec.run)
    found = teachers_of(spec, registry)
    _check(spec, [each.manifest for each in found], registry)
    fence = registry.take_over(spec.run, attempt)
    for each in found:
        kept.take(fence, each.folder)
    kept.keep(fence, [each.manifest.version for each in found])
    return kept.of(spec.run)


def _check(spec: RunSpec, teachers: Sequence[VersionManifest], registry: Registry) -> None:
    continued = None if spec.resume is None else registry.version(spec.resume)
    if problem := misfit(teachers, spec.config, continued):
        raise FailedPrecondition(problem)
    numbers = [int(each.version) for each in spec.teachers if is_number(each.version)]
    for teacher in teachers:
        if teacher.version not in numbers:
            require_trained(teacher, spec.force)


def taught_by(version: VersionManifest, registry: Registry) -> list[VersionManifest]:
    """Returns the versions that taught a version, and those that taught them, each once, as far as they are still in
    the registry or kept by the runs that they taught."""
    found = dict[int, VersionManifest]()
    students = [version]
    while students:
        student = students.pop()
        for record in student.teachers:
            teacher = _recorded(record, student.run, registry)
            if teacher is not None and teacher.version not in found:
                found[teacher.version] = teacher
                students.append(teacher)
    return list(found.values())


def _recorded(record: TeacherRecord, run: str, registry: Registry) -> VersionManifest | None:
    """Returns the version that a record names, from the versions or from the run that it taught; None if it is gone."""
    with suppress(NotFound, CorruptCheckpoint):
        if (version := registry.version(record.version)).digest == record.digest:
            return version
    with suppress(CorruptCheckpoint):
        kept = registry.teachers.taught_by(run, record.version, record.digest)
        return kept.manifest if kept else None
    return None


def of_other_text(teachers: Sequence[VersionManifest], revision: str) -> Iterator[str]:
    """Yields a sentence for each teacher that was trained on other text than that of a revision.

    Stories that are mixed with the text, whose revision follows a +, are never held out.
    """
    for teacher in teachers:
        other = teacher.dataset_revision.partition("+")[0] != revision.partition("+")[0]
        if other or teacher.preset == IMPORTED:
            yield (
                f"The teacher, version {teacher.version}, was trained on other text than its student, so it may have "
                "seen the student's held-out text; the held-out loss may then be too low."
            )
