"""The windows of text that a step reads: a pure function of the text, the seed and the step.

Shapes: B rows, T tokens of context, N tokens of text, M of a teacher's text.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer_service.training.document_order import DocumentOrder

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class TeacherText:
    """Text of a large teacher: (M,) tokens, more than a window has, and which of them count as targets: all if None."""

    tokens: Tokens
    counted: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class TrainingText:
    """What a run reads: (N,) tokens, more than a window has, with the same end token after every document, and text of
    a teacher that is mixed with them."""

    tokens: Tokens
    end_token: int
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


class Batches:
    """The batches of a run: a pure function of the text, the seed, the number of rows and the step.

    The windows of the text and those of the teacher's are each read in the order of `DocumentOrder`. Of all windows,
    the share `teacher_share` is the teacher's, evenly spread, if there is one.
    """

    def __init__(
        self, text: TrainingText, *, seed: int, rows: int, context_length: int, teacher_share: float = 0.0
    ) -> None:
        self._text = text
        self._rows = rows
        self._share = teacher_share if text.teacher else 0.0
        self._order = DocumentOrder(text.tokens, text.end_token, context_length, (seed, 0))
        if text.teacher:
            self._teacher_order = DocumentOrder(text.teacher.tokens, text.end_token, context_length, (seed, 1))

    def at(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        windows = np.arange(step * self._rows, (step + 1) * self._rows)  # (B,)
        teacher = self._text.teacher
        if teacher is None:
            return _batch(self._text.tokens[self._order.positions(windows)], None)
        before, after = (np.floor(numbers * self._share).astype(np.int64) for numbers in (windows, windows + 1))
        taught = after > before  # (B,)
        own = self._order.positions((windows - before)[~taught])
        others = self._teacher_order.positions(before[taught])
        tokens = np.empty((self._rows, own.shape[1]), np.uint16)  # (B, T+1)
        tokens[~taught], tokens[taught] = self._text.tokens[own], teacher.tokens[others]
        if teacher.counted is None:
            return _batch(tokens, None)
        counted = np.ones(tokens.shape, np.bool_)
        counted[taught] = teacher.counted[others]
        return _batch(tokens, counted)


def _batch(windows: Tokens, counted: NDArray[np.bool_] | None) -> Batch:
    tokens = windows.astype(np.int32)
    weights = None
    if counted is not None:
        targets = counted[:, 1:]
        # At least one, so that a batch in which none counts has weights of 0.
        weights = targets.astype(np.float32) * np.float32(targets.size / max(targets.sum(), 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)
