"""A closed loop: all rows start together, and start again when all of them have ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np


@dataclass(frozen=True)
class ClosedLoop:
    """A step reads `rows` prompts of `prompt_tokens` and generates exactly `output_tokens` for each."""

    rows: int
    prompt_tokens: int
    output_tokens: int
    vocabulary_size: int

    @property
    def step_tokens(self) -> int:
        """The tokens that a step generates."""
        return self.rows * self.output_tokens

    def prompts(self) -> Iterator[list[list[int]]]:
        """Yields the prompts of each step: random tokens, different in each step, so that no cache can help."""
        for step in count():
            tokens = np.random.default_rng(step).integers(
                self.vocabulary_size - 1, size=(self.rows, self.prompt_tokens)
            )
            yield tokens.tolist()

    def check(self, tokens: Sequence[int]) -> None:
        """Fails if a row did not get its number of tokens."""
        assert list(tokens) == [self.output_tokens] * self.rows, f"{self} gave {tokens} tokens."
