"""Which windows of the text a step reads: a pure function of the seed and the step.

Shapes: B rows, T tokens of context, N tokens of text.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Batch:
    """Inputs and the tokens that follow each of them, (B, T) each."""

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]


def batch(tokens: Tokens, *, seed: int, step: int, rows: int, context_length: int) -> Batch:
    """The batch of a step: windows that start anywhere in the (N,) tokens, drawn by Philox keyed with seed and step.

    The text must hold more than `context_length` tokens.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, tokens.size - context_length, size=rows)
    windows = np.stack([tokens[start : start + context_length + 1] for start in starts]).astype(np.int32)  # (B, T+1)
    return Batch(windows[:, :-1], windows[:, 1:])
