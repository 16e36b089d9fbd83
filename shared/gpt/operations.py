"""Operations that MLX's CPU backend computes slowly, in forms that it computes fast.

Metal and CUDA use MLX's own operations. On a CPU, `mx.exp` and `mx.tanh` take about 20 and 30 ns per element, and a
pass of sums and products in a compiled function takes less than 1 ns. So the exponential consists of such passes, and
the other operations use it.
Shapes: B rows, H heads, T tokens, S keys, K queries of a block, D head width.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from shared.gpt import cuda
from shared.gpt.autograd import differentiable

# A number in fp32 is 2^n (1 + f): its bits are n + 127, followed by the 23 bits of f (IEEE 754).
_FRACTION_BITS = 23
_ONE = 127 << _FRACTION_BITS
_BITS = 2**_FRACTION_BITS / math.log(2)
# The result is 0 below -50, and GELU needs no value above 50: denormal numbers would cost a hundred times more.
_LOWEST, _HIGHEST = -50 * _BITS, 50 * _BITS
# 2^f / (1 + f) = 1 + f (f - 1) r(f): the coefficients of r, lowest first, with the least relative error, 4e-6.
_R = [0.306585551, -0.234734913, 0.214075226, -0.130930481, 0.0383710092]

# Queries in a block: fewer make small products, more compute more weights that the mask removes.
_BLOCK_QUERIES = 64


def on_cpu() -> bool:
    """Returns whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def exp_below(x: mx.array, highest: mx.array) -> mx.array:
    """Computes exp(x - highest), for no x above `highest`, and 0 for x more than 50 below it. It has no gradient.

    `x` is (..., S, K) and `highest` (..., 1, K); if they differ in the last axis, this takes twice the time. The
    relative error is below 1e-5.
    """
    # A pass over arrays of different shapes uses vector instructions only if it writes floating-point numbers. MLX does
    # not fuse across a view, which ends the pass.
    return _exp_of_bits(((x - highest) * _BITS).view(mx.int32).view(mx.float32))


def _capped_exp(x: mx.array) -> mx.array:
    # A selection from the two numbers of its comparison is computed without a branch.
    z = x * _BITS
    return _exp_of_bits(mx.where(z < _HIGHEST, z, _HIGHEST))


def _exp_of_bits(z: mx.array) -> mx.array:
    """Computes 2^(z / 2^23), or 0 for z below -50 / log(2) 2^23, in two passes.

    Source: Schraudolph 1999, "A Fast, Compact Approximation of the Exponential Function", followed by a polynomial.
    """
    bits = mx.where(z < _LOWEST, -_ONE, z).astype(mx.int32) + _ONE
    power = bits.view(mx.float32)  # 2^n (1 + f); the result is 2^n 2^f
    # MLX fuses at most 11 operations in a chain, so the terms are paired, and f is not divided by 2^23.
    f = (bits & (2**_FRACTION_BITS - 1)).astype(mx.float32)
    r = [coefficient * 2 ** (-_FRACTION_BITS * index) for index, coefficient in enumerate(_R)]
    square = f * f
    fit = (r[0] + r[1] * f) + square * (r[2] + r[3] * f) + square * square * r[4]
    result: mx.array = power + power * (f * (f * 2 ** (-2 * _FRACTION_BITS) - 2**-_FRACTION_BITS)) * fit
    return result


def gelu(x: mx.array) -> mx.array:
    """Computes GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), element by element."""
    activate = cuda.gelu if cuda.usable(x) else _cpu_gelu if on_cpu() else nn.gelu_approx
    result: mx.array = activate(x)
    return result


def linear(x: mx.array, layer: nn.Linear) -> mx.array:
    """Computes a layer's product and bias for (..., C)."""
    own = on_cpu() or (cuda.usable(x) and layer.weight.shape[0] % 8 == 0)
    result: mx.array = _linear(x, layer.weight, layer.bias) if own else layer(x)
    return result


