"""Everything that defines a training run apart from its data. Importing this loads no model framework."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import get_type_hints

from shared.errors import InvalidArgument
from shared.gpt.config import GPTConfig


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
    # The schedule: linear warm-up, then a cosine down to a share of the rate at `max_steps`.
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    final_learning_rate_ratio: float = 0.1
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
        if not 0.0 <= self.final_learning_rate_ratio <= 1.0:
            raise InvalidArgument(
                f"final_learning_rate_ratio is {self.final_learning_rate_ratio}, but must be from 0 to 1."
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

    def override(self, values: Mapping[str, str]) -> "TrainingConfig":
        """A copy with some values replaced; raises `InvalidArgument` on unknown names and on text of the wrong type."""
        kinds = get_type_hints(type(self))
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
