"""The shape of a GPT-2 model. Importing this loads no model framework."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from shared.errors import InvalidArgument


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines the model's function apart from its weights.

    Raises `InvalidArgument` where the values cannot form a model.
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
        for name in ("layers", "width", "heads", "hidden_width", "context_length", "vocabulary_size"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.width % self.heads:
            raise InvalidArgument(f"width {self.width} cannot be divided among {self.heads} heads.")
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidArgument(f"dropout is {self.dropout}, but must be at least 0 and below 1.")

    @property
    def head_width(self) -> int:
        """The width of one attention head, D in shape comments."""
        return self.width // self.heads

    def to_dict(self) -> dict[str, int | float | bool]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "GPTConfig":
        """The inverse of `to_dict`; raises `InvalidArgument` on missing or unknown names."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(names ^ set(values)))
            raise InvalidArgument(f"The model configuration does not fit this program: missing or unknown are {odd}.")
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model learns, a tied head counted once, and how many of them stand in lookup tables."""

    total: int
    embedding: int


def count_parameters(config: GPTConfig) -> ParameterCount:
    """The parameter count, by the formula of the architecture (checked against the arrays in the tests)."""
    width, hidden = config.width, config.hidden_width
    attention = width * 3 * width + 3 * width + width * width + width
    feed_forward = width * hidden + hidden + hidden * width + width
    block = 2 * 2 * width + attention + feed_forward
    embedding = config.vocabulary_size * width + config.context_length * width
    head = 0 if config.tied_head else config.vocabulary_size * width
    return ParameterCount(total=embedding + config.layers * block + 2 * width + head, embedding=embedding)
