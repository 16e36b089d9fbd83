"""Every value that defines a training run, except its data. Importing this module does not load MLX."""

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import get_type_hints

from shared.errors import InvalidArgument, shown
from shared.gpt.config import GPTConfig, typed_values

# Tokens in a micro-batch of one CPU thread, which keeps the activations of all layers for them.
MICRO_BATCH_TOKENS = 1024
# The most logits that exist at a time in MLX, and the most exponentials: 128 MiB each in fp32.
CHUNK_ELEMENTS = 1 << 25

# The values that shape the schedule: a continued run that changes one of them starts a new schedule.
_SHAPE = ("schedule", "max_steps", "learning_rate", "warmup_steps", "decay_ratio", "final_learning_rate_ratio")
# A schedule that continues another one starts at no less than this share of its highest rate.
_LEAST_CONTINUED_SHARE = 0.1
# Where the schedule started. These are computed; nobody sets them.
_START = ("schedule_start", "schedule_start_ratio")

# In fp32, a lower rate does not change a weight of the usual size.
_LEAST_RATE = 1e-8
# The least and the greatest value of each number. Outside this range a run learns nothing or overflows 64 bits.
_RANGES: dict[str, tuple[float, float]] = {
    "context_length": (2, 1 << 17),
    "max_steps": (1, 10**9),
    "batch_size": (1, 1 << 16),
    "world_size": (1, 1024),
    "learning_rate": (_LEAST_RATE, 1),
    "warmup_steps": (0, 10**9),
    "decay_ratio": (1e-6, 1),
    "final_learning_rate_ratio": (0, 1),
    "schedule_start_ratio": (0, 1),
    "weight_decay": (0, 1e6),
    # AdamW divides by 1 - beta, which must not round to 0 in fp32.
    "beta1": (0, 0.9999),
    "beta2": (0, 0.9999),
    "seed": (0, 2**32 - 1),
    "evaluation_interval": (1, 10**9),
    "evaluation_windows": (1, 10**6),
    "evaluate_every": (0, 10**9),
    "report_interval": (1, 10**9),
    "max_train_tokens": (0, 10**12),
    "max_validation_tokens": (0, 10**12),
    "validation_share": (1e-6, 0.99),
    "masked_loss": (0, 10),
    "distillation_alpha": (0, 1),
    "distillation_temperature": (0.05, 20),
    "teacher_share": (0, 1),
}
_CHOICES = {"tokenizer": ("gpt2", "bpe"), "schedule": ("cosine", "wsd"), "optimizer": ("adamw", "muon")}
# Gradients that are clipped below this range vanish beside AdamW's epsilon.
_GRADIENT_NORMS = (1e-3, 1e9)


