"""The kinds of jobs, and what defines a job of each. A worker does these things and no others."""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from shared.errors import InvalidArgument, shown
from shared.registry.store import Registry
from trainer_service.jobs.spec import JobSpec, TrainingRequest, dataset_from_json, resolve
from trainer_service.training.corpus import DatasetSpec, absolute, check_spec
from trainer_service.training.local_files import check_file

# What a request may hold at most: everything of it travels through Redis, messages and lists.
_MAX_FILES = 1000
_MAX_PATH_BYTES = 4096
_MAX_OVERRIDES = 100
_MAX_AFTER = 100
_MAX_NOTES_LENGTH = 2000
_MAX_NUMBER = 2**63 - 1


class Kind(Enum):
    """What a job does: prepare a run's data, train the run, or measure a version's loss."""

    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class EvaluationSpec:
    """A version, by its number or by a label that is resolved when the job begins, and the text to measure it on.

    Without a dataset it is that of the version's own training; without any files, its held-out text.
    """

    version: str
    data: DatasetSpec

    @property
    def run(self) -> str:
        """What lists show in place of a run."""
        return f"version {self.version}"

    def to_json(self) -> str:
        """As the queue holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EvaluationSpec":
        """The inverse of `to_json`; raises `InvalidArgument` where the text is not such a job."""
        try:
            values = json.loads(text)
            if not isinstance(values["version"], str):
                raise ValueError("version is of another kind")
            return cls(values["version"], dataset_from_json(values["data"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidArgument(f"It is no job: {error!r}.") from error


Spec = JobSpec | EvaluationSpec


@dataclass(frozen=True)
class JobRequest:
    """What a person asks for. `version` counts for an evaluation only, and of `training` that only has the data."""

    kind: Kind = Kind.TRAIN
    training: TrainingRequest = field(default_factory=TrainingRequest)
    version: str = ""
    after: tuple[str, ...] = ()


def complete(request: JobRequest, registry: Registry) -> Spec:
    """All that defines the job, checked.

    Raises `InvalidArgument`, `NotFound`, `AlreadyExists` or `DataError` with what would be right.
    """
    training = request.training
    _check_bounds(request)
    if (training.name or training.notes) and request.kind is not Kind.TRAIN:
        raise InvalidArgument("A name and notes are for a run, but this job is no training.")
    if request.kind is not Kind.EVALUATE:
        if request.version:
            raise InvalidArgument("version is for evaluations; `resume` names the version that training continues.")
        return resolve(training, registry)
    if training.preset or training.resume is not None or training.overrides:
        raise InvalidArgument("An evaluation has a version and data, but no preset, resume or overrides.")
    version = request.version or "best"
    if version.isdecimal():
        registry.version(int(version))
    elif version not in ("best", "latest"):
        raise InvalidArgument(f"version is {shown(version)}, but must be a number, best or latest.")
    elif not request.after:
        registry.resolve(version)
    for name in training.validation:
        check_file(Path(name))
    data = DatasetSpec(training.dataset, training.validation)
    if training.dataset:
        check_spec(data)
    return EvaluationSpec(version, absolute(data))


def spec_from_json(kind: Kind, text: str) -> Spec:
    """What defines a job of a kind; raises `InvalidArgument` where the text does not."""
    return EvaluationSpec.from_json(text) if kind is Kind.EVALUATE else JobSpec.from_json(text)


def _check_bounds(request: JobRequest) -> None:
    """Raises `InvalidArgument` on more than a job can hold."""
    training = request.training
    files = (*training.dataset, *training.validation)
    if len(files) > _MAX_FILES:
        raise InvalidArgument(f"{len(files):,} files are named, but a job has at most {_MAX_FILES}; join some of them.")
    for name in files:
        if len(name.encode(errors="surrogatepass")) > _MAX_PATH_BYTES or "\0" in name:
            raise InvalidArgument(f"The path {shown(name)} cannot be one: a path has at most {_MAX_PATH_BYTES} bytes.")
    if len(training.overrides) > _MAX_OVERRIDES:
        raise InvalidArgument(f"{len(training.overrides):,} values are set, but a run has fewer.")
    if len(request.after) > _MAX_AFTER:
        raise InvalidArgument(f"{len(request.after):,} jobs are named, but a job comes after at most {_MAX_AFTER}.")
    notes = training.notes
    if len(notes) > _MAX_NOTES_LENGTH or not all(each.isprintable() or each in "\n\t" for each in notes):
        raise InvalidArgument(
            f"The notes are {shown(notes)}, but must be text of at most {_MAX_NOTES_LENGTH} characters."
        )
    if training.resume is not None and not 0 < training.resume <= _MAX_NUMBER:
        raise InvalidArgument(f"resume is {shown(training.resume)}, but versions are numbered from 1 on.")
    if len(request.version) > len(str(_MAX_NUMBER)):
        raise InvalidArgument(f"version is {shown(request.version)}, but must be a number, best or latest.")
