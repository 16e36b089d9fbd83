"""Requests for jobs, one type for each kind: the commands and the API build them.

An empty or absent value stands for the default.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from shared.errors import AlreadyExists, InvalidArgument, shown
from shared.registry.decisions import run_of
from shared.registry.manifest import RUN_NAME, VersionManifest
from shared.registry.numbering import is_number
from shared.registry.registry import Registry
from trainer_service.distillation.readiness import require_trained
from trainer_service.jobs.needs import Needs
from trainer_service.jobs.specs import (
    EvaluateSpec,
    Kind,
    PrepareSpec,
    RunSpec,
    StoriesSpec,
    Teacher,
    TrainSpec,
    check_name,
    new_run,
)
from trainer_service.presets import find_preset
from trainer_service.teachers import misfit, named_teachers, student_config
from trainer_service.text.corpus import TEACHER, DatasetSpec, absolute, check_size, check_spec
from trainer_service.text.local_files import check_file
from trainer_service.text.sentence_pairs import check_pairs
from trainer_service.training.config import TrainingConfig

AnyRunSpec = TypeVar("AnyRunSpec", bound=RunSpec)

DEFAULT_PRESET = "demo"
DEFAULT_DATASET = "builtin"

# Limits on a request, because all of it travels through Redis, messages and lists.
_MAX_FILES = 1000
_MAX_PATH_BYTES = 4096
_MAX_OVERRIDES = 100
_MAX_AFTER = 100
_MAX_NOTES_LENGTH = 2000
_MAX_NUMBER = 2**63 - 1
_LONGEST_WINDOW = 1 << 17
_MAX_RIVALS = 32
_MAX_ROLE_LENGTH = 40
_MAX_STORIES = 1_000_000
_MAX_COST_USD = 10_000

# What a continued run inherits unchanged from its version.
_KEPT = (
    *("tokenizer", "vocabulary_size", "layers", "width", "heads", "hidden_width", "context_length", "tied_head"),
    "optimizer",
)


@dataclass(frozen=True, kw_only=True)
class _DataRequest:
    """What every request has: text, held-out text, the jobs that must finish first, and what the job needs of a worker,
    as `Needs.parse` reads it."""

    dataset: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    needs: str = ""

    def _check_data(self) -> None:
        Needs.parse(self.needs)
        files = (*self.dataset, *self.validation)
        if len(files) > _MAX_FILES:
            raise InvalidArgument(
                f"The request names {len(files):,} files, but a job takes at most {_MAX_FILES}; join some of them."
            )
        for name in files:
            if len(name.encode(errors="surrogatepass")) > _MAX_PATH_BYTES or "\0" in name:
                raise InvalidArgument(
                    f"The path {shown(name)} is invalid: a path has at most {_MAX_PATH_BYTES} bytes and no null byte."
                )
        _check_after(self.after)


@dataclass(frozen=True, kw_only=True)
class _RunRequest(_DataRequest):
    """What defines a run: a preset or the version to continue, and values that override theirs.

    teachers: numbers and labels of the versions that teach the run. With `distillation_alpha` 0 they teach nothing, but
      a new run still takes their tokenizer, values and text, as a control does.
    force: as in `RunSpec`.
    """

    preset: str = ""
    resume: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    teachers: tuple[str, ...] = ()
    force: bool = False

    def _resolve_run(self, spec: type[AnyRunSpec], registry: Registry, name: str = "", notes: str = "") -> AnyRunSpec:
        self._check_data()
        if len(self.overrides) > _MAX_OVERRIDES:
            raise InvalidArgument(
                f"The request sets {len(self.overrides):,} values, but a run has fewer than {_MAX_OVERRIDES}."
            )
        teachers = named_teachers(self.teachers, registry, waits=bool(self.after))
        numbered = [registry.version(int(each.version)) for each in teachers if is_number(each.version)]
        parent = None
        if self.resume is not None:
            preset, config, data = self._continue_version(self.resume, registry)
            parent = registry.version(self.resume)
        elif numbered:
            preset = self.preset or numbered[0].preset
            config, data = student_config(numbered[0], self.preset, self.overrides), self._data_like(numbered[0])
        else:
            preset = self.preset or DEFAULT_PRESET
            config = find_preset(preset).override(self.overrides)
            data = DatasetSpec(self.dataset or (DEFAULT_DATASET,), self.validation)
        if problem := misfit(numbered, config, parent):
            raise InvalidArgument(problem)
        teaches = config.distillation_alpha > 0
        if teachers and teaches:
            for version in (*numbered, *([parent] if parent else [])):
                require_trained(version, self.force)
        elif self.teachers and parent and "distillation_alpha" not in self.overrides:
            raise InvalidArgument(
                f"distillation_alpha is 0 in version {parent.version}, so teachers would teach nothing; set it too, as "
                'in --set "distillation_alpha=0.7".'
            )
        if parent is not None and data.story_set and data.dataset != parent.dataset_files:
            require_trained(parent, self.force)
        if parent is not None:
            inherited = tuple(Teacher(str(each.version), each.digest) for each in parent.teachers)
            teachers = (teachers or inherited) if teaches else ()
        check_spec(data)
        check_size(data, config.context_length)
        self._check_stories(data, config)
        run = name or new_run(preset)
        return spec(
            *(run, preset, config, absolute(data), self.resume, notes, teachers),
            force=self.force,
            needs=Needs.parse(self.needs).to_text(),
        )

    def _check_stories(self, data: DatasetSpec, config: TrainingConfig) -> None:
        """Checks that the values about a teacher's stories say something about this text."""
        if data.mixes_stories and not config.teacher_share:
            raise InvalidArgument(
                f"teacher_share is 0, so the run would read none of the stories of {TEACHER}{data.story_set}; set it "
                "above 0, or leave them out."
            )
        if config.teacher_prompts and "teacher_prompts" in self.overrides and not data.mixes_stories:
            raise InvalidArgument(
                "teacher_prompts is true, but the run mixes no stories of a large teacher with other text; name both, "
                'as in --dataset "builtin teacher:bedtime".'
            )

    def _data_like(self, version: VersionManifest) -> DatasetSpec:
        """Returns the text that the request names, or else that of a version."""
        return DatasetSpec(
            self.dataset or version.dataset_files,
            self.validation or (() if self.dataset else version.validation_files),
        )

    def _continue_version(self, resume: int, registry: Registry) -> tuple[str, TrainingConfig, DatasetSpec]:
        if not 0 < resume <= _MAX_NUMBER:
            raise InvalidArgument(f"resume is {shown(resume)}, but versions are numbered from 1.")
        parent = registry.version(resume)
        if self.preset and self.preset != parent.preset:
            raise InvalidArgument(
                f"Version {resume} was trained with the preset {parent.preset}; leave the preset out to continue it."
            )
        begun = TrainingConfig.from_dict(parent.training)
        config = replace(begun, schedule_start=0).override(self.overrides)
        for name in _KEPT:
            if getattr(config, name) != getattr(begun, name):
                raise InvalidArgument(
                    f"{name} is {getattr(begun, name)} in version {resume} and cannot change when it is continued."
                )
        if parent.step >= config.max_steps:
            raise InvalidArgument(
                f"Version {resume} is at step {parent.step} of {config.max_steps}, so nothing is left to do. "
                f'Set more steps, as in --set "max_steps={2 * parent.step}".'
            )
        registry.verified_state(parent.run, parent.step)
        return parent.preset, config.continuing(begun, parent.step, self.overrides), self._data_like(parent)


