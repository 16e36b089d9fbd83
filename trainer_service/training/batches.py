"""Draws the windows of text that a step reads: a pure function of the seed and the step.

Shapes: B rows, T tokens of context, N tokens of text, M of a teacher's text.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class TeacherText:
    """Text of a large teacher: (M,) tokens, more than a window has, and which of them count as targets: all if None."""

    tokens: Tokens
    counted: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class TrainingText:
    """What a run reads: (N,) tokens, more than a window has, and text of a teacher that is mixed with them."""

    tokens: Tokens
    teacher: TeacherText | None = None


@dataclass(frozen=True)
class Batch:
    """The inputs and the token that follows each of them, (B, T) each.

    The weights (B, T) of the targets are 0 for those that do not count, and equal for the others; their mean over a
    whole batch is 1, so the weighted mean of the losses is the mean over the targets that count. None: all count.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None

    def part(self, first: int, end: int) -> "Batch":
        """Returns the rows from `first` to the one before `end`, with their weights as they are."""
        rows = slice(first, end)
        return Batch(self.inputs[rows], self.targets[rows], None if self.weights is None else self.weights[rows])


def batch(
    text: TrainingText, *, seed: int, step: int, rows: int, context_length: int, teacher_share: float = 0.0
) -> Batch:
    """Returns the batch of a step: windows that start anywhere in the text, each with the probability `teacher_share`
    in that of the teacher, if there is one. Philox, keyed with the seed and the step, draws where they start."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, text.tokens.size - context_length, size=rows)
    teacher = text.teacher
    if teacher is None:
        windows = np.stack([text.tokens[start : start + context_length + 1] for start in starts])  # (B, T+1)
        return _batch(windows, None)
    from_teacher = generator.random(rows) < teacher_share  # (B,)
    starts = np.where(from_teacher, generator.integers(0, teacher.tokens.size - context_length, size=rows), starts)
    spans = [slice(start, start + context_length + 1) for start in starts]
    chosen = list(zip(spans, from_teacher, strict=True))
    windows = np.stack([(teacher if taught else text).tokens[span] for span, taught in chosen])  # (B, T+1)
    if teacher.counted is None:
        return _batch(windows, None)
    every = np.ones(context_length + 1, np.bool_)
    counted = np.stack([teacher.counted[span] if taught else every for span, taught in chosen])  # (B, T+1)
    return _batch(windows, counted)


def _batch(windows: Tokens, counted: NDArray[np.bool_] | None) -> Batch:
    tokens = windows.astype(np.int32)
    weights = None
    if counted is not None:
        targets = counted[:, 1:]
        # At least one, so that a batch in which none counts has weights of 0.
        weights = targets.astype(np.float32) * np.float32(targets.size / max(targets.sum(), 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)
