"""Dropout in MLX drops a share of the numbers, alone or together, and scales the others."""

import mlx.core as mx
import numpy as np
import pytest

from shared.gpt.operations import dropout


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
