"""What a job is asked to do, complete: nothing else defines the run."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from shared.errors import AlreadyExists, InvalidArgument, shown
from shared.registry.store import Registry
from trainer_service.presets import find_preset
from trainer_service.training.config import TrainingConfig
from trainer_service.training.corpus import DatasetSpec, absolute, check_size, check_spec

DEFAULT_PRESET = "demo"
DEFAULT_DATASET = "builtin"

_NAME_LENGTH = 64


@dataclass(frozen=True)
class TrainingRequest:
    """What a person asks for; empty or None is "not said". `name` is the run's, and `notes` are for people."""

    preset: str = ""
    dataset: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    resume: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    notes: str = ""


@dataclass(frozen=True)
class JobSpec:
    """A run: its name, its values, its text, the version that it continues, and what a person noted."""

    run: str
    preset: str
    config: TrainingConfig
    data: DatasetSpec
    resume: int | None
    notes: str = ""

    def to_json(self) -> str:
        """As the queue holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "JobSpec":
        """The inverse of `to_json`; raises `InvalidArgument` where the text is not such a job."""
        try:
            values = json.loads(text)
            run, preset, resume, notes = values["run"], values["preset"], values["resume"], values.get("notes", "")
            # It names a folder.
            check_name(run)
            if not isinstance(preset, str) or not isinstance(notes, str) or type(resume) not in (int, type(None)):
                raise ValueError("preset, notes or resume is of another kind")
            config = TrainingConfig.from_dict(values["config"])
            return cls(run, preset, config, dataset_from_json(values["data"]), resume, notes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidArgument(f"It is no job: {error!r}.") from error


def check_name(name: str) -> None:
    """Raises `InvalidArgument` on what cannot name a run, and the folder of its states."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or len(name) > _NAME_LENGTH:
        raise InvalidArgument(
            f"The name of a run is {shown(name)}, but must have from 1 to {_NAME_LENGTH} letters, digits, dots, "
            "hyphens and underscores, and begin with a letter or digit."
        )


def dataset_from_json(values: Mapping[str, list[str]]) -> DatasetSpec:
    """The data of a job; raises `TypeError` or `KeyError` where there is something else."""
    dataset, validation = tuple(values["dataset"]), tuple(values["validation"])
    if not all(isinstance(name, str) for name in (*dataset, *validation)):
        raise TypeError("a data set is named by something else than text")
    return DatasetSpec(dataset, validation)


def resolve(request: TrainingRequest, registry: Registry) -> JobSpec:
    """Completes a request from the preset, or from the version that it resumes, and checks all of it.

    Raises `InvalidArgument`, `NotFound`, `AlreadyExists` or `DataError` with what would be right.
    """
    if request.name:
        check_name(request.name)
        _refuse_taken(request.name, registry)
    if request.resume is None:
        preset = request.preset or DEFAULT_PRESET
        config = find_preset(preset).override(request.overrides)
        data = DatasetSpec(request.dataset or (DEFAULT_DATASET,), request.validation)
    else:
        preset, config, data = _continued(request, request.resume, registry)
    check_spec(data)
    check_size(data, config.context_length)
    return JobSpec(request.name or new_run(preset), preset, config, absolute(data), request.resume, request.notes)


def _refuse_taken(name: str, registry: Registry) -> None:
    if registry.run_directory(name).exists() or any(version.run == name for version in registry.versions()):
        raise AlreadyExists(f"The registry has a run named {shown(name)} already; choose another name.")


def new_run(preset: str) -> str:
    """A name that no run had before."""
    return f"{preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def _continued(request: TrainingRequest, resume: int, registry: Registry) -> tuple[str, TrainingConfig, DatasetSpec]:
    parent = registry.version(resume)
    if request.preset and request.preset != parent.preset:
        raise InvalidArgument(
            f"Version {resume} was trained with the preset {parent.preset}; leave PRESET out to continue it."
        )
    begun = TrainingConfig.from_dict(parent.training)
    config = replace(begun, schedule_start=0).override(request.overrides)
    fixed = ("tokenizer", "vocabulary_size", "layers", "width", "heads", "hidden_width", "context_length", "tied_head")
    for name in fixed:
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
    data = DatasetSpec(
        request.dataset or parent.dataset_files,
        request.validation or (() if request.dataset else parent.validation_files),
    )
    return parent.preset, config.continuing(begun, parent.step, request.overrides), data


def parse_overrides(text: str) -> dict[str, str]:
    """The values of `--set "max_steps=500 batch_size=8"`; raises `InvalidArgument` on anything else."""
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
