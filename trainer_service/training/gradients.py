"""The loss and the gradients of a step in MLX, on a GPU.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_map_with_path

from shared.gpt import cuda
from shared.gpt.model import GPT
from trainer_service.training.batches import Batch
from trainer_service.training.config import TrainingConfig
from trainer_service.training.loss import Distillation, mean_loss

# A loss and its gradients, a tree of the parameters' shape.
Gradients = tuple[mx.array, dict[str, Any]]


class StepGradients(Protocol):
    """Computes the loss of a model and its gradients on some rows of a batch."""

    @property
    def memory_bytes(self) -> int:
        """The memory beside MLX's arrays that it keeps between steps."""

    def of(self, drawn: Batch, step: int) -> Gradients:
        """Returns the share of these rows (B, T) in the mean loss of a step, and the gradients; with masked inputs,
        those of both losses. What is random follows from the seed, the step and the rank."""


class MlxGradients:
    """Computes the gradients in MLX, compiled; on an NVIDIA GPU in bf16 from weights in fp32."""

    def __init__(self, config: TrainingConfig, model: GPT, distillation: Distillation | None, rank: int) -> None:
        self._config = config
        self._model = model
        self._rank = rank
        self._add = _compile_gradients(config, distillation)

    @property
    def memory_bytes(self) -> int:
        """None: all arrays are MLX's."""
        return 0

    def of(self, drawn: Batch, step: int) -> Gradients:
        """As `StepGradients.of`."""
        # The third number is that of a thread, which a CPU has several of.
        seeds = np.random.SeedSequence((self._config.seed, step, 0, self._rank))
        mx.random.seed(int(seeds.generate_state(1, np.uint64)[0]))
        inputs, targets = mx.array(drawn.inputs), mx.array(drawn.targets)
        target_weights = None if drawn.weights is None else mx.array(drawn.weights)
        share = mx.array(inputs.size / self._config.tokens_per_step)
        total: Gradients | None = None
        for masked in (False, True) if self._config.masked_loss else (False,):
            total = self._add(masked, total, self._model.trainable_parameters(), inputs, targets, target_weights, share)
        assert total is not None
        return total


def _compile_gradients(config: TrainingConfig, distillation: Distillation | None) -> Callable[..., Gradients]:
    """Returns a compiled function that adds a share of the loss and its gradients to a total, which may be None.

    With masked inputs it adds only the gradients, so that the losses of all runs compare. The function has its own
    model, into which it puts the weights that it receives.
    """
    model = GPT(config.gpt)
    model.train()

    def share_of_loss(
        weights: dict[str, Any],
        masked: bool,
        inputs: mx.array,
        targets: mx.array,
        target_weights: mx.array | None,
        share: mx.array,
    ) -> mx.array:
        model.update(weights)
        kept = _kept_inputs(inputs) if masked else None
        scale = config.masked_loss * share if masked else share
        return mean_loss(model, inputs, targets, target_weights, distillation, kept) * scale

    loss_and_gradients = mx.value_and_grad(share_of_loss)

    def add(masked: bool, total: Gradients | None, weights: dict[str, Any], *batch: Any) -> Gradients:
        loss, gradients = loss_and_gradients(_in_compute_type(weights), masked, *batch)
        if total is None:
            return loss, gradients
        return total[0] if masked else total[0] + loss, tree_map(mx.add, total[1], gradients)

    compiled: Callable[..., Gradients] = mx.compile(add, inputs=[mx.random.state], outputs=[mx.random.state])
    return compiled


def _kept_inputs(inputs: mx.array) -> mx.array:
    """Draws which of (B, T) inputs are not masked, (B, T, 1): in each row a random share of them, from half to all.

    Source: Xu et al. 2026, "Data-Constrained Language Model Pretraining: Improved Regularization and Scaling Laws".
    """
    masked_share = 0.5 * mx.random.uniform(shape=(inputs.shape[0], 1, 1))
    return mx.random.uniform(shape=(*inputs.shape, 1)) >= masked_share


def _in_compute_type(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns the weights in the type that the device computes with: bf16 on an NVIDIA GPU, except the embeddings,
    whose gradients are sums over many tokens."""
    if not cuda.is_default_device():
        return weights
    cast: dict[str, Any] = tree_map_with_path(
        lambda name, weight: weight if "embedding" in name else weight.astype(mx.bfloat16), weights
    )
    return cast
