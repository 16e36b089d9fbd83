"""Everything that defines a training run apart from its data. Importing this loads no model framework."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import get_type_hints

from shared.errors import InvalidArgument
from shared.gpt.config import GPTConfig

# On a CPU, a thread takes its rows through the model so many tokens at a time: what is computed stays near the caches.
MICRO_BATCH_TOKENS = 1024
# Logits of so many numbers exist at a time, and as many exponentials: 128 MiB each in fp32.
CHUNK_ELEMENTS = 1 << 25

# What shapes the schedule: a run that continues a version with others of these begins a new one.
_SHAPE = ("schedule", "max_steps", "learning_rate", "warmup_steps", "decay_ratio", "final_learning_rate_ratio")
# Where the schedule began, which nobody sets.
_START = ("schedule_start", "schedule_start_ratio")


@dataclass(frozen=True)
class TrainingConfig:
    """One flat set of values, so that every one can be overridden by name (`SET="max_steps=500"`)."""

    # The tokenizer: "gpt2", or "bpe" trained on the corpus to `vocabulary_size` tokens.
    tokenizer: str
    vocabulary_size: int
    # The model.
    layers: int
    width: int
    heads: int
    hidden_width: int
    context_length: int
    tied_head: bool
    dropout: float
    # The schedule: a linear warm-up, then down to a share of the rate at `max_steps`, see `learning_rate_at`.
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    schedule: str = "cosine"
    decay_ratio: float = 0.2
    final_learning_rate_ratio: float = 0.1
    # The step at which the schedule began, and the rate there as a share of `learning_rate`: not 0 in a run that
    # continues a version on a schedule of its own.
    schedule_start: int = 0
    schedule_start_ratio: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_gradient_norm: float = 1.0
    seed: int = 1337
    # Held-out evaluation, and with it a state and a version.
    evaluation_interval: int = 250
    evaluation_windows: int = 64
    report_interval: int = 10
    # Data. 0: as many as the run will read; for validation, as many as the evaluation reads.
    max_train_tokens: int = 0
    max_validation_tokens: int = 0
    # Held out from a data set that has no split of its own.
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        self.gpt  # noqa: B018 - raises on a shape that cannot be a model
        positive = ("max_steps", "batch_size", "evaluation_interval", "evaluation_windows", "report_interval")
        for name in positive:
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name in ("warmup_steps", "max_train_tokens", "max_validation_tokens"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, but must not be negative.")
        if not 0 <= self.seed < 2**32:
            raise InvalidArgument(f"seed is {self.seed}, but must be from 0 to {2**32 - 1}.")
        if self.tokenizer not in ("gpt2", "bpe"):
            raise InvalidArgument(f"tokenizer is {self.tokenizer!r}, but must be gpt2 or bpe.")
        if self.tokenizer == "gpt2" and self.vocabulary_size != 50257:
            raise InvalidArgument(f"GPT-2's tokenizer has 50257 tokens, but vocabulary_size is {self.vocabulary_size}.")
        if self.tokenizer == "bpe" and not 257 <= self.vocabulary_size <= 65536:
            raise InvalidArgument(
                f"vocabulary_size is {self.vocabulary_size}, but a byte-level BPE has from 257 to 65536 tokens."
            )
        if not 0.0 < self.learning_rate <= 1.0:
            raise InvalidArgument(f"learning_rate is {self.learning_rate}, but must be above 0 and at most 1.")
        if self.schedule not in ("cosine", "wsd"):
            raise InvalidArgument(f"schedule is {self.schedule!r}, but must be cosine or wsd.")
        if not 0.0 < self.decay_ratio <= 1.0:
            raise InvalidArgument(f"decay_ratio is {self.decay_ratio}, but must be above 0 and at most 1.")
        for name in ("final_learning_rate_ratio", "schedule_start_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, but must be from 0 to 1.")
        if not 0 <= self.schedule_start < self.max_steps:
            raise InvalidArgument(
                f"schedule_start is {self.schedule_start}, but must be from 0 to below max_steps, {self.max_steps}."
            )
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, but must be at least 0 and below 1.")
        for name in ("weight_decay", "max_gradient_norm"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise InvalidArgument(f"{name} is {getattr(self, name)}, but must be a number that is not negative.")
        if not 0.0 < self.validation_share < 1.0:
            raise InvalidArgument(f"validation_share is {self.validation_share}, but must be between 0 and 1.")

    @property
    def gpt(self) -> GPTConfig:
        """The shape of the model that is trained."""
        return GPTConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            hidden_width=self.hidden_width,
            context_length=self.context_length,
            vocabulary_size=self.vocabulary_size,
            tied_head=self.tied_head,
            dropout=self.dropout,
        )

    @property
    def tokens_per_step(self) -> int:
        """Target tokens that one step learns from."""
        return self.batch_size * self.context_length

    @property
    def warmup_end(self) -> int:
        """The first step after the warm-up, which takes at most half of the schedule, and no step from the highest
        rate on."""
        if self.schedule_start_ratio == 1.0:
            return self.schedule_start
        return self.schedule_start + min(self.warmup_steps, (self.max_steps - self.schedule_start) // 2)

    @property
    def decay_start(self) -> int:
        """The step from which the rate goes down: with a cosine the end of the warm-up, else `decay_ratio` of
        `max_steps` before the end, but not before the warm-up's."""
        if self.schedule == "cosine":
            return self.warmup_end
        return max(self.max_steps - max(round(self.decay_ratio * self.max_steps), 1), self.warmup_end)

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, counted from 0: linear up to `learning_rate` at the end of the warm-up, and from
        `decay_start` on down to the final share at `max_steps`, along half a cosine or, with "wsd", a line.

        Sources: Loshchilov & Hutter 2017 (SGDR), equation 5, for the cosine; for warm-up, stable, decay Hu et al. 2024
        (MiniCPM), section 4.2, with the linear decay of Hägele et al. 2024, section 3.
        """
        if step + 1 < self.warmup_end:
            start = self.schedule_start_ratio
            warmed = (step + 1 - self.schedule_start) / (self.warmup_end - self.schedule_start)
            return self.learning_rate * (start + (1 - start) * warmed)
        progress = (step - self.decay_start) / (self.max_steps - self.decay_start)
        progress = min(max(progress, 0.0), 1.0)
        kept = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress
        # In this form it is the highest rate exactly, to the last bit, until the decay begins.
        return self.learning_rate * (1 - (1 - self.final_learning_rate_ratio) * (1 - kept))

    def continuing(self, begun: "TrainingConfig", step: int) -> "TrainingConfig":
        """These values for a run that goes on from a step of one with the values `begun`.

        Where the two have the same schedule it goes on. Else a new one begins at the step: the rate is warmed up again
        from the one that was reached, and comes down to the new end. A rate that is the highest already needs no
        warm-up, so a stable phase goes on. Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually
        Pre-train Large Language Models" (re-warming and re-decaying).
        """
        same = all(getattr(self, name) == getattr(begun, name) for name in _SHAPE)
        if same or step == begun.schedule_start:
            start, ratio = begun.schedule_start, begun.schedule_start_ratio
        else:
            start, ratio = step, min(begun.learning_rate_at(step - 1) / self.learning_rate, 1.0)
        return replace(self, schedule_start=start, schedule_start_ratio=ratio)

    def override(self, values: Mapping[str, str]) -> "TrainingConfig":
        """A copy with some values replaced; raises `InvalidArgument` on unknown names and on text of the wrong type."""
        kinds = {name: kind for name, kind in get_type_hints(type(self)).items() if name not in _START}
        parsed: dict[str, object] = {}
        for name, text in values.items():
            if name not in kinds:
                raise InvalidArgument(f"Unknown override {name!r}. What can be set: {', '.join(sorted(kinds))}.")
            parsed[name] = _parse(name, text, kinds[name])
        return replace(self, **parsed)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "TrainingConfig":
        """The inverse of `to_dict`; raises `InvalidArgument` on missing or unknown names."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(names ^ set(values)))
            raise InvalidArgument(
                f"The training configuration does not fit this program: missing or unknown are {odd}."
            )
        return cls(**values)  # type: ignore[arg-type]


def _parse(name: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if kind is int:
            return int(text.replace("_", ""))
        return kind(text)
    except (KeyError, ValueError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InvalidArgument(f"{name} is {text!r}, but must be {expected}.") from None
