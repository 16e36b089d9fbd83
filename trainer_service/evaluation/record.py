"""The record of an evaluation: what was measured of a version, and by which method. Loads no model framework.

A record is one JSON file in the registry, named after the digest of its method. Its sections are independent: each is
whole or absent, and an evaluation that goes on measures the absent ones.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from pydantic import TypeAdapter, ValidationError

from shared.errors import CorruptCheckpoint
from shared.text import excerpt
from trainer_service.evaluation.method import Method

LEVEL = 0.95
# The sections that hold any number of entries.
_SEVERAL = ("pairs", "judged")


@dataclass(frozen=True)
class Interval:
    """A confidence interval of the level `LEVEL`."""

    low: float
    high: float


@dataclass(frozen=True)
class PositionLoss:
    """The mean loss of the targets at the positions `first` to `last` of a window, and their number."""

    first: int
    last: int
    nats_per_token: float
    tokens: int


@dataclass(frozen=True)
class TextQuality:
    """The loss on the whole held-out text, weighted by tokens.

    interval: of `nats_per_token`; None if the text has few units.
    unit: what is resampled, `document` or `passage`; the units have `unit_nats` in all and `unit_tokens` each, (N,).
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    interval: Interval | None
    unit: str
    unit_nats: tuple[float, ...]
    unit_tokens: tuple[int, ...]
    positions: tuple[PositionLoss, ...]


class Overfit(StrEnum):
    """How much better a version predicts the text that it was trained on."""

    NONE = "none"
    SLIGHT = "slight"
    STRONG = "strong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class TrainingLoss:
    """The loss on as much training text as there is held-out text, and what held-out text costs more (`gap`)."""

    nats_per_token: float
    tokens: int
    interval: Interval | None
    gap: float
    gap_interval: Interval | None
    overfit: Overfit


@dataclass(frozen=True)
class WritingFigures:
    """Figures about several texts, written by the model or by people.

    distinct: the share of different ones among all 1-, 2- and 3-grams of tokens (Li et al. 2016), of one text for each
      prompt; the model's is the mean over its seeds.
    repeated: the share of 4-grams that occurred before in the same text.
    ended: the share of texts that end before the limit.
    copied: the longest run of tokens that also stands in the training text, of each text the longest: their median and
      maximum; None if the training text cannot be read.
    """

    texts: int
    tokens: int
    distinct: tuple[float, float, float]
    repeated: float
    ended: float
    copied_median: float | None
    copied_longest: int | None


@dataclass(frozen=True)
class Continuation:
    """A prompt, how the model continued it with a seed, and the longest run of tokens copied from the training text."""

    prompt: str
    seed: int
    text: str
    tokens: int
    ended: bool
    copied: int | None


@dataclass(frozen=True)
class Writing:
    """What the version writes, beside what people wrote after the same beginnings."""

    model: WritingFigures
    human: WritingFigures
    training_tokens: int
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of a time, in milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class DecodingSpeed:
    """How fast the engine answers this many requests at once: tokens of all of them, short prompts included."""

    rows: int
    tokens_per_s: float
    first_token_ms: Percentiles
    inter_token_ms: Percentiles


