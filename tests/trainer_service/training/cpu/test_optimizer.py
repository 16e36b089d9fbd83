"""On a CPU, the optimizer updates in place to the values of the one in MLX."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.trainer_service.training.tiny_runs import tiny
from trainer_service.training.config import TrainingConfig
from trainer_service.training.cpu import optimizer as module
from trainer_service.training.cpu.library import load_library
from trainer_service.training.cpu.optimizer import CpuOptimizer
from trainer_service.training.optimizer import Optimizer
from trainer_service.training.workers import Workers

# Wider than what multiplies at a time, and not of whole vectors.
SHAPE = GPTConfig(2, 102, 2, 411, 16, 50, tied_head=False)
Tree = dict[str, Any]


def parameters(seed: int = 1) -> Tree:
    mx.random.seed(seed)
    tree: Tree = GPT(SHAPE).trainable_parameters()
    return tree


def gradients(step: int) -> Tree:
    mx.random.seed(100 + step)
    tree: Tree = tree_map(lambda array: mx.random.normal(array.shape) * 10**-step, parameters())
    return tree


def arrays(tree: Tree) -> dict[str, np.ndarray]:
    """Returns copies of the arrays of a tree, by their names."""
    return {name: np.array(array) for name, array in dict(tree_flatten(tree)).items()}


@dataclass(frozen=True)
class Outcome:
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    norms: list[float]


@contextmanager
def cpu(config: TrainingConfig, threads: int = 1) -> Iterator[CpuOptimizer]:
    with Workers(threads) as workers:
        yield CpuOptimizer(config, parameters(), workers)


def run(optimizer: Optimizer, steps: int = 4, rate: float = 0.05) -> Outcome:
    weights, norms = parameters(), []
    for step in range(steps):
        weights, norm = optimizer.update(weights, gradients(step), mx.array(rate))
        norms.append(float(norm))
    return Outcome(arrays(weights), arrays(optimizer.state), norms)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("largest", [0.0, 0.7, 1e9])
def test_weights_moments_and_norms_are_those_of_mlx(name: str, largest: float) -> None:
    config = tiny(optimizer=name, max_gradient_norm=largest, weight_decay=0.5)
    with cpu(config) as optimizer:
        found = run(optimizer)
    expected = run(Optimizer(config, parameters()))
    flat = [np.concatenate([array.ravel() for array in arrays(gradients(step)).values()]) for step in range(4)]
    assert found.norms == pytest.approx([np.linalg.norm(array.astype(np.float64)) for array in flat], rel=1e-6)
    assert found.state.keys() == expected.state.keys() and found.state["step"] == 4
    for these, those in ((found.weights, expected.weights), (found.state, expected.state)):
        for key, array in those.items():
            np.testing.assert_allclose(these[key], array, rtol=1e-4, atol=3e-5 * np.abs(array).max(), err_msg=key)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_number_of_threads_does_not_change_one_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1000)
    outcomes = []
    for threads in (1, 2, 3):
        with cpu(tiny(optimizer=name), threads) as optimizer:
            outcomes.append(run(optimizer))
    for other in outcomes[1:]:
        assert other.norms == outcomes[0].norms
        for key, array in outcomes[0].weights.items():
            np.testing.assert_array_equal(other.weights[key], array)


def test_it_updates_the_memory_of_the_arrays_and_only_reads_the_gradients() -> None:
    with cpu(tiny(optimizer="muon")) as optimizer:
        weights, slopes = parameters(), gradients(0)
        mx.eval(weights)
        before, moments = arrays(slopes), optimizer.state["m"]
        views = {name: np.asarray(array) for name, array in dict(tree_flatten(weights)).items()}
        after, _ = optimizer.update(weights, slopes, mx.array(0.1))
    for name, array in arrays(after).items():
        np.testing.assert_array_equal(views[name], array)
        assert not np.array_equal(array, arrays(parameters())[name]), name
    for name, array in arrays(slopes).items():
        np.testing.assert_array_equal(array, before[name])
    assert optimizer.state["m"] is moments and all(array.any() for array in arrays(moments).values())


def test_gradients_that_are_not_finite_give_weights_that_are_not_finite() -> None:
    for name in ("adamw", "muon"):
        with cpu(tiny(optimizer=name, max_gradient_norm=1.0)) as optimizer:
            slopes = gradients(0)
            slopes["final_norm"]["bias"] = mx.full(slopes["final_norm"]["bias"].shape, mx.nan)
            weights, norm = optimizer.update(parameters(), slopes, mx.array(0.1))
        assert np.isnan(norm.item())
        assert all(np.isnan(array).all() for array in arrays(weights).values())


def test_the_norm_of_many_small_numbers_keeps_its_digits() -> None:
    size = (1 << 24) + 5
    assert load_library().squared_norm(np.full(size, 1e-3, np.float32)) == pytest.approx(size * 1e-6, rel=1e-7)


def test_the_norm_has_the_same_bits_on_every_processor() -> None:
    """With vectors of any width: ranks compare what follows from it."""
    numbers = np.random.default_rng(1).standard_normal(5777).astype(np.float32)
    squares = (numbers.astype(np.float64) ** 2).tolist()
    # From Python 3.12 on, `sum` compensates for rounding.
    lanes = [reduce(add, squares[lane : 5777 // 16 * 16 : 16]) for lane in range(16)]
    lanes[0] = reduce(add, squares[5777 // 16 * 16 :], lanes[0])
    assert load_library().squared_norm(numbers) == reduce(add, lanes)
