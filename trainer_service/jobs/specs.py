"""The complete description of a job, as the queue stores it: nothing else defines what the job does."""

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass
from enum import Enum
from typing import ClassVar

from shared.errors import InvalidArgument, shown
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig

_NAME_LENGTH = 64


class Kind(Enum):
    """What a job does: prepare the tokens of a run, train the run, or measure the loss of a version."""

    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class RunSpec:
    """A run: its name, its values, its text, the version that it continues, and the user's notes."""

    run: str
    preset: str
    config: TrainingConfig
    data: DatasetSpec
    resume: int | None
    notes: str = ""

    def to_json(self) -> str:
        """Returns the JSON text that the queue stores."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class PrepareSpec(RunSpec):
    """A job that prepares the tokens of a run."""

    kind: ClassVar[Kind] = Kind.PREPARE


@dataclass(frozen=True)
class TrainSpec(RunSpec):
    """A job that trains a run."""

    kind: ClassVar[Kind] = Kind.TRAIN


@dataclass(frozen=True)
class EvaluateSpec:
    """A version, given by its number or by a label that is resolved when the job begins, and the text to measure it on.

    Without a data set and held-out files, the text is the held-out text of the version's own training.
    window: the tokens of a window; 0 stands for the version's context.
    pairs: files of minimal pairs.
    speed: whether to measure speed and memory too.
    since: what was measured before this time, in seconds since the epoch, is measured again.
    """

    kind: ClassVar[Kind] = Kind.EVALUATE

    version: str
    data: DatasetSpec
    window: int = 0
    pairs: tuple[str, ...] = ()
    speed: bool = True
    since: float = 0.0

    @property
    def run(self) -> str:
        """What lists show instead of the name of a run."""
        return f"version {self.version}"

    def to_json(self) -> str:
        """Returns the JSON text that the queue stores."""
        return json.dumps(asdict(self))


Spec = PrepareSpec | TrainSpec | EvaluateSpec


def spec_from_json(kind: Kind, text: str) -> Spec:
    """Reads the specification of a job; raises `InvalidArgument` if the text is not one of this kind."""
    try:
        values = json.loads(text)
        data = DatasetSpec(
            tuple(map(_text, values["data"]["dataset"])), tuple(map(_text, values["data"]["validation"]))
        )
        if kind is Kind.EVALUATE:
            window, speed, since = values.get("window", 0), values.get("speed", True), values.get("since", 0.0)
            if type(window) is not int or type(speed) is not bool or type(since) not in (int, float):
                raise TypeError("window, speed or since has another type")
            pairs = tuple(map(_text, values.get("pairs", ())))
            return EvaluateSpec(_text(values["version"]), data, window, pairs, speed, since)
        run, preset, resume, notes = values["run"], _text(values["preset"]), values["resume"], values.get("notes", "")
        # The name is also the name of a folder.
        check_name(run)
        if type(resume) not in (int, type(None)):
            raise TypeError("resume has another type")
        spec = TrainSpec if kind is Kind.TRAIN else PrepareSpec
        return spec(run, preset, TrainingConfig.from_dict(values["config"]), data, resume, _text(notes))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgument(f"Its specification is invalid: {error!r}.") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a value is not text")
    return value


def check_name(name: str) -> None:
    """Raises `InvalidArgument` if `name` cannot name a run and the folder of its states."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or len(name) > _NAME_LENGTH:
        raise InvalidArgument(
            f"The name of a run is {shown(name)}, but must have from 1 to {_NAME_LENGTH} letters, digits, dots, "
            "hyphens and underscores, and begin with a letter or digit."
        )


def new_run(preset: str) -> str:
    """Returns a name for a run that no other run has."""
    return f"{preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