@dataclass(frozen=True)
class Speed:
    """Speeds on one machine; `training_rows` windows are a step. `threads` train and `serving_threads` serve; both are
    None on a GPU."""

    device: str
    threads: int | None
    training_rows: int
    training_tokens_per_s: float
    prefill_tokens_per_s: float
    decoding: tuple[DecodingSpeed, ...]
    serving_threads: int | None = None


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of training with a batch size: what a step holds besides weights and moments, the peak of the process
    with an evaluation, and the estimate that `gptloop train` prints, which is None on a GPU."""

    batch_size: int
    activations_bytes: int
    peak_bytes: int
    estimated_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """The memory of a version in training and in serving.

    `serving_bytes` is that of the weights, as they are laid out for decoding, and of as many slots as the last of
    `Speed.decoding` has rows.
    """

    weights_bytes: int
    optimizer_bytes: int
    cache_bytes_per_token: int
    serving_bytes: int
    training: tuple[TrainingMemory, ...]


@dataclass(frozen=True)
class MinimalPairs:
    """The share of pairs in a file in which the model prefers the right sentence; chance is one half."""

    name: str
    sha256: str
    pairs: int
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Subject:
    """The version: its number, its origin, and the digest of its manifest."""

    number: int
    run: str
    step: int
    digest: str
    parameters: int


class Verdict(StrEnum):
    """What a paired interval says about one version beside another one."""

    BETTER = "better"
    WORSE = "worse"
    UNKNOWN = "cannot be told"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class Opponent:
    """How the version differs from a rival on the same text.

    role: what the rival is, such as `control`; `method_digest` names the rival's record.
    difference: in nats per token, below 0 if the version is better; None, with the `reason`, if it is not compared.
    interval: of `difference`; None if the text has few units.
    """

    role: str
    version: Subject
    method_digest: str
    difference: float | None
    interval: Interval | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Standing:
    """How the version stands among its rivals.

    better: whether it is better than each of them.
    promoted: whether it became the stable version for that reason.
    sentence: the same in words.
    job: the job that found this; empty if there was none.
    """

    rivals: tuple[Opponent, ...]
    better: bool
    promoted: bool
    sentence: str
    job: str = ""


@dataclass(frozen=True)
class Grades:
    """Grades of a text from 1 to 10, or the means of several."""

    grammar: float
    consistency: float
    creativity: float


@dataclass(frozen=True)
class Judged:
    """What a large teacher says about the version's texts beside those of a rival, without knowing whose they are.

    pairs: how many pairs of continuations of the same beginning with the same seed there are; `judged` of them, after
      `prompts` beginnings, have an opinion in both orders.
    win_rate: the share of the judged pairs that the version wins; a tie counts half. None if no pair is judged.
    interval: of `win_rate`, from resampling beginnings; None for few of them.
    agreement: the share of pairs about which both orders say the same.
    calibration: the share of `calibration_pairs` pairs whose better text is known that were judged right.
    grades, rival_grades: the means of the version's and of the rival's.
    verdict: about the version; None if the opinions support none, and `no_verdict` says why.
    model, fingerprints: the judge, as the service names it and its configurations.
    template: names the wording of the questions.
    unanswered: the number of questions without a valid answer, by reason.
    cost_usd: what the questions cost, in US dollars, those without an answer included.
    """

    rival: Subject
    prompts: int
    pairs: int
    judged: int
    win_rate: float | None
    interval: Interval | None
    agreement: float | None
    calibration: float
    calibration_pairs: int
    grades: Grades | None
    rival_grades: Grades | None
    verdict: Verdict | None = None
    no_verdict: str = ""
    model: str = ""
    fingerprints: tuple[str, ...] = ()
    template: str = ""
    unanswered: Mapping[str, int] = field(default_factory=dict)
    cost_usd: float = 0.0


@dataclass(frozen=True)
class Record:
    """One evaluation of one version by one method; `notes` are sentences about what could not be measured."""

    version: Subject
    method: Method
    text: TextQuality | None = None
    training: TrainingLoss | None = None
    writing: Writing | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    pairs: tuple[MinimalPairs, ...] = ()
    verdict: Standing | None = None
    judged: tuple[Judged, ...] = ()
    notes: tuple[str, ...] = ()
    # When each section was measured, in seconds since the epoch.
    measured_at: dict[str, float] = field(default_factory=dict)

    def since(self, time: float) -> "Record":
        """Returns the record without the sections that were measured before a time, in seconds since the epoch."""
        old = {section for section, at in self.measured_at.items() if at < time}
        absent = {section: () if section in _SEVERAL else None for section in old}
        if "speed" in old:
            absent["memory"] = None
        times = {section: at for section, at in self.measured_at.items() if section not in old}
        return replace(self, measured_at=times, **absent)  # type: ignore[arg-type]

    def to_json(self) -> str:
        """Returns the text of the file; `method_digest` stands first, for other programs."""
        return json.dumps({"method_digest": self.method.digest, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Reads what `to_json` writes; raises `CorruptCheckpoint` for any other text."""
        try:
            return _RECORD.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CorruptCheckpoint(
                f"It is not the record of an evaluation: {place}: {excerpt(first['msg'])}."
            ) from None


_RECORD = TypeAdapter(Record)