@dataclass(frozen=True, kw_only=True)
class PrepareRequest(_RunRequest):
    """Prepare the tokens of a run, so that the run finds them."""

    kind: ClassVar[Kind] = Kind.PREPARE

    def resolve(self, registry: Registry) -> PrepareSpec:
        """Completes the request and checks it; raises as `TrainRequest.resolve` does."""
        return self._resolve_run(PrepareSpec, registry)


@dataclass(frozen=True, kw_only=True)
class TrainRequest(_RunRequest):
    """Train a run; `name` is the name of the run, and `notes` are for people."""

    kind: ClassVar[Kind] = Kind.TRAIN

    name: str = ""
    notes: str = ""

    def resolve(self, registry: Registry) -> TrainSpec:
        """Completes the request from the preset, or from the version that it continues, and checks it.

        Raises `InvalidArgument`, `NotFound`, `AlreadyExists` or `DataError` with a sentence that says what would be
        right.
        """
        if len(self.notes) > _MAX_NOTES_LENGTH or not all(each.isprintable() or each in "\n\t" for each in self.notes):
            raise InvalidArgument(
                f"The notes are {shown(self.notes)}, but must be text of at most {_MAX_NOTES_LENGTH} characters."
            )
        if self.name:
            check_name(self.name)
            if registry.has_begun(self.name):
                raise AlreadyExists(f"The registry has a run named {shown(self.name)} already; choose another name.")
        return self._resolve_run(TrainSpec, registry, self.name, self.notes)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(_DataRequest):
    """Evaluate a version: its number, or `best`, `latest` or `run:<name>` as it stands when the job begins.

    window: the tokens of a window, which versions that are compared have in common; 0 stands for the version's context.
    pairs: files of minimal pairs, in BLiMP's format.
    speed: whether to measure speed and memory too.
    again: whether to measure again what an earlier evaluation by the same method has measured.
    rivals, promote, judge_usd: as in `EvaluateSpec`.
    """

    kind: ClassVar[Kind] = Kind.EVALUATE

    version: str = "best"
    window: int = 0
    pairs: tuple[str, ...] = ()
    speed: bool = True
    again: bool = False
    rivals: Mapping[str, str] = field(default_factory=dict)
    promote: bool = False
    judge_usd: float = 0.0

    def resolve(self, registry: Registry) -> EvaluateSpec:
        """Checks the request; raises `InvalidArgument`, `NotFound` or `DataError` with what would be right."""
        self._check_data()
        self._check_version("version", self.version, registry)
        self._check_rivals(registry)
        if not 0 <= self.window <= _LONGEST_WINDOW:
            raise InvalidArgument(
                f"window is {shown(self.window)}, but must be from 1 to the context of the version, or 0 for all of it."
            )
        for name in self.validation:
            check_file(Path(name))
        for name in self.pairs:
            check_pairs(Path(name))
        data = DatasetSpec(self.dataset, self.validation)
        if self.dataset:
            check_spec(data)
        pairs = tuple(str(Path(name).absolute()) for name in self.pairs)
        since = time.time() if self.again else 0.0
        return EvaluateSpec(
            version=self.version,
            data=absolute(data),
            window=self.window,
            pairs=pairs,
            speed=self.speed,
            since=since,
            rivals=dict(self.rivals),
            promote=self.promote,
            judge_usd=self.judge_usd,
            needs=Needs.parse(self.needs).to_text(),
        )

    def _check_version(self, name: str, version: str, registry: Registry) -> None:
        """Checks that a number exists, and a label too, unless a job before this one may publish its version."""
        if is_number(version):
            registry.version(int(version))
        elif not _is_label(version):
            raise InvalidArgument(
                f"{name} is {shown(version)}, but must be a number, best, latest or run:<name>, with the name of a run."
            )
        elif not self.after:
            registry.resolve(version)

    def _check_rivals(self, registry: Registry) -> None:
        if len(self.rivals) > _MAX_RIVALS:
            raise InvalidArgument(
                f"The request names {len(self.rivals):,} rivals, but a version has at most {_MAX_RIVALS}."
            )
        if self.judge_usd:
            _check_cost("judge_usd", self.judge_usd)
            if not self.rivals:
                raise InvalidArgument("The request pays for a judge, but names no rival to judge the version beside.")
        if self.promote and not self.rivals:
            raise InvalidArgument("The request promotes a version, but names no rival that it must be better than.")
        for role, version in self.rivals.items():
            if not (0 < len(role) <= _MAX_ROLE_LENGTH and role.isprintable()):
                raise InvalidArgument(
                    f"The role of a rival is {shown(role)}, but must have from 1 to {_MAX_ROLE_LENGTH} printable "
                    "characters."
                )
            self._check_version(f"the rival {shown(role)}", version, registry)


