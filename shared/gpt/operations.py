"""The operations that MLX's CPU backend computes slowly, each in a form that it computes fast.

On Metal and CUDA they are MLX's own. On a CPU `mx.exp` and `mx.tanh` cost about 20 and 30 ns an element, a product and
a sum inside a compiled function less than 1; so the exponential is a polynomial there, and the rest is built on it.
Shapes: B rows, H heads, T tokens, S keys, D head width, N rows of logits, C width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# exp(x) = exp(x / 128) ** 128, and so near 0 a Taylor series of degree 6 is exact to the last bits.
_SQUARINGS = 7
_TAYLOR = [1 / math.factorial(power) for power in range(7)]
# Below, the result is a denormal number before long, which costs a hundred times more; above, it is infinite.
_LOWEST, _HIGHEST = -50.0, 88.0


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def differentiable(function: Callable[..., Any]) -> Any:
    """A function whose gradient is given by its `vjp`; MLX's own decorator carries no types."""
    return mx.custom_function(function)


def fast_exp(x: mx.array) -> mx.array:
    """exp(x) from sums and products alone, for x clamped to [-50, 88].

    The relative error is below 1e-5 from -10 to 0 and below 1e-4 from -50 to 0.
    """
    result: mx.array = _fast_exp(x)
    return result


@differentiable
def _fast_exp(x: mx.array) -> mx.array:
    y = mx.clip(x, _LOWEST, _HIGHEST) * (1 / 2**_SQUARINGS)
    power = mx.full((), _TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        power = power * y + coefficient
    for _ in range(_SQUARINGS):
        power = power * power
    return power


@_fast_exp.vjp  # type: ignore[untyped-decorator]
def _fast_exp_vjp(_primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), element by element."""
    result: mx.array = _cpu_gelu(x) if on_cpu() else nn.gelu_approx(x)
    return result


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Scaled dot-product attention of (B, H, T, D) queries, keys and values; a token sees itself and those before."""
    if not on_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    T = q.shape[2]
    seen = mx.arange(T)[:, None] >= mx.arange(T)  # (T, T)
    scores = mx.where(seen, (q * scale) @ k.swapaxes(-1, -2), -mx.inf)  # (B, H, T, T)
    highest = mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True))
    weights = mx.where(seen, fast_exp(scores - highest), 0.0)
    return (weights @ v) / _row_sums(weights)


def _row_sums(x: mx.array) -> mx.array:
    """The sums over the last axis, kept as an axis of 1, by a product, which the BLAS spreads over the cores."""
    return x @ mx.ones((x.shape[-1], 1))


_TWICE_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)


@differentiable
def _cpu_gelu(x: mx.array) -> mx.array:
    return x * _gelu_gate(x)


@_cpu_gelu.vjp  # type: ignore[untyped-decorator]
def _cpu_gelu_vjp(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
    gate = _gelu_gate(x)
    slope = _TWICE_SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    return cotangent * gate * (1 + x * (1 - gate) * slope)


def _gelu_gate(x: mx.array) -> mx.array:
    """(1 + tanh(u)) / 2 as a sigmoid of 2u."""
    return 1 / (1 + fast_exp(-_TWICE_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))
