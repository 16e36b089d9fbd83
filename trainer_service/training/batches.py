"""Draws the windows of text that a step reads: a pure function of the seed and the step.

Shapes: B rows, T tokens of context, N tokens of text.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Batch:
    """The inputs and the token that follows each of them, (B, T) each."""

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]


def batch(tokens: Tokens, *, seed: int, step: int, rows: int, context_length: int) -> Batch:
    """Returns the batch of a step: windows that start anywhere in the (N,) tokens, which must be more than
    `context_length`. Philox, keyed with the seed and the step, draws where they start."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, tokens.size - context_length, size=rows)
    windows = np.stack([tokens[start : start + context_length + 1] for start in starts]).astype(np.int32)  # (B, T+1)
    return Batch(windows[:, :-1], windows[:, 1:])
