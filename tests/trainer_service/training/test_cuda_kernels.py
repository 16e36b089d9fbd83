"""The training kernels for NVIDIA GPUs equal the plain formulas in fp32."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from trainer_service.training import cuda_adamw, cuda_loss
from trainer_service.training.loss import Distillation, mean_loss

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="There is no NVIDIA GPU.")


@pytest.mark.parametrize("vocabulary_size", [257, 4096, 50257])
def test_cross_entropy_and_its_gradient_equal_the_formula(vocabulary_size: int) -> None:
    rows, padded = 65, -(-vocabulary_size // 64) * 64
    logits = (mx.random.normal((rows, padded)) * 5).astype(mx.bfloat16)
    targets = mx.random.randint(0, vocabulary_size, (rows,))
    losses, difference = cuda_loss.cross_entropy(logits, targets, vocabulary_size)
    plain = logits[:, :vocabulary_size].astype(mx.float32)
    assert (mx.abs(losses - nn.losses.cross_entropy(plain, targets)).max() < 1e-4).item()
    expected = mx.softmax(plain, axis=-1) - (mx.arange(vocabulary_size) == targets[:, None])
    assert (mx.abs(difference[:, :vocabulary_size].astype(mx.float32) - expected).max() < 2**-8).item()
    assert mx.all(difference[:, vocabulary_size:] == 0).item()


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_bf16_differs_from_fp32_by_less_than_a_hundredth(tied: bool) -> None:
    config = GPTConfig(
        layers=4, width=256, heads=4, hidden_width=1024, context_length=128, vocabulary_size=5003, tied_head=tied
    )
    mx.random.seed(1)
    model = GPT(config)
    tokens = mx.random.randint(0, config.vocabulary_size, (8, 129))
    wide = mean_loss(model, tokens[:, :-1], tokens[:, 1:]).item()
    model.apply(lambda array: array.astype(mx.bfloat16))
    narrow = mean_loss(model, tokens[:, :-1], tokens[:, 1:]).item()
    assert narrow == pytest.approx(wide, abs=1e-2)


def test_adamw_updates_more_arrays_than_one_kernel_takes() -> None:
    shapes = [(1000, 37), (5001,), (13,), (1,)] * 20
    parameters, first, second = ([mx.random.normal(shape) for shape in shapes] for _ in range(3))
    second = [mx.abs(array) for array in second]
    gradients = [mx.random.normal(shape).astype([mx.bfloat16, mx.float32][i % 2]) for i, shape in enumerate(shapes)]
    norm = cuda_adamw.squared_norm(gradients).item()
    assert norm == pytest.approx(sum(mx.square(array.astype(mx.float32)).sum().item() for array in gradients), rel=1e-5)
    scalars = mx.array([1e-2, 0.5, 0.7, 0.8])
    results = cuda_adamw.update(
        parameters, gradients, first, second, scalars, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1
    )
    for p, g, m, v, *new in zip(parameters, gradients, first, second, *results, strict=True):
        gradient = g.astype(mx.float32) * 0.5
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient * gradient
        p = p * (1 - 1e-2 * (0.1 if p.ndim >= 2 else 0)) - 1e-2 * (m / 0.7) / (mx.sqrt(v / 0.8) + 1e-8)
        for ours, theirs in zip(new, (p, m, v), strict=True):
            assert (mx.abs(ours - theirs).max() < 1e-5).item()


@pytest.mark.parametrize("vocabulary_size", [257, 50257])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_gradient_with_teachers_equals_the_formula(
    vocabulary_size: int, temperature: float, alpha: float, count: int
) -> None:
    if count == 0 and alpha > 0:
        pytest.skip("Without teachers alpha is 0.")
    rows, padded, T = 65, -(-vocabulary_size // 64) * 64, temperature
    logits, *teachers = ((mx.random.normal((rows, padded)) * 5).astype(mx.bfloat16) for _ in range(1 + count))
    targets, weights = mx.random.randint(0, vocabulary_size, (rows,)), mx.random.uniform(shape=(rows,))
    weights[3] = 0
    losses, difference = cuda_loss.taught_cross_entropy(
        logits, teachers, targets, weights, vocabulary_size, alpha=alpha, temperature=temperature
    )
    plain, *taught = (array[:, :vocabulary_size].astype(mx.float32) for array in (logits, *teachers))
    assert (mx.abs(losses - weights * nn.losses.cross_entropy(plain, targets)).max() < 1e-4).item()
    expected = (1 - alpha) * (mx.softmax(plain, axis=-1) - (mx.arange(vocabulary_size) == targets[:, None]))
    if taught:
        q = sum((mx.softmax(each / T, axis=-1) for each in taught), mx.zeros(plain.shape)) / count
        expected = expected + alpha * T * (mx.softmax(plain / T, axis=-1) - q)
    slopes = difference[:, :vocabulary_size].astype(mx.float32)
    assert (mx.abs(slopes - expected * weights[:, None]).max() < 2**-8 * max(T, 1)).item()
    assert mx.all(difference[:, vocabulary_size:] == 0).item() and mx.all(difference[3] == 0).item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradients_with_teachers_in_bf16_point_as_those_in_fp32(
    tied: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, with targets that do not count."""
    monkeypatch.setattr(cuda_loss, "_CHUNK", 1000)
    models = []
    for width in (256, 128, 64):
        mx.random.seed(width)
        model = GPT(
            GPTConfig(
                layers=2,
                width=width,
                heads=2,
                hidden_width=512,
                context_length=128,
                vocabulary_size=5003,
                tied_head=tied,
            )
        )
        # Predictions that differ.
        model.apply(lambda weight: 3 * weight if weight.ndim == 2 else weight)
        models.append(model)
    tokens = mx.random.randint(0, 5003, (8, 129))
    weights = (mx.arange(128) % 4 > 0).astype(mx.float32)[None] * mx.full((8, 1), 4 / 3)

    def value_and_gradients() -> tuple[float, dict[str, mx.array]]:
        student, *teachers = models
        distillation = Distillation(tuple(teachers), 0.5, temperature)
        take = nn.value_and_grad(student, partial(mean_loss, weights=weights, distillation=distillation))
        value, gradients = take(student, tokens[:, :-1], tokens[:, 1:])
        named: dict[str, mx.array] = dict(tree_flatten(gradients))
        return value.item(), {name: gradient.astype(mx.float32) for name, gradient in named.items()}

    wide, expected = value_and_gradients()
    for model in models:
        model.apply(lambda array: array.astype(mx.bfloat16))
    narrow, gradients = value_and_gradients()
    assert narrow == pytest.approx(wide, abs=2e-2)
    for name, gradient in gradients.items():
        norms = mx.sqrt(mx.square(gradient).sum() * mx.square(expected[name]).sum())
        assert ((gradient * expected[name]).sum() > 0.98 * norms).item(), name
