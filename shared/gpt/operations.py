"""Operations that MLX computes slowly on an NVIDIA GPU, in forms that are fast there; elsewhere they are MLX's own.

Shapes: B rows, H heads, T tokens, D head width, C and F widths, N rows of a product.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from shared.gpt import cuda
from shared.gpt.autograd import differentiable


def on_cpu() -> bool:
    """Returns whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def gelu(x: mx.array) -> mx.array:
    """Computes GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), element by element."""
    result: mx.array = cuda.gelu(x) if cuda.usable(x) else nn.gelu_approx(x)
    return result


def linear(x: mx.array, layer: nn.Linear) -> mx.array:
    """Computes a layer's product and bias for (..., C)."""
    own = cuda.usable(x) and layer.weight.shape[0] % 8 == 0
    result: mx.array = _linear(x, layer.weight, layer.bias) if own else layer(x)
    return result


def add_norm(x: mx.array, delta: mx.array, norm: nn.LayerNorm) -> tuple[mx.array, mx.array]:
    """Returns x + delta and its LayerNorm, each (..., C)."""
    if cuda.usable(x):
        total, normed = cuda.add_norm(x, delta, norm.weight, norm.bias)
    else:
        total = x + delta
        normed = norm(total)
    return total, normed


def dropout(x: mx.array, rate: float, shape: Sequence[int]) -> mx.array:
    """Sets a random share `rate` of the numbers to zero and divides the others by 1 - rate; draws a number for each
    element of `shape`, which broadcasts to `x`."""
    result: mx.array = x * mx.random.bernoulli(1 - rate, shape) * (1 / (1 - rate))
    return result


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Computes causal scaled dot-product attention of (B, H, T, D) queries, keys and values."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


@differentiable
def _linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Returns x (..., C) times the transposed weight (F, C), plus the bias (F,): (..., F)."""
    return mx.addmm(bias, x, weight.T)


@_linear.vjp  # type: ignore[untyped-decorator]
def _linear_vjp(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    x, weight, bias = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])  # (N, F)
    # MLX's own sums for the bias are slow.
    return cotangent @ weight, rows.T @ x.reshape(-1, x.shape[-1]), cuda.column_sums(rows).astype(bias.dtype)
