"""Cross-entropy of a language model, in a few rows at a time, so that the logits of a whole batch never exist.

Shapes: B rows, T tokens, N = B x T predictions, C width, V vocabulary.
"""

import mlx.core as mx

from shared.gpt.model import GPT
from shared.gpt.operations import differentiable, fast_exp, on_cpu

# Logits of so many numbers exist at a time: 256 MiB in fp32.
_CHUNK_ELEMENTS = 1 << 26


def mean_loss(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """The mean cross-entropy, in nats per token, of (B, T) targets given (B, T) inputs."""
    hidden = model.hidden(inputs)
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    loss: mx.array = _mean_cross_entropy(rows, model.head_weight, targets.reshape(-1))[0]
    return loss


def window_losses(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """The mean cross-entropy (B,) of each row, in nats per token."""
    hidden = model.hidden(inputs)
    losses = mx.concatenate(
        [
            _losses(rows @ model.head_weight.T, wanted)[0]
            for rows, wanted in _chunks(
                hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), model.head_weight.shape[0]
            )
        ]
    )
    return losses.reshape(targets.shape).mean(axis=1)  # (B,)


@differentiable
def _mean_cross_entropy(hidden: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The mean loss of (N, C) hidden states under a (V, C) head, and its gradients with respect to both.

    The gradients come with the loss, chunk by chunk, while the chunk's logits are at hand; where nobody asks for them,
    MLX does not compute them.
    """
    total = mx.zeros(())
    weight_gradient = mx.zeros_like(weight)
    hidden_gradients = []
    scale = 1 / targets.size
    for rows, wanted in _chunks(hidden, targets, weight.shape[0]):
        losses, difference = _losses(rows @ weight.T, wanted)  # (n,), (n, V)
        difference = difference * scale
        total = total + losses.sum()
        hidden_gradients.append(difference @ weight)  # (n, C)
        weight_gradient = weight_gradient + difference.T @ rows  # (V, C)
    return total * scale, mx.concatenate(hidden_gradients), weight_gradient


@_mean_cross_entropy.vjp  # type: ignore[untyped-decorator]
def _mean_cross_entropy_vjp(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    return cotangents[0] * outputs[1], cotangents[0] * outputs[2], mx.zeros_like(primals[2])


def _losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The loss (n,) of each row of (n, V) logits, and its gradient: the probabilities, less one at the target."""
    exp = fast_exp if on_cpu() else mx.exp
    highest = mx.max(logits, axis=-1, keepdims=True)
    exponentials = exp(logits - highest)
    sums = exponentials @ mx.ones((logits.shape[-1], 1))  # (n, 1)
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)
    losses = (mx.log(sums) + highest - at_target)[:, 0]
    one_hot = mx.arange(logits.shape[-1]) == targets[:, None]  # (n, V)
    return losses, exponentials / sums - one_hot


def _chunks(hidden: mx.array, targets: mx.array, vocabulary_size: int) -> list[tuple[mx.array, mx.array]]:
    rows = max(1, _CHUNK_ELEMENTS // vocabulary_size)
    return [(hidden[start : start + rows], targets[start : start + rows]) for start in range(0, targets.size, rows)]
