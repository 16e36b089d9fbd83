"""The shape of a GPT-2 model. Importing this loads no model framework."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from shared.errors import InvalidArgument, shown

# Far above any model that one machine can train; a file or a client may contain any number.
_MOST = {
    "layers": 10_000,
    "width": 1 << 17,
    "heads": 1 << 17,
    "hidden_width": 1 << 20,
    "context_length": 1 << 20,
    "vocabulary_size": 1 << 24,
}


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines the model's function, except its weights.

    Raises `InvalidArgument` if the values do not form a model.
    """

    layers: int
    width: int
    heads: int
    hidden_width: int
    context_length: int
    vocabulary_size: int
    tied_head: bool
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            if not 1 <= (value := getattr(self, name)) <= most:
                raise InvalidArgument(f"{name} is {shown(value)}, but must be from 1 to {most}.")
        if self.width % self.heads:
            raise InvalidArgument(f"width {self.width} cannot be divided among {self.heads} heads.")
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidArgument(f"dropout is {self.dropout}, but must be at least 0 and below 1.")

    @property
    def head_width(self) -> int:
        """The width of one attention head, D in shape comments."""
        return self.width // self.heads

    def to_dict(self) -> dict[str, int | float | bool]:
        """Returns the values as JSON stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "GPTConfig":
        """Reads what `to_dict` returns; raises `InvalidArgument` if a name, a type or a value is invalid."""
        return cls(**typed_values(cls, "model", values))


def typed_values(owner: type, what: str, values: Mapping[str, object]) -> dict[str, Any]:
    """Checks values from JSON against the fields of a dataclass; `what` names it in an error.

    Raises `InvalidArgument` if a name is missing or unknown, or if a value has another type.
    """
    kinds = get_type_hints(owner)
    if odd := sorted(set(values) ^ set(kinds)):
        names = ", ".join(shown(name, 40) for name in odd[:3])
        raise InvalidArgument(f"The {what} configuration does not fit this program: missing or unknown are {names}.")
    typed: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = values[name]
        # JSON may store a whole float as an integer.
        allowed = (int, float) if kind is float else kind
        try:
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise TypeError
            typed[name] = kind(value)
        except (TypeError, OverflowError):
            raise InvalidArgument(f"{name} is {shown(value)}, but must be of type {kind.__name__}.") from None
    return typed


@dataclass(frozen=True)
class ParameterCount:
    """The number of parameters, with a tied head counted once, and how many of them are in embeddings."""

    total: int
    embedding: int


def count_parameters(config: GPTConfig) -> ParameterCount:
    """Returns the parameter count by formula; the tests compare it with the arrays."""
    width, hidden = config.width, config.hidden_width
    attention = width * 3 * width + 3 * width + width * width + width
    feed_forward = width * hidden + hidden + hidden * width + width
    block = 2 * 2 * width + attention + feed_forward
    embedding = config.vocabulary_size * width + config.context_length * width
    head = 0 if config.tied_head else config.vocabulary_size * width
    return ParameterCount(total=embedding + config.layers * block + 2 * width + head, embedding=embedding)
