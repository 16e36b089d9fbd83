"""Cross-entropy of a language model, and the loss of a student of other models, computed in MLX in chunks of rows, so
that the logits of a whole batch never exist.

Shapes: B rows, T tokens, N = B x T predictions, n of them in a chunk, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from shared.gpt import cuda
from shared.gpt.autograd import differentiable
from shared.gpt.model import GPT
from trainer_service.training import cuda_loss
from trainer_service.training.config import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Distillation:
    """How a student learns from teachers: its loss is (1 - alpha) CE + alpha T^2 KL(q || p), with the temperature T.

    CE is the cross-entropy with the text; p is softmax(z / T) of the student's logits z, and q the mean of the same of
    the teachers, which have the student's vocabulary and are in evaluation mode.
    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """

    teachers: tuple[GPT, ...] = ()
    alpha: float = 0.0
    temperature: float = 1.0


def mean_loss(
    model: GPT,
    inputs: mx.array,
    targets: mx.array,
    weights: mx.array | None = None,
    distillation: Distillation | None = None,
    kept: mx.array | None = None,
) -> mx.array:
    """Returns the mean cross-entropy, in nats per token, of (B, T) targets given (B, T) inputs; each loss is multiplied
    by its weight, if there are weights (B, T). The model, but no teacher, sees only the inputs that are `kept`.

    A distillation changes only the gradient, which is that of its loss: so the values of all runs compare.
    """
    rows = _rows(model.hidden(inputs, kept))  # (N, C)
    mean_cross_entropy = cuda_loss.mean_cross_entropy if cuda.usable(rows) else _mean_cross_entropy
    taught = distillation or Distillation()
    loss: mx.array = mean_cross_entropy(
        rows,
        model.head_weight.astype(rows.dtype),
        targets.reshape(-1),
        None if weights is None else weights.reshape(-1),
        [(_rows(teacher.hidden(inputs)), teacher.head_weight) for teacher in taught.teachers],
        taught.alpha,
        taught.temperature,
    )[0]
    return loss


def token_losses(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """Returns the cross-entropy, in nats, of each of (B, T) targets given (B, T) inputs."""
    rows, wanted = _rows(model.hidden(inputs)), targets.reshape(-1)  # (N, C), (N,)
    losses = [
        nn.losses.cross_entropy(model.logits(rows[chunk]), wanted[chunk])
        for chunk in _chunks(wanted.size, model.config.vocabulary_size)
    ]
    return mx.concatenate(losses).reshape(targets.shape)  # (B, T)


@differentiable
def _mean_cross_entropy(
    hidden: mx.array,
    weight: mx.array,
    targets: mx.array,
    weights: mx.array | None,
    teachers: Sequence[tuple[mx.array, mx.array]],
    alpha: float,
    temperature: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the mean loss of (N, C) hidden states under a (V, C) head, and the gradients with respect to both of the
    loss of `Distillation`. The weights of the targets are (N,), and each teacher has hidden states and a head.

    The gradients are computed with the loss, chunk by chunk, while the chunk's exponentials exist; MLX skips them if
    they are not used. The gradient of the logits is (1 - alpha) (softmax(z) - one at the target) + alpha T (p - q). The
    other gradients are therefore products of weighted exponentials, in which the smaller factor is divided by the sums
    of the student's, minus the rows that the targets select.
    """
    kept, pull = 1 - alpha, alpha * temperature
    scale = 1 / targets.size
    shares = scale if weights is None else weights[:, None] * scale  # (N, 1)
    # The exponentials that are added to those of the student at a temperature of 1.
    others = [(-pull / len(teachers), *teacher) for teacher in teachers]
    if teachers and temperature != 1:
        others.insert(0, (pull, hidden, weight))
    losses: list[mx.array] = []
    hidden_gradients: list[mx.array] = []
    weight_gradient = mx.zeros_like(weight)  # (V, C)
    for chunk in _chunks(targets.size, weight.shape[0] * (1 + len(others))):
        wanted, share = targets[chunk], shares[chunk] if isinstance(shares, mx.array) else shares
        # Otherwise MLX would compute the logits of all chunks first.
        rows, *states = mx.depends(
            [hidden[chunk], *(each[chunk] for _, each, _ in others)], [*hidden_gradients[-1:], weight_gradient]
        )
        highest, sums, slopes = _exponentials(rows, weight)  # (n, 1), (n, 1), (n, V)
        losses.append((mx.log(sums) + highest)[:, 0] - (rows * weight[wanted]).sum(axis=-1))
        if teachers and temperature != 1:
            slopes = kept * slopes
        for (factor, _, head), its_rows in zip(others, states, strict=True):
            its_highest, its_sums, exponentials = _exponentials(its_rows * (1 / temperature), head)
            # NaN stays NaN.
            slopes = slopes + exponentials * (factor * sums / (its_sums + 0 * its_highest))
        hidden_gradients.append((slopes @ weight / sums - kept * weight[wanted]) * share)  # (n, C)
        weight_gradient = weight_gradient + slopes.T @ (rows * (share / sums))
    weight_gradient = weight_gradient.at[targets].add(hidden * (-kept * shares))
    every = mx.concatenate(losses)
    total = (every if weights is None else every * weights).sum()
    return total * scale, mx.concatenate(hidden_gradients), weight_gradient


@_mean_cross_entropy.vjp  # type: ignore[untyped-decorator]
def _mean_cross_entropy_vjp(primals: list[Any], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[Any, ...]:
    constant = tree_map(lambda leaf: mx.zeros_like(leaf) if isinstance(leaf, mx.array) else None, primals[2:])
    return cotangents[0] * outputs[1], cotangents[0] * outputs[2], *constant


def _exponentials(rows: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Returns for (n, C) rows the highest logits (n, 1), the sums of the exponentials relative to them (n, 1), and
    these exponentials (n, V)."""
    logits = rows @ weight.T  # (n, V)
    highest = logits.max(axis=-1, keepdims=True)
    exponentials = mx.exp(logits - highest)
    # The ones make the sums, and what follows from them, fp32.
    return highest, exponentials @ mx.ones((weight.shape[0], 1)), exponentials


def _rows(hidden: mx.array) -> mx.array:
    return hidden.reshape(-1, hidden.shape[-1])  # (N, C)


def _chunks(rows: int, elements: int) -> list[slice]:
    """Divides rows, each of which takes some elements, so that a chunk has at most `CHUNK_ELEMENTS`."""
    size = max(1, CHUNK_ELEMENTS // elements)
    return [slice(start, start + size) for start in range(0, rows, size)]
