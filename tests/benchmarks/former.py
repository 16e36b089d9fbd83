"""Forms of training that the project had before, to compare with those that replaced them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np

from shared.gpt.model import Dropout
from trainer_service.training import trainer
from trainer_service.training.batches import Batch, TrainingText


class WindowsAnywhere:
    """Batches of windows that start anywhere in a text, drawn from the seed and the step."""

    def __init__(
        self, text: TrainingText, *, seed: int, rows: int, context_length: int, teacher_share: float = 0.0
    ) -> None:
        self._tokens = text.tokens
        self._seed, self._rows, self._context_length = seed, rows, context_length

    def at(self, step: int) -> Batch:
        """Returns the batch of a step."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, step]))
        starts = generator.integers(0, self._tokens.size - self._context_length, size=self._rows)
        windows = self._tokens[starts[:, None] + np.arange(self._context_length + 1)].astype(np.int32)  # (B, T+1)
        return Batch(windows[:, :-1], windows[:, 1:])


@contextmanager
def former(*, windows_anywhere: bool, attention_without_dropout: bool) -> Iterator[None]:
    """Makes trainers that begin inside use the former order of text, or attention that drops nothing, or both."""

    def undropped(_: Dropout, x: mx.array) -> mx.array:
        return x

    with ExitStack() as stack:
        if windows_anywhere:
            stack.enter_context(mock.patch.object(trainer, "Batches", WindowsAnywhere))
        if attention_without_dropout:
            # The library that trains on a CPU has no former form.
            stack.enter_context(mock.patch.object(trainer, "on_cpu", lambda: False))
            stack.enter_context(mock.patch.object(Dropout, "vectors", undropped))
        yield
