"""A student's loss and its gradients equal the plain formula in MLX's own operations."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from trainer_service.training import loss
from trainer_service.training.loss import Distillation, mean_loss

ROWS, TOKENS = 3, 16


def random_model(seed: int, vocabulary_size: int, width: int = 32, tied_head: bool = False) -> GPT:
    mx.random.seed(seed)
    model = GPT(GPTConfig(1, width, 4, 2 * width, TOKENS, vocabulary_size, tied_head))
    shapes = {name: value.shape for name, value in parameters_of(model).items()}
    model.load_weights([(name, mx.random.normal(shape, scale=0.5)) for name, shape in shapes.items()])
    return model


def teachers_of(count: int, vocabulary_size: int) -> tuple[GPT, ...]:
    """Models of different widths."""
    return tuple(random_model(20 + number, vocabulary_size, 16 + 16 * number) for number in range(count))


def random_batch(vocabulary_size: int) -> tuple[mx.array, mx.array]:
    tokens = np.random.default_rng(5).integers(0, vocabulary_size, (ROWS, TOKENS + 1))
    tokens[0, 1], tokens[-1, -1] = 0, vocabulary_size - 1
    return mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])


def some_weights() -> mx.array:
    """Weights of which half are 0, and whose mean is 1."""
    counted = np.random.default_rng(6).random((ROWS, TOKENS)) < 0.5
    return mx.array((counted / counted.mean()).astype(np.float32))


def plain_losses(
    model: GPT, inputs: mx.array, targets: mx.array, weights: mx.array, distillation: Distillation
) -> tuple[mx.array, mx.array]:
    """Returns the loss of a distillation and the cross-entropy, by the formula in MLX's own operations."""
    T, alpha = distillation.temperature, distillation.alpha
    logits = model(inputs)
    cross_entropy = (nn.losses.cross_entropy(logits, targets) * weights).mean()
    if not distillation.teachers:
        return cross_entropy, cross_entropy
    taught = [mx.softmax(teacher(inputs) / T, axis=-1) for teacher in distillation.teachers]
    q = sum(taught[1:], taught[0]) / len(taught)
    log_p = logits / T - mx.logsumexp(logits / T, axis=-1, keepdims=True)
    divergence = (q * (mx.log(q) - log_p)).sum(axis=-1)
    return (1 - alpha) * cross_entropy + alpha * T**2 * (divergence * weights).mean(), cross_entropy


def assert_agrees(
    model: GPT, batch: tuple[mx.array, mx.array], weights: mx.array | None, distillation: Distillation | None
) -> None:
    """Compares value and gradients with the plain formula, relative to each gradient's largest element."""
    take = nn.value_and_grad(model, partial(mean_loss, weights=weights, distillation=distillation))
    value, gradients = take(model, *batch)
    equal = mx.ones(batch[1].shape) if weights is None else weights
    plain = nn.value_and_grad(model, plain_losses)
    (_, cross_entropy), expected = plain(model, *batch, equal, distillation or Distillation())
    assert value.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    found: dict[str, mx.array] = dict(tree_flatten(gradients))
    wanted: dict[str, mx.array] = dict(tree_flatten(expected))
    for name, gradient in wanted.items():
        largest = np.abs(np.array(gradient)).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_agree_with_the_formula(
    count: int, temperature: float, alpha: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks of rows, the last of which is smaller."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 25 * 51)
    distillation = Distillation(teachers_of(count, 51), alpha, temperature)
    assert_agrees(random_model(1, 51), random_batch(51), some_weights() if weighted else None, distillation)


@pytest.mark.parametrize("vocabulary_size", [257, 2048, 5001])
@pytest.mark.parametrize("tied_head", [True, False])
def test_gradients_agree_for_any_vocabulary(vocabulary_size: int, tied_head: bool) -> None:
    model = random_model(1, vocabulary_size, tied_head=tied_head)
    distillation = Distillation(teachers_of(2, vocabulary_size), 0.4, 1.5)
    assert_agrees(model, random_batch(vocabulary_size), some_weights(), distillation)


def test_targets_without_weight_do_not_count() -> None:
    assert_agrees(random_model(1, 51), random_batch(51), some_weights(), None)