@dataclass(frozen=True, kw_only=True)
class StoriesRequest:
    """Pay a large teacher for stories: the name of their set, and as in `StoriesSpec`."""

    kind: ClassVar[Kind] = Kind.STORIES

    # A message leaves empty values out, so they reach the checks as defaults.
    name: str = ""
    count: int = 0
    max_cost_usd: float = 0.0
    after: tuple[str, ...] = ()

    def resolve(self, _registry: Registry) -> StoriesSpec:
        """Checks the request; raises `InvalidArgument` with what would be right."""
        check_name(self.name, "a set of stories")
        if not 1 <= self.count <= _MAX_STORIES:
            raise InvalidArgument(f"count is {shown(self.count)}, but must be from 1 to {_MAX_STORIES:,} stories.")
        _check_cost("max_cost_usd", self.max_cost_usd)
        _check_after(self.after)
        return StoriesSpec(self.name, self.count, self.max_cost_usd)


def _check_cost(name: str, cost_usd: float) -> None:
    if not 0 < cost_usd <= _MAX_COST_USD or cost_usd != round(cost_usd, 6):
        raise InvalidArgument(
            f"{name} is {shown(cost_usd)}, but must be an amount above 0 and up to {_MAX_COST_USD:,} US dollars, with "
            "at most six decimal places."
        )


def _is_label(text: str) -> bool:
    run = run_of(text)
    return text in ("best", "latest") or (run is not None and RUN_NAME.fullmatch(run) is not None)


JobRequest = PrepareRequest | TrainRequest | EvaluateRequest | StoriesRequest


def _check_after(after: tuple[str, ...]) -> None:
    if len(after) > _MAX_AFTER:
        raise InvalidArgument(f"The request waits for {len(after):,} jobs, but a job waits for at most {_MAX_AFTER}.")


def parse_overrides(text: str) -> dict[str, str]:
    """Reads `--set "max_steps=500 batch_size=8"`; raises `InvalidArgument` if the text has another form."""
    overrides: dict[str, str] = {}
    for item in text.split():
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise InvalidArgument(
                f'{shown(item)} is not of the form name=value, as in --set "max_steps=500 batch_size=8".'
            )
        if overrides.setdefault(name, value) != value:
            raise InvalidArgument(f"{shown(name)} is set twice, to {shown(overrides[name])} and to {shown(value)}.")
    return overrides