def add_norm(x: mx.array, delta: mx.array, norm: nn.LayerNorm) -> tuple[mx.array, mx.array]:
    """Returns x + delta and its LayerNorm, each (..., C)."""
    if cuda.usable(x):
        total, normed = cuda.add_norm(x, delta, norm.weight, norm.bias)
    else:
        total = x + delta
        normed = _cpu_norm(total, norm.weight, norm.bias, mx.array(norm.eps))[0] if on_cpu() else norm(total)
    return total, normed


def dropout(x: mx.array, rate: float, shape: Sequence[int]) -> mx.array:
    """Sets a random share `rate` of the numbers to zero and divides the others by 1 - rate; draws a number for each
    element of `shape`, which broadcasts to `x`."""
    if on_cpu():
        drawn = _random_24_bits(math.prod(shape)).reshape(shape)
        kept = (drawn >= round(rate * 2**24)).astype(mx.float32)
    else:
        kept = mx.random.bernoulli(1 - rate, shape)
    result: mx.array = x * kept * (1 / (1 - rate))
    return result


def _random_24_bits(size: int) -> mx.array:
    """Returns numbers from 0 to 2^24 - 1, each a hash of its position and of a new random key.

    MLX's own random numbers take five times as long on a CPU. Source of the constants: Wellons 2018, "Prospecting for
    Hash Functions".
    """
    first, second = mx.random.randint(0, 1 << 24, (2,), mx.uint32)
    x = mx.arange(size, dtype=mx.uint32) + first
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15) ^ second) * mx.array(0x846CA68B, mx.uint32)
    result: mx.array = (x >> 8).astype(mx.int32)
    return result


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Computes causal scaled dot-product attention of (B, H, T, D) queries, keys and values."""
    if not on_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    # Otherwise each product would copy its strided arguments.
    q, k, v = mx.contiguous(q), mx.contiguous(k), mx.contiguous(v)
    attended: mx.array = _cpu_attention(q, k, v, mx.array(scale))[0]
    return attended


@differentiable
def _cpu_attention(q: mx.array, k: mx.array, v: mx.array, scale: mx.array) -> tuple[mx.array, ...]:
    """Returns the attended values, the sums (B, H, T, 1) of the weights, and the weights (B, H, S, K) by block."""
    blocks = _blocks(q.shape[2])
    last, K = blocks[-1][0], blocks[0][1]
    # One row for each distance of a key from the first query of a block; the mask of a block is a slice of the rows.
    unseen = mx.where(mx.arange(-last, K)[:, None] > mx.arange(K), -mx.inf, 0.0)  # (last + K, K)
    attended, sums, kept = [], [], []
    for start, end in blocks:
        products = k[:, :, :end] @ q[:, :, start:end].swapaxes(-1, -2)  # (B, H, S, K)
        scores = products * scale + unseen[last - start : last - start + end, : end - start]
        highest = mx.max(scores, axis=-2, keepdims=True)  # (B, H, 1, K)
        weights = exp_below(scores, highest)
        # NaN stays NaN.
        total = (mx.ones((1, end)) @ weights + 0 * highest).swapaxes(-1, -2)  # (B, H, K, 1)
        attended.append(weights.swapaxes(-1, -2) @ v[:, :, :end] / total)  # (B, H, K, D)
        sums.append(total)
        kept.append(weights)
    return mx.concatenate(attended, axis=2), mx.concatenate(sums, axis=2), *kept


@_cpu_attention.vjp  # type: ignore[untyped-decorator]
def _cpu_attention_vjp(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, ...]:
    q, k, v, scale = primals
    _, sums, *kept = outputs
    g = cotangents[0] / sums  # (B, H, T, D)
    q_slopes, k_slopes, v_slopes = [], [], []
    k_slope, v_slope = mx.zeros_like(k), mx.zeros_like(v)
    # From the last block, which attends to all keys, to the first.
    for (start, end), weights in reversed(list(zip(_blocks(q.shape[2]), kept, strict=True))):
        # With P = weights / sums, the gradient of a softmax is P dP - P sum(P dP).
        parts = weights * (v[:, :, :end] @ g[:, :, start:end].swapaxes(-1, -2))  # (B, H, S, K)
        share = mx.ones((1, end)) @ parts / sums[:, :, start:end].swapaxes(-1, -2)  # (B, H, 1, K)
        slopes = (parts - weights * share) * scale
        q_slopes.append(slopes.swapaxes(-1, -2) @ k[:, :, :end])  # (B, H, K, D)
        k_slope = mx.addmm(k_slope[:, :, :end], slopes, q[:, :, start:end])  # (B, H, S, D)
        v_slope = mx.addmm(v_slope[:, :, :end], weights, g[:, :, start:end])  # (B, H, S, D)
        # No earlier block attends to these keys.
        k_slopes.append(k_slope[:, :, start:])
        v_slopes.append(v_slope[:, :, start:])
    gradients = [mx.concatenate(slopes[::-1], axis=2) for slopes in (q_slopes, k_slopes, v_slopes)]
    return *gradients, mx.zeros_like(scale)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Returns the first query of each block and the one after its last."""
    return [(start, min(start + _BLOCK_QUERIES, tokens)) for start in range(0, tokens, _BLOCK_QUERIES)]