def micro_batches(rows: int, tokens: int) -> int:
    """Returns the number of micro-batches into which a CPU thread divides its rows of `tokens` tokens."""
    return min(rows, -(-rows * tokens // MICRO_BATCH_TOKENS))


@dataclass(frozen=True)
class TrainingConfig:
    """A flat set of values, so that each can be overridden by name (`--set "max_steps=500"`)."""

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
    # The schedule: a linear warm-up, then a decay to a share of the rate at `max_steps`; see `learning_rate_at`.
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    schedule: str = "cosine"
    decay_ratio: float = 0.2
    final_learning_rate_ratio: float = 0.1
    # The step at which the schedule started, and the rate there as a share of `learning_rate`. They are not 0 if the
    # run continues a version with a new schedule.
    schedule_start: int = 0
    schedule_start_ratio: float = 0.0
    # "adamw" for all parameters, or "muon" for the matrices of the blocks and AdamW for the others.
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_gradient_norm: float = 1.0
    seed: int = 1337
    # Each held-out evaluation also writes a state and a version.
    evaluation_interval: int = 250
    evaluation_windows: int = 64
    # Each n-th version is evaluated on the whole held-out text while the run pauses; 0 means none.
    evaluate_every: int = 0
    report_interval: int = 10
    # The processes that share each batch; a run may change their number between attempts.
    world_size: int = 1
    # Data. 0 means as many tokens as training, or evaluation, will read.
    max_train_tokens: int = 0
    max_validation_tokens: int = 0
    # The share held out of a data set that has no validation split.
    validation_share: float = 0.05
    # The weight of a second loss, given inputs of which a random part is masked; it takes a second pass over a batch.
    masked_loss: float = 0.0
    # With teachers: the weight of their predictions in the loss, and the temperature of both; see `loss.py`.
    distillation_alpha: float = 0.7
    distillation_temperature: float = 1.0
    # With stories of a teacher: the share of a batch that comes from them, and whether each story follows its prompt,
    # whose tokens do not count in the loss.
    teacher_share: float = 0.5
    teacher_prompts: bool = False

    def __post_init__(self) -> None:
        self.gpt  # noqa: B018 - raises if the shape is not that of a model
        for name, (least, most) in _RANGES.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise InvalidArgument(f"{name} is {shown(value)}, but must be from {least} to {most}.")
        least, most = _GRADIENT_NORMS
        if self.max_gradient_norm != 0 and not least <= self.max_gradient_norm <= most:
            raise InvalidArgument(
                f"max_gradient_norm is {shown(self.max_gradient_norm)}, but must be from {least} to {most}, or 0 "
                "to clip nothing."
            )
        if self.world_size > self.batch_size:
            raise InvalidArgument(
                f"world_size is {self.world_size}, but batch_size is {self.batch_size}: each process needs a row."
            )
        if not self.learning_rate * self.weight_decay < 1:
            raise InvalidArgument(
                f"weight_decay is {self.weight_decay} with a learning_rate of {self.learning_rate}, but their product "
                "must be below 1: a step shrinks each weight by that share."
            )
        if self.tokenizer == "gpt2" and self.vocabulary_size != 50257:
            raise InvalidArgument(f"GPT-2's tokenizer has 50257 tokens, but vocabulary_size is {self.vocabulary_size}.")
        if self.tokenizer == "bpe" and not 257 <= self.vocabulary_size <= 65536:
            raise InvalidArgument(
                f"vocabulary_size is {self.vocabulary_size}, but a byte-level BPE has from 257 to 65536 tokens."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidArgument(f"{name} is {shown(getattr(self, name))}, but must be {' or '.join(choices)}.")
        if not 0 <= self.schedule_start < self.max_steps:
            raise InvalidArgument(
                f"schedule_start is {shown(self.schedule_start)}, but must be at least 0 and less than max_steps, "
                f"{self.max_steps}."
            )
        window = self.context_length + 1
        for name in ("max_train_tokens", "max_validation_tokens"):
            if 0 < (limit := getattr(self, name)) < window:
                raise InvalidArgument(
                    f"{name} is {limit}, but one window of context_length needs {window} tokens; 0 means no limit."
                )

    @property
    def gpt(self) -> GPTConfig:
        """The shape of the model."""
        return GPTConfig(**{field.name: getattr(self, field.name) for field in fields(GPTConfig)})

    @property
    def tokens_per_step(self) -> int:
        """The number of target tokens in a step."""
        return self.batch_size * self.context_length

    @property
    def warmup_end(self) -> int:
        """The first step after the warm-up, which takes at most half of the schedule. A schedule that starts at the
        highest rate has no warm-up."""
        if self.schedule_start_ratio == 1.0:
            return self.schedule_start
        return self.schedule_start + min(self.warmup_steps, (self.max_steps - self.schedule_start) // 2)

    @property
    def decay_start(self) -> int:
        """The step at which the decay starts: with a cosine, the end of the warm-up; with "wsd", `decay_ratio` of
        `max_steps` before the end, but not before the warm-up ends."""
        if self.schedule == "cosine":
            return self.warmup_end
        return max(self.max_steps - max(round(self.decay_ratio * self.max_steps), 1), self.warmup_end)

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0. It rises linearly to `learning_rate` at the end of the
        warm-up, and falls from `decay_start` to the final share at `max_steps`: along half a cosine, or with "wsd"
        linearly.

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
        # Written this way, the rate equals the highest rate to the last bit until the decay starts.
        return self.learning_rate * (1 - (1 - self.final_learning_rate_ratio) * (1 - kept))

    def continuing(self, begun: "TrainingConfig", step: int, chosen: Collection[str] = ()) -> "TrainingConfig":
        """Returns these values for a run that continues, from a step, a run with the values `begun`. `chosen` names the
        values that a user set.

        If both have the same schedule, it continues. Otherwise a new schedule starts at the step, and decays from the
        rate that the run has reached, because a higher rate makes the model worse before it makes it better
        (`tests/benchmarks/continuation.py` measures this). The new schedule has a higher rate, and a warm-up to it,
        only if the user set `learning_rate`, if the warm-up had not ended, or if the rate was below a tenth of the
        highest. Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language
        Models" (re-warming and re-decaying).
        """
        same = all(getattr(self, name) == getattr(begun, name) for name in _SHAPE)
        if same or step == begun.schedule_start:
            return replace(self, schedule_start=begun.schedule_start, schedule_start_ratio=begun.schedule_start_ratio)
        reached, highest = begun.learning_rate_at(step - 1), self.learning_rate
        if "learning_rate" not in chosen and step >= begun.warmup_end:
            highest = max(reached, _LEAST_CONTINUED_SHARE * begun.learning_rate, _LEAST_RATE)
        ratio = min(reached / highest, 1.0)
        return replace(self, learning_rate=highest, schedule_start=step, schedule_start_ratio=ratio)

    def override(self, values: Mapping[str, str]) -> "TrainingConfig":
        """Returns a copy with some values replaced; raises `InvalidArgument` for an unknown name or a value of the
        wrong type."""
        kinds = {name: kind for name, kind in get_type_hints(type(self)).items() if name not in _START}
        parsed: dict[str, object] = {}
        for name, text in values.items():
            if name not in kinds:
                near = get_close_matches(name[:40], kinds, n=1)
                hint = f"Did you mean {near[0]}?" if near else "trainer_service/README.md lists all values."
                raise InvalidArgument(f"Unknown training value {shown(name, 40)}. {hint}")
            parsed[name] = _parse(name, text, kinds[name])
        return replace(self, **parsed)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """Returns the values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "TrainingConfig":
        """The inverse of `to_dict`; raises `InvalidArgument` for a wrong name, type or value.

        A value that an older program did not know has its default.
        """
        defaults = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        return cls(**typed_values(cls, "training", defaults | dict(values)))


def _parse(name: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if kind is not str and not text.isascii():
            raise ValueError  # Python would read the digits of any script
        return kind(text)
    except (KeyError, ValueError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InvalidArgument(f"{name} is {shown(text)}, but must be {expected}.") from None
