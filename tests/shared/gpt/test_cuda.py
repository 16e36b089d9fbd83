"""The NVIDIA kernels against the plain formulas in fp32. A bf16 number has 8 bits, so 2**-8 is its rounding."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from shared.gpt import cuda, operations

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="There is no NVIDIA GPU.")


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)


def assert_close(actual: mx.array, expected: mx.array, tolerance: float = 2**-7) -> None:
    difference = mx.abs(actual.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    assert (difference < tolerance).item()


Function = Callable[..., mx.array | tuple[mx.array, ...]]


def assert_same_function(fast: Function, plain: Function, inputs: list[mx.array], cotangents: list[mx.array]) -> None:
    """Compares values and gradients."""
    wide = [array.astype(mx.float32) for array in inputs]
    actual = mx.vjp(fast, inputs, cotangents)
    expected = mx.vjp(plain, wide, [array.astype(mx.float32) for array in cotangents])
    for ours, theirs in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(ours, theirs)


def test_gelu() -> None:
    assert_same_function(cuda.gelu, nn.gelu_approx, [random(77, 40) * 3], [random(77, 40, seed=1)])


@pytest.mark.parametrize("width", [160, 384, 768, 1600])
def test_add_norm(width: int) -> None:
    inputs = [random(7, 111, width), random(7, 111, width, seed=1), random(width, seed=2), random(width, seed=3)]
    cotangents = [random(7, 111, width, seed=4), random(7, 111, width, seed=5)]

    def plain(x: mx.array, delta: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        return x + delta, mx.fast.layer_norm(x + delta, weight, bias, 1e-5)

    assert_same_function(cuda.add_norm, plain, inputs, cotangents)


def test_linear() -> None:
    inputs = [random(3, 700, 64), random(136, 64, seed=1), random(136, seed=2)]
    assert_same_function(
        operations._linear, lambda x, weight, bias: x @ weight.T + bias, inputs, [random(3, 700, 136, seed=3)]
    )


@pytest.mark.parametrize("rows", [1, 255, 256, 5000])
def test_column_sums(rows: int) -> None:
    x = random(rows, 264)
    assert_close(cuda.column_sums(x), x.astype(mx.float32).sum(axis=0), 1e-5)