_TWICE_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)
_SLOPE_OF_CUBE = 3 * 0.044715 * _TWICE_SQRT_2_OVER_PI


@differentiable
def _cpu_gelu(x: mx.array) -> mx.array:
    # x (1 + tanh(u)) / 2 is x times the sigmoid of 2u.
    return x / (1 + _capped_exp(x * (-_TWICE_SQRT_2_OVER_PI - _TWICE_SQRT_2_OVER_PI * 0.044715 * (x * x))))


@_cpu_gelu.vjp  # type: ignore[untyped-decorator]
def _cpu_gelu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    gate = mx.where(x == 0, 0.5, output) / mx.where(x == 0, 1.0, x)  # the sigmoid of 2u
    # Its derivative is gate (1 - gate) times that of 2u.
    return cotangent * (gate + output * (1 - gate) * (_TWICE_SQRT_2_OVER_PI + x * (_SLOPE_OF_CUBE * x)))


@differentiable
def _linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Returns x (..., C) times the transposed weight (F, C), plus the bias (F,): (..., F)."""
    return mx.addmm(bias, x, weight.T)


@_linear.vjp  # type: ignore[untyped-decorator]
def _linear_vjp(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    x, weight, bias = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])  # (N, F)
    # MLX would return the gradient of the weight in column order, over which the optimizer on a CPU uses no vector
    # instructions; MLX's sums for the bias are slow on a CPU and on CUDA.
    weight_slope = rows.T @ x.reshape(-1, x.shape[-1])  # (F, C)
    sums = cuda.column_sums(rows).astype(bias.dtype) if cuda.usable(rows) else _column_sums(rows)
    return cotangent @ weight, weight_slope, sums


@differentiable
def _cpu_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: mx.array) -> tuple[mx.array, ...]:
    """Returns the LayerNorm (Ba et al. 2016, equation 4) of (..., C), its value before the weights, and the inverse of
    the standard deviation, (..., 1)."""
    centred = x - _means(x)
    inverse = mx.rsqrt(_means(centred * centred) + eps)  # (..., 1)
    scaled = centred * inverse
    return scaled * weight + bias, scaled, inverse


@_cpu_norm.vjp  # type: ignore[untyped-decorator]
def _cpu_norm_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
    _, weight, _, eps = primals
    _, scaled, inverse = outputs
    weight_slope, bias_slope = _column_sums(cotangents[0] * scaled), _column_sums(cotangents[0])
    slopes = cotangents[0] * weight
    slopes = inverse * (slopes - _means(slopes) - scaled * _means(slopes * scaled))
    return slopes, weight_slope, bias_slope, mx.zeros_like(eps)


def _column_sums(x: mx.array) -> mx.array:
    """Returns the sums (C,) of (..., C) over all axes except the last, by a product."""
    rows = x.reshape(-1, x.shape[-1])
    return (mx.ones((1, rows.shape[0])) @ rows)[0]


def _means(x: mx.array) -> mx.array:
    """Returns the means over the last axis, kept with length 1, by a product."""
    return x @ mx.full((x.shape[-1], 1), 1 / x.shape[-1])
