"""The complete description of a job, as the queue stores it: nothing else defines what the job does."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar

from shared.errors import InvalidArgument, shown
from shared.registry.manifest import typed
from trainer_service.jobs.local_files import files_of
from trainer_service.jobs.needs import Needs
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.config import TrainingConfig

_NAME_LENGTH = 64


class Kind(Enum):
    """What a job does: prepare the tokens of a run, train the run, evaluate a version, or pay for stories."""

    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"
    STORIES = "stories"


@dataclass(frozen=True)
class _Spec:
    """What every specification has.

    needs: what the job needs of a worker, as `Needs.parse` reads it.
    place: the folder of data whose worker must do the job, as `place_of` names it; empty: any.
    file_sizes: the sizes of `files` in bytes when the job was queued.
    """

    needs: str = field(default="", kw_only=True)
    place: str = field(default="", kw_only=True)
    file_sizes: tuple[int, ...] = field(default=(), kw_only=True)

    def to_json(self) -> str:
        """Returns the JSON text that the queue stores."""
        return json.dumps(asdict(self))

    @property
    def wants(self) -> Needs:
        """What the job needs of a worker."""
        return replace(Needs.parse(self.needs), place=self.place)

    @property
    def files(self) -> tuple[str, ...]:
        """The local files that the job reads."""
        return ()


@dataclass(frozen=True)
class Teacher:
    """A version whose predictions a run learns: its number, or a label that is resolved when the run begins, and then
    the digest of its manifest."""

    version: str
    digest: str = ""


@dataclass(frozen=True)
class RunSpec(_Spec):
    """A run: its name, its values, its text, the version that it continues, and the user's notes.

    teachers: the mean of their predicted probabilities is learned.
    force: whether teachers, and the version that is continued, may be badly trained.
    stories: how many stories are read of the set of a teacher that the text names, the first ones; None stands for all.
    """

    run: str
    preset: str
    config: TrainingConfig
    data: DatasetSpec
    resume: int | None
    notes: str = ""
    teachers: tuple[Teacher, ...] = ()
    force: bool = False
    stories: int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The local files that the job reads."""
        return files_of(self.data)


@dataclass(frozen=True)
class PrepareSpec(RunSpec):
    """A job that prepares the tokens of a run."""

    kind: ClassVar[Kind] = Kind.PREPARE


@dataclass(frozen=True)
class TrainSpec(RunSpec):
    """A job that trains a run.

    until: the step at which the job waits until somebody extends it; None: it trains to the end of its schedule.
    """

    kind: ClassVar[Kind] = Kind.TRAIN

    until: int | None = field(default=None, kw_only=True)

    @property
    def last_step(self) -> int:
        """The step after which an attempt ends."""
        return self.config.max_steps if self.until is None else min(self.until, self.config.max_steps)

    @property
    def wants(self) -> Needs:
        """What the job needs of a worker, which starts its ranks."""
        return replace(super().wants, ranks=self.config.world_size)


@dataclass(frozen=True)
class EvaluateSpec(_Spec):
    """A version, given by its number or by a label that the first attempt resolves, and the text to measure it on.

    Without a data set and held-out files, the text is the held-out text of the version's own training.
    window: the tokens of a window; 0 stands for the version's context.
    pairs: files of minimal pairs.
    speed: whether to measure speed and memory too.
    since: what was measured before this time, in seconds since the epoch, is measured again.
    rivals: versions, numbers or labels, that are evaluated on the same text and compared with the version, by the role
      that the report names, such as `control`.
    promote: whether the version becomes the stable one if it is better than every rival.
    judge_usd: the most that judgements of the large teacher may cost, in US dollars; 0 asks for none.
    """

    kind: ClassVar[Kind] = Kind.EVALUATE

    version: str
    data: DatasetSpec
    window: int = 0
    pairs: tuple[str, ...] = ()
    speed: bool = True
    since: float = 0.0
    rivals: Mapping[str, str] = field(default_factory=dict)
    promote: bool = False
    judge_usd: float = 0.0

    @property
    def files(self) -> tuple[str, ...]:
        """The local files that the job reads."""
        return files_of(self.data, self.pairs)

    @property
    def judge_cap_usd(self) -> Decimal:
        """The most that the judgements may cost, exactly as it was written."""
        return Decimal(str(self.judge_usd))

    @property
    def run(self) -> str:
        """What lists show instead of the name of a run."""
        return f"version {self.version}"


@dataclass(frozen=True)
class StoriesSpec(_Spec):
    """Stories that a large teacher writes: the name of their set, how many it shall have, and the most that the set may
    cost in all, in US dollars."""

    kind: ClassVar[Kind] = Kind.STORIES

    name: str
    count: int
    max_cost_usd: float

    @property
    def run(self) -> str:
        """What lists show instead of the name of a run."""
        return f"stories {self.name}"

    @property
    def cap_usd(self) -> Decimal:
        """The most that the set may cost, exactly as it was written."""
        return Decimal(str(self.max_cost_usd))

    @property
    def data(self) -> DatasetSpec:
        """The job reads no data."""
        return DatasetSpec(())


Spec = PrepareSpec | TrainSpec | EvaluateSpec | StoriesSpec

_SPECS: dict[Kind, type[Spec]] = {spec.kind: spec for spec in (PrepareSpec, TrainSpec, EvaluateSpec, StoriesSpec)}


def spec_from_json(kind: Kind, text: str) -> Spec:
    """Reads the specification of a job; raises `InvalidArgument` if the text is not one of this kind."""
    try:
        values = json.loads(text)
        if "config" in values:
            values["config"] = TrainingConfig.from_dict(values["config"])
        if "data" in values:
            values["data"] = DatasetSpec(**_typed(DatasetSpec, values["data"]))
        if "teachers" in values:
            values["teachers"] = [Teacher(**_typed(Teacher, each)) for each in values["teachers"]]
        spec = _SPECS[kind](**_typed(_SPECS[kind], values))
        if isinstance(spec, RunSpec | StoriesSpec):
            # The name is also the name of a folder.
            check_name(spec.name if isinstance(spec, StoriesSpec) else spec.run)
        _ = spec.wants  # raises if they are invalid
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgument(f"Its specification is invalid: {error!r}.") from error
    return spec


def _typed(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a dataclass as `typed` does; raises `TypeError` if a list or a mapping has an element of
    another type."""
    found = typed(owner, values)
    for name, value in found.items():
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
        if not all(type(part) is int if name == "file_sizes" else isinstance(part, str | Teacher) for part in parts):
            raise TypeError(f"{name} has an element of another type")
    return found


def check_name(name: str, what: str = "a run") -> None:
    """Raises `InvalidArgument` if `name` cannot name a run, or `what` else it names, and the folder of its files."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or len(name) > _NAME_LENGTH:
        raise InvalidArgument(
            f"The name of {what} is {shown(name)}, but must have from 1 to {_NAME_LENGTH} letters, digits, dots, "
            "hyphens and underscores, and begin with a letter or digit."
        )


def new_run(preset: str) -> str:
    """Returns a name for a run that no other run has."""
    return f"{preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
