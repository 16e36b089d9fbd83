"""Rows that begin together, and again when all of them have ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np


@dataclass(frozen=True)
class ClosedLoop:
    """A step is `rows` prompts of `prompt_tokens`, each of which gets exactly `output_tokens`."""

    rows: int
    prompt_tokens: int
    output_tokens: int
    vocabulary_size: int

    @property
    def step_tokens(self) -> int:
        """The tokens that a step generates."""
        return self.rows * self.output_tokens

    def prompts(self) -> Iterator[list[list[int]]]:
        """The prompts of each step: random tokens, others in each, so that nothing can be kept from the step before."""
        for step in count():
            tokens = np.random.default_rng(step).integers(
                self.vocabulary_size - 1, size=(self.rows, self.prompt_tokens)
            )
            yield tokens.tolist()

    def check(self, tokens: Sequence[int]) -> None:
        """Raises where the rows did not get their tokens."""
        assert list(tokens) == [self.output_tokens] * self.rows, f"{self} gave {tokens} tokens."
