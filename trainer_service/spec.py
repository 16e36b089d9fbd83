"""What a job is asked to do, complete: nothing else defines the run."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from shared.errors import InvalidArgument, shown
from shared.registry.store import Registry
from trainer_service.presets import find_preset
from trainer_service.training.config import TrainingConfig
from trainer_service.training.corpus import DatasetSpec, absolute, check_size, check_spec

DEFAULT_PRESET = "demo"
DEFAULT_DATASET = "builtin"


@dataclass(frozen=True)
class TrainingRequest:
    """What a person asks for; empty or None is "not said"."""

    preset: str = ""
    dataset: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    resume: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobSpec:
    """A run: its name, its values, its text, and the version that it continues."""

    run: str
    preset: str
    config: TrainingConfig
    data: DatasetSpec
    resume: int | None

    def to_json(self) -> str:
        """As the queue holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "JobSpec":
        """The inverse of `to_json`; raises `InvalidArgument` where the text is not such a job."""
        try:
            values = json.loads(text)
            data = DatasetSpec(tuple(values["data"]["dataset"]), tuple(values["data"]["validation"]))
            config = TrainingConfig.from_dict(values["config"])
            run = values["run"]
            # It names a folder.
            if not re.fullmatch(r"\w[\w.-]*", run):
                raise ValueError(f"{run!r} is no name of a run")
            resume = values["resume"]
            return cls(run, values["preset"], config, data, None if resume is None else int(resume))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"The job cannot be understood: {error!r}.") from error


def resolve(request: TrainingRequest, registry: Registry) -> JobSpec:
    """Completes a request from the preset, or from the version that it resumes, and checks all of it.

    Raises `InvalidArgument`, `NotFound` or `DataError` with what would be right.
    """
    if request.resume is None:
        preset = request.preset or DEFAULT_PRESET
        config = find_preset(preset).override(request.overrides)
        data = DatasetSpec(request.dataset or (DEFAULT_DATASET,), request.validation)
    else:
        preset, config, data = _continued(request, request.resume, registry)
    check_spec(data)
    check_size(data, config.context_length)
    return JobSpec(new_run(preset), preset, config, absolute(data), request.resume)


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
            f'Set more steps, as in SET="max_steps={2 * parent.step}".'
        )
    registry.verified_state(parent.run, parent.step)
    data = DatasetSpec(
        request.dataset or parent.dataset_files,
        request.validation or (() if request.dataset else parent.validation_files),
    )
    return parent.preset, config.continuing(begun, parent.step, request.overrides), data


def parse_overrides(text: str) -> dict[str, str]:
    """The values of `SET="max_steps=500 batch_size=8"`; raises `InvalidArgument` on anything else."""
    overrides: dict[str, str] = {}
    for item in text.split():
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise InvalidArgument(
                f'{shown(item)} is not of the form name=value, as in SET="max_steps=500 batch_size=8".'
            )
        if overrides.setdefault(name, value) != value:
            raise InvalidArgument(f"{shown(name)} is set twice, to {shown(overrides[name])} and to {shown(value)}.")
    return overrides
