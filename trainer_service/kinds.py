"""The kinds of jobs, and what defines a job of each. A worker does these things and no others."""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from shared.errors import InvalidArgument
from shared.registry.store import Registry
from trainer_service.spec import JobSpec, TrainingRequest, resolve
from trainer_service.training.corpus import DatasetSpec, absolute, check_spec
from trainer_service.training.local_files import check_file


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
            data = DatasetSpec(tuple(values["data"]["dataset"]), tuple(values["data"]["validation"]))
            return cls(values["version"], data)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"The job cannot be understood: {error!r}.") from error


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

    Raises `InvalidArgument`, `NotFound` or `DataError` with what would be right.
    """
    training = request.training
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
        raise InvalidArgument(f"version is {version!r}, but must be a number, best or latest.")
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
