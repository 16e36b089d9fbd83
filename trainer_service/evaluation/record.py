"""The record of an evaluation: what was measured of a version, and by which method. Loads no model framework.

A record is one JSON file in the registry, named after the digest of its method. Its sections are independent: each is
whole or absent, and an evaluation that goes on measures the absent ones.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Self

from pydantic import TypeAdapter, ValidationError

from shared.errors import CorruptCheckpoint
from shared.text import excerpt

# Raise it when the same method gives other figures.
CODE = 1
LEVEL = 0.95


@dataclass(frozen=True)
class HeldOutText:
    """A whole held-out split: its name for people, the revision of its data set, and the digest of its tokens."""

    name: str
    revision: str
    tokens: int
    text_bytes: int
    documents: int
    digest: str


@dataclass(frozen=True)
class Method:
    """Everything that figures on quality depend on besides the version itself.

    window, stride: in tokens; see `text_quality.py`.
    device: the kind of device, as `accelerator.Backend` names it.
    prompts, prompt_tokens: at `prompts` places of the held-out text, `prompt_tokens` tokens are continued.
    seeds, max_tokens, temperature: how each of them is continued.
    code: `CODE`.
    """

    text: HeldOutText
    tokenizer: str
    window: int
    stride: int
    precision: str
    device: str
    prompts: int
    prompt_tokens: int
    seeds: tuple[int, ...]
    max_tokens: int
    temperature: float
    dropout: float = 0.0
    code: int = CODE

    @property
    def windows(self) -> int:
        """The number of windows that cover the text."""
        return 1 + -(-max(self.text.tokens - self.window, 0) // self.stride)

    @property
    def digest(self) -> str:
        """SHA-256 of all values, in hexadecimal; of the text, only its tokens count."""
        values = asdict(self) | {"text": self.text.digest}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Self) -> Iterator[str]:
        """Yields a phrase for each value in which two methods differ, such as `window 128 and 256`."""
        for each in fields(self):
            mine, others = getattr(self, each.name), getattr(other, each.name)
            if mine == others or (each.name == "text" and mine.digest == others.digest):
                continue
            if each.name == "text":
                mine, others = (f"{text.name} ({text.tokens:,} tokens, {text.digest[:12]})" for text in (mine, others))
            elif each.name == "tokenizer":
                mine, others = mine[:12], others[:12]
            yield f"{each.name.replace('_', ' ')} {mine} and {others}"


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
    """

    rivals: tuple[Opponent, ...]
    better: bool
    promoted: bool
    sentence: str


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
    notes: tuple[str, ...] = ()
    # When each section was measured, in seconds since the epoch.
    measured_at: dict[str, float] = field(default_factory=dict)

    def since(self, time: float) -> "Record":
        """Returns the record without the sections that were measured before a time, in seconds since the epoch."""
        old = {section for section, at in self.measured_at.items() if at < time}
        absent = {section: () if section == "pairs" else None for section in old}
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
