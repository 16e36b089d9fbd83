"""A student's loss and its gradients equal the plain formula, in MLX's own operations and in NumPy in 64 bits."""

import re
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.gpt import cuda
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from trainer_service.training import cuda_loss, loss
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


class GivenLogits(GPT):
    """A model whose logits (1, T, V) are a parameter, so that nothing rounds them."""

    def __init__(self, logits: np.ndarray) -> None:
        _, T, V = logits.shape
        super().__init__(GPTConfig(1, V, 1, 1, T, V, tied_head=False))
        self.given = mx.array(logits.astype(np.float32))
        self.head.weight = mx.eye(V)

    def hidden(self, tokens: mx.array, kept: mx.array | None = None) -> mx.array:
        return self.given


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray = exponentials / exponentials.sum(-1, keepdims=True)
    return result


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_gradient_of_the_logits_equals_the_formula_in_64_bits(
    count: int, temperature: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With extreme logits too, and in several chunks."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 20 * 7)
    generator = np.random.default_rng(8)
    student, *teachers = generator.normal(0, 3, (1 + count, 1, 12, 7)).astype(np.float32).astype(np.float64)
    student[0, :3, 0], teachers[0][0, 2:5, 1], student[0, 5:7] = 80, 80, -80
    targets, weights = generator.integers(0, 7, (1, 12)), generator.random((1, 12)).astype(np.float32)
    T = temperature
    taught = np.mean([softmax(teacher / T) for teacher in teachers], axis=0)
    slopes = (1 - alpha) * (softmax(student) - np.eye(7)[targets]) + alpha * T * (softmax(student / T) - taught)
    expected = slopes * weights[..., None] / targets.size

    model = GivenLogits(student)
    distillation = Distillation(tuple(GivenLogits(teacher) for teacher in teachers), alpha, T)
    take = nn.value_and_grad(model, partial(mean_loss, weights=mx.array(weights), distillation=distillation))
    value, gradients = take(model, mx.zeros(targets.shape, mx.int32), mx.array(targets))
    at_target = np.take_along_axis(softmax(student), targets[..., None], -1)[..., 0]
    assert value.item() == pytest.approx((-np.log(at_target) * weights).mean(), rel=1e-5)
    for found, wanted in ((gradients["given"], expected), (gradients["head"]["weight"], expected[0].T @ student[0])):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_a_teacher_that_predicts_what_the_student_does_leaves_no_gradient() -> None:
    model = random_model(1, 51)
    take = nn.value_and_grad(model, partial(mean_loss, distillation=Distillation((random_model(1, 51),), 1.0, 1.0)))
    gradients: dict[str, mx.array] = dict(tree_flatten(take(model, *random_batch(51))[1]))
    for name, gradient in gradients.items():
        assert (mx.abs(gradient).max() < 1e-6).item(), name


def test_a_teacher_whose_predictions_are_not_finite_gives_gradients_that_are_not_finite() -> None:
    model, (teacher,) = random_model(1, 51), teachers_of(1, 51)
    teacher.final_norm.bias = mx.full((16,), mx.nan)
    take = nn.value_and_grad(model, partial(mean_loss, distillation=Distillation((teacher,), 0.5, 1.0)))
    gradients: dict[str, Any] = take(model, *random_batch(51))[1]
    assert mx.any(mx.isnan(gradients["head"]["weight"])).item()


@pytest.mark.skipif(cuda.is_default_device(), reason="MLX keeps the memory of work that a GPU has not done yet.")
def test_no_more_logits_exist_at_once_than_without_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary_size, rows, chunk_bytes = 2048, 2048, 1 << 20
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_bytes // 4)
    generator = np.random.default_rng(9)
    hidden = [mx.array(generator.normal(size=(rows, 8)).astype(np.float32)) for _ in range(4)]
    head = mx.array(generator.normal(size=(vocabulary_size, 8)).astype(np.float32))
    targets = mx.array(generator.integers(0, vocabulary_size, rows))

    def peak_bytes(teachers: int) -> int:
        def value(states: mx.array, weight: mx.array, others: list[mx.array]) -> mx.array:
            taught = [(other, weight) for other in others]
            mean: mx.array = loss._mean_cross_entropy(states, weight, targets, None, taught, 0.5, 1.0)[0]
            return mean

        compiled = mx.compile(mx.value_and_grad(value, argnums=(0, 1)))
        for _ in range(2):  # the first call compiles
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(compiled(hidden[0], head, hidden[1 : 1 + teachers]))
        return mx.get_peak_memory() - before

    # The logits of all rows take 16 MiB a model. MLX reserves memory for ten operations ahead.
    plain = peak_bytes(0)
    assert plain < 16 * chunk_bytes
    for teachers in (1, 3):
        assert peak_bytes(teachers) < 1.25 * plain


def test_kernels_of_other_values_have_other_names_of_letters_digits_and_underscores() -> None:
    values = [
        (1, 0.7, 1.0),
        (2, 0.7, 1.0),
        (1, 0.07, 1.0),
        (1, 0.7, 10.0),
        (1, 1e-05, 1.0),
        (1, 1.0, 1e-05),
        (0, 0.0, 1.0),
    ]
    names = [cuda_loss.taught_name(*each) for each in values]
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"\w+", name, re.ASCII) for name in names)
