"""Cross-entropy of a language model, computed in chunks of rows, so that the logits of a whole batch never exist.

Shapes: B rows, T tokens, N = B x T predictions, n of them in a chunk, C width, V vocabulary, v of it in a block.
"""

from functools import reduce

import mlx.core as mx
import mlx.nn as nn

from shared.gpt import cuda
from shared.gpt.autograd import differentiable
from shared.gpt.model import GPT
from shared.gpt.operations import exp_below, on_cpu
from trainer_service.training import cuda_loss
from trainer_service.training.config import CHUNK_ELEMENTS

# Tokens of the vocabulary in a block on a CPU: its logits stay in the cache between operations.
_BLOCK_TOKENS = 2048


def mean_loss(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """Returns the mean cross-entropy, in nats per token, of (B, T) targets given (B, T) inputs."""
    hidden = model.hidden(inputs)
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    mean_cross_entropy = cuda_loss.mean_cross_entropy if cuda.usable(rows) else _mean_cross_entropy
    loss: mx.array = mean_cross_entropy(rows, model.head_weight.astype(rows.dtype), targets.reshape(-1))[0]
    return loss


def window_losses(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """Returns the mean cross-entropy (B,) of each row, in nats per token."""
    return token_losses(model, inputs, targets).mean(axis=1)  # (B,)


def token_losses(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """Returns the cross-entropy, in nats, of each of (B, T) targets given (B, T) inputs."""
    hidden = model.hidden(inputs)
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    weight = model.head_weight
    chunks = _chunks(rows, targets.reshape(-1), weight)
    if on_cpu():
        losses = [_losses(chunk, weight, wanted)[0] for chunk, wanted in chunks]
    else:
        losses = [nn.losses.cross_entropy(chunk @ weight.T, wanted) for chunk, wanted in chunks]
    return mx.concatenate(losses).reshape(targets.shape)  # (B, T)


@differentiable
def _mean_cross_entropy(hidden: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the mean loss of (N, C) hidden states under a (V, C) head, and its gradients with respect to both.

    The gradients are computed with the loss, chunk by chunk, while the chunk's exponentials exist; MLX skips them if
    they are not used. The gradient of the logits is the probabilities minus one at the target. The other gradients are
    therefore products of the exponentials, in which the smaller factor is divided by the sums, minus the rows that the
    targets select.
    """
    scale = 1 / targets.size
    losses, hidden_gradients, block_gradients = [], [], []
    for rows, wanted in _chunks(hidden, targets, weight):
        loss, sums, exponentials = _losses(rows, weight, wanted)  # (n,), (n, 1), each (v, n)
        losses.append(loss)
        products = (block.T @ part for block, part in zip(exponentials, _blocks(weight), strict=True))
        hidden_gradients.append((reduce(mx.add, products) / sums - weight[wanted]) * scale)  # (n, C)
        shares = rows * (scale / sums)
        block_gradients.append([block @ shares for block in exponentials])  # each (v, C)
    weight_gradient = mx.concatenate([reduce(mx.add, parts) for parts in zip(*block_gradients, strict=True)])  # (V, C)
    weight_gradient = weight_gradient.at[targets].add(hidden * -scale)
    return mx.concatenate(losses).sum() * scale, mx.concatenate(hidden_gradients), weight_gradient


@_mean_cross_entropy.vjp  # type: ignore[untyped-decorator]
def _mean_cross_entropy_vjp(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    return cotangents[0] * outputs[1], cotangents[0] * outputs[2], mx.zeros_like(primals[2])


def _losses(rows: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Returns the loss (n,) of (n, C) rows, the sums of their exponentials (n, 1), and the exponentials of each block
    (v, n)."""
    logits = [block @ rows.T for block in _blocks(weight)]  # each (v, n)
    highest = reduce(mx.maximum, [mx.max(block, axis=0, keepdims=True) for block in logits])  # (1, n)
    if on_cpu():
        exponentials = [exp_below(block, highest) for block in logits]
    else:
        exponentials = [mx.exp(block - highest) for block in logits]
    sums = reduce(mx.add, [mx.ones((1, block.shape[0])) @ block for block in exponentials])  # (1, n)
    at_target = (rows * weight[targets]).sum(axis=-1)  # (n,)
    return (mx.log(sums) + highest)[0] - at_target, sums.T, exponentials


def _chunks(hidden: mx.array, targets: mx.array, weight: mx.array) -> list[tuple[mx.array, mx.array]]:
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [(hidden[start : start + rows], targets[start : start + rows]) for start in range(0, targets.size, rows)]


def _blocks(weight: mx.array) -> list[mx.array]:
    tokens = _BLOCK_TOKENS if on_cpu() else weight.shape[0]
    return [weight[start : start + tokens] for start in range(0, weight.shape[0], tokens)]
