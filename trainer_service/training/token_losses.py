"""The loss of each token of a text under a model that does not change meanwhile.

Shapes: B rows, T tokens.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu
from trainer_service.training.config import micro_batches
from trainer_service.training.cpu.library import ThreadScratch, load_library
from trainer_service.training.cpu.model import CpuModel
from trainer_service.training.loss import token_losses


class TokenLosses:
    """Computes without dropout. On a CPU several threads may call it at once; each computes on one core, and a row's
    bits do not depend on the others."""

    def __init__(self, model: GPT) -> None:
        # The same arrays, in a model whose mode is its own.
        self._model = GPT(model.config)
        self._model.update(model.parameters())
        self._model.eval()
        self._compute = self._on_cpu if on_cpu() else self._in_mlx
        if on_cpu():
            self._library, self._weights, self._of_thread = load_library(), CpuModel.of(model), ThreadScratch()

    def __call__(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float32]:
        """Returns the cross-entropy, in nats, of each of (B, T) targets given (B, T) inputs.

        Raises `InvalidArgument` if the tokens do not fit the context.
        """
        self._model.check_fits(inputs.shape[1])
        return self._compute(inputs, targets)

    def _in_mlx(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.array(token_losses(self._model, mx.array(inputs), mx.array(targets)))

    def _on_cpu(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float32]:
        count, scratch = micro_batches(*inputs.shape), self._of_thread.scratch
        parts = zip(np.array_split(inputs, count), np.array_split(targets, count), strict=True)
        return np.concatenate([self._library.losses(self._weights, *part, scratch) for part in parts])
