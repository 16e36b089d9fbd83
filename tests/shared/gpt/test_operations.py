"""The fast forms against the plain formulas: MLX's own operations, and NumPy in 64 bits."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from shared.gpt.operations import add_norm, causal_attention, dropout, exp_below, gelu, linear

# Relative to the largest element.
TOLERANCE = 1e-4

Function = Callable[..., mx.array | tuple[mx.array, ...]]


def assert_close(actual: mx.array, expected: mx.array | np.ndarray, tolerance: float = TOLERANCE) -> None:
    wanted = np.array(expected, np.float64)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(np.array(actual, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def values_and_slopes(function: Function, *inputs: mx.array) -> list[mx.array]:
    """Returns the values, and the gradients of a fixed random weighted sum of the values."""
    values = function(*inputs)
    shapes = [value.shape for value in (values if isinstance(values, tuple) else (values,))]
    weights = [mx.random.normal(shape, key=mx.random.key(99 + index)) for index, shape in enumerate(shapes)]
    outputs, slopes = mx.vjp(function, list(inputs), weights)
    return [*outputs, *slopes]


def assert_agree(function: Function, plain: Function, *inputs: mx.array) -> None:
    for actual, expected in zip(values_and_slopes(function, *inputs), values_and_slopes(plain, *inputs), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("highest", [0.0, -3.5, 1e4])
def test_exp_below_has_five_digits_and_no_denormal_numbers(highest: float) -> None:
    x = np.concatenate([np.linspace(highest - 60, highest, 10_001), [-1e9, -np.inf]]).astype(np.float32)
    distance = x.astype(np.float64) - highest
    result = np.array(exp_below(mx.array(x)[None], mx.array([[highest]])))[0].astype(np.float64)
    near = distance > -49.9
    np.testing.assert_allclose(result[near], np.exp(distance[near]), rtol=1e-5)
    assert (result[distance < -50.1] == 0).all()
    assert result[distance == 0].tolist() == [1.0]


@pytest.mark.parametrize("highest", [80, 8])
def test_gelu_and_its_gradient_agree_with_mlx(highest: int) -> None:
    assert_agree(gelu, nn.gelu_approx, mx.linspace(-highest, highest, 999))


def test_inputs_may_be_strided() -> None:
    every_other = mx.linspace(-8, 8, 84).reshape(2, 14, 3).transpose(2, 1, 0)[:, ::2]
    assert_agree(gelu, nn.gelu_approx, every_other)


def test_gelu_and_its_gradient_agree_with_the_formula_in_64_bits() -> None:
    def exact(x: np.ndarray) -> np.ndarray:
        result: np.ndarray = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return result

    x = np.linspace(-6, 6, 2001)
    single = mx.array(x.astype(np.float32))
    assert_close(gelu(single), exact(x), 1e-5)
    assert_close(mx.grad(lambda x: gelu(x).sum())(single), (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5, 1e-5)


def plain_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    T = q.shape[2]
    scores = mx.where(mx.tri(T).astype(mx.bool_), (q * scale) @ k.swapaxes(-1, -2), -mx.inf)  # (B, H, T, T)
    return mx.softmax(scores, axis=-1) @ v


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 2, 3), (2, 3, 7, 5), (1, 2, 65, 4), (1, 1, 150, 8)])
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_attention_and_its_gradients_agree_with_the_softmax(shape: tuple[int, int, int, int], size: float) -> None:
    q, k, v = (size * mx.random.normal(shape, key=mx.random.key(index)) for index in range(3))
    scale = shape[-1] ** -0.5
    assert_agree(
        lambda q, k, v: causal_attention(q, k, v, scale), lambda q, k, v: plain_attention(q, k, v, scale), q, k, v
    )


def test_attention_and_its_gradients_are_right_for_extreme_scores() -> None:
    """Scores near -80, 0 and 80, so that several keys of a row have weight and the others have none."""
    generator = np.random.default_rng(1)
    k = 80 * generator.choice([-1, 0, 1], (1, 2, 17, 1)) + generator.standard_normal((1, 2, 17, 1))
    inputs = mx.ones(k.shape), mx.array(k.astype(np.float32)), mx.random.normal((1, 2, 17, 4), key=mx.random.key(2))
    assert_agree(lambda q, k, v: causal_attention(q, k, v, 1.0), lambda q, k, v: plain_attention(q, k, v, 1.0), *inputs)


def test_attention_accepts_the_strided_heads_of_the_model() -> None:
    qkv = mx.random.normal((2, 7, 3, 3, 5), key=mx.random.key(3))  # (B, T, 3, H, D)

    def split(attention: Function) -> Function:
        return lambda qkv: attention(*qkv.transpose(2, 0, 3, 1, 4), 0.4)  # each (B, H, T, D)

    assert_agree(split(causal_attention), split(plain_attention), qkv)


@pytest.mark.parametrize("position", [0, 1, 63, 64, 100, 149])
def test_later_tokens_do_not_change_one_bit_of_attention(position: int) -> None:
    inputs = [mx.random.normal((1, 2, 150, 4), key=mx.random.key(index)) for index in range(3)]
    later = (mx.arange(150) > position)[:, None]
    changed = [mx.where(later, 3 * x + 1, x) for x in inputs]
    before, after = (causal_attention(q, k, v, 0.5)[:, :, : position + 1] for q, k, v in (inputs, changed))
    assert mx.array_equal(before, after)


def test_attention_agrees_with_the_sums_in_64_bits() -> None:
    q, k, v = (np.random.default_rng(index).standard_normal((6, 4)) for index in range(3))
    expected = np.zeros((6, 4))
    for t in range(6):
        weights = np.exp(q[t] @ k[: t + 1].T / 2)
        expected[t] = weights @ v[: t + 1] / weights.sum()
    inputs = [mx.array(x.astype(np.float32))[None, None] for x in (q, k, v)]  # (1, 1, T, D)
    assert_close(causal_attention(inputs[0], inputs[1], inputs[2], 0.5)[0, 0], expected, 1e-5)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_a_linear_layer_and_its_gradients_agree_with_mlx(shape: tuple[int, ...]) -> None:
    x, weight, bias = (mx.random.normal(each, key=mx.random.key(7)) for each in (shape, (40, 24), (40,)))

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        layer = nn.Linear(24, 40)
        layer.weight, layer.bias = weight, bias
        return linear(x, layer)

    assert_agree(ours, lambda x, weight, bias: x @ weight.T + bias, x, weight, bias)


def plain_add_norm(x: mx.array, delta: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    total = x + delta
    centred = total - total.mean(axis=-1, keepdims=True)
    return total, centred * mx.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (3, 5, 48), (2, 3, 160)])
@pytest.mark.parametrize(("size", "offset"), [(1, 0), (100, 0), (1, 10), (1e-4, 0), (0, 0)])
def test_a_sum_and_its_norm_agree_with_the_formula(shape: tuple[int, int, int], size: float, offset: float) -> None:
    x, delta = (offset + size * mx.random.normal(shape, key=mx.random.key(index)) for index in range(2))
    weight, bias = (mx.random.normal(shape[-1:], key=mx.random.key(index)) for index in range(2, 4))

    def fused(x: mx.array, delta: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        norm = nn.LayerNorm(shape[-1])
        norm.weight, norm.bias = weight, bias
        return add_norm(x, delta, norm)

    assert_agree(fused, plain_add_norm, x, delta, weight, bias)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_its_gradient(rate: float) -> None:
    x = mx.random.normal((50, 400), key=mx.random.key(1))
    (dropped,), (slope,) = mx.vjp(lambda x: dropout(x, rate, x.shape), [x], [mx.ones_like(x)])
    kept = np.array(dropped) != 0
    np.testing.assert_allclose(dropped, np.where(kept, np.array(x) / (1 - rate), 0), rtol=1e-6)
    np.testing.assert_allclose(slope, kept / (1 - rate), rtol=1e-6)
    # Five standard deviations of a share.
    assert kept.mean() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / x.size) ** 0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_of_a_smaller_shape_drops_together_what_has_one_number_there(rate: float) -> None:
    x = mx.random.normal((40, 5, 50, 4), key=mx.random.key(1)).swapaxes(1, 2)  # as the values of attention lie
    (dropped,), (slope,) = mx.vjp(lambda x: dropout(x, rate, (40, 50, 5, 1)), [x], [mx.ones_like(x)])
    kept = (np.array(dropped) != 0).any(axis=-1, keepdims=True)
    np.testing.assert_allclose(dropped, np.where(kept, np.array(x) / (1 - rate), 0), rtol=1e-6)
    np.testing.assert_allclose(slope, np.broadcast_to(kept / (1 - rate), x.shape), rtol=1e-6)
    assert kept.mean() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / kept.size) ** 0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, (1337 << 32) | 5])
def test_dropout_masks_are_independent_of_neighbours_and_of_each_other(rate: float, seed: int) -> None:
    mx.random.seed(seed)
    first, second = (np.array(dropout(mx.ones(40_000), rate, (40_000,))) != 0 for _ in range(2))
    pairs = [(first[:-lag], first[lag:]) for lag in (1, 2, 3, 4, 8, 16, 64, 100, 256, 1024, 4096)]
    pairs += [(first, second), (first[1:], second[:-1]), (first[:-1], second[1:])]
    for one, other in pairs:
        # The correlation of independent numbers has the standard deviation 1 / sqrt(count).
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / one.size**0.5
