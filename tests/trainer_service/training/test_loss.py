"""The loss and its gradients equal the plain formula, in MLX's own operations and in NumPy in 64 bits."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from trainer_service.training import loss
from trainer_service.training.loss import mean_loss, token_losses

VOCABULARY = 50
Loss = Callable[[GPT, mx.array, mx.array], mx.array]


def random_model(tied_head: bool, context_length: int = 16, vocabulary_size: int = VOCABULARY) -> GPT:
    config = GPTConfig(2, 32, 4, 64, context_length, vocabulary_size, tied_head)
    mx.random.seed(7)
    model = GPT(config)
    shapes = {name: value.shape for name, value in parameters_of(model).items()}
    model.load_weights([(name, mx.random.normal(shape, scale=0.3)) for name, shape in shapes.items()])
    return model


def random_tokens(seed: int, *shape: int) -> mx.array:
    """Returns random tokens; the first is the lowest id and the last is the highest."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, shape)
    tokens.flat[0], tokens.flat[-1] = 0, VOCABULARY - 1
    return mx.array(tokens)


def plain_loss(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """Returns the loss by the formula in MLX's own operations."""
    config = model.config

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        scores = (q * config.head_width**-0.5) @ k.swapaxes(-1, -2)
        T = q.shape[2]
        return mx.softmax(mx.where(mx.tri(T, T).astype(mx.bool_), scores, -mx.inf), axis=-1) @ v

    x = model.token_embedding(inputs) + model.position_embedding(mx.arange(inputs.shape[1]))
    for block in model.blocks:
        x = x + block.attention(block.attention_norm(x), attend)
        up = block.feed_forward.up(block.feed_forward_norm(x))
        x = x + block.feed_forward.down(nn.gelu_approx(up))
    logits = model.final_norm(x) @ model.head_weight.T
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def exact_losses(model: GPT, weights: dict[str, np.ndarray], inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the losses (B, T) by the formula in NumPy, in the precision of the weights."""
    heads = model.config.heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        result: np.ndarray = centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return result

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        result: np.ndarray = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        return result

    B, T = inputs.shape
    x = weights["token_embedding.weight"][inputs] + weights["position_embedding.weight"][:T]
    for layer in range(model.config.layers):
        block = f"blocks.{layer}"
        qkv = linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv")  # (B, T, 3C)
        q, k, v = (part.reshape(B, T, heads, -1).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))  # (B, H, T, D)
        scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
        attention = np.exp(scores) * np.tri(T)
        attention /= attention.sum(-1, keepdims=True)
        x = x + linear((attention @ v).swapaxes(1, 2).reshape(B, T, -1), f"{block}.attention.output")
        up = linear(norm(x, f"{block}.feed_forward_norm"), f"{block}.feed_forward.up")
        gelu = 0.5 * up * (1 + np.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
        x = x + linear(gelu, f"{block}.feed_forward.down")
    head = weights["token_embedding.weight" if model.config.tied_head else "head.weight"]
    logits = norm(x, "final_norm") @ head.T  # (B, T, V)
    at_target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    result: np.ndarray = np.log(np.exp(logits).sum(-1)) - at_target
    return result


def value_and_gradients(function: Loss, model: GPT, *batch: mx.array) -> tuple[float, dict[str, np.ndarray]]:
    value, gradients = nn.value_and_grad(model, function)(model, *batch)
    named: dict[str, mx.array] = dict(tree_flatten(gradients))
    return float(value), {name: np.array(gradient) for name, gradient in named.items()}


def assert_agrees(
    model: GPT, inputs: mx.array, targets: mx.array, function: Loss = mean_loss, plain: Loss = plain_loss
) -> None:
    """Compares value and gradients with the plain formula, relative to each gradient's largest element."""
    value, gradients = value_and_gradients(function, model, inputs, targets)
    expected_value, expected = value_and_gradients(plain, model, inputs, targets)
    assert value == pytest.approx(expected_value, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 7, 48, 1000])
def test_loss_and_gradients_agree_with_the_plain_formula(
    tied_head: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one row, with a remainder, of all rows, and of more rows than there are."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_rows * VOCABULARY)
    assert_agrees(random_model(tied_head), random_tokens(1, 3, 16), random_tokens(2, 3, 16))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 3), (2, 130)])
@pytest.mark.parametrize("vocabulary_size", [VOCABULARY, 5001])
def test_loss_and_gradients_agree_for_any_batch_and_vocabulary(shape: tuple[int, int], vocabulary_size: int) -> None:
    model = random_model(False, shape[1], vocabulary_size)
    targets = random_tokens(2, *shape)
    targets[-1, -1] = vocabulary_size - 1
    assert_agrees(model, random_tokens(1, *shape), targets)


@pytest.mark.parametrize("tied_head", [True, False])
def test_loss_and_gradients_agree_for_large_logits(tied_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    model, inputs = random_model(tied_head), random_tokens(1, 3, 16)
    model.final_norm.bias = mx.zeros_like(model.final_norm.bias)
    logits = model(inputs)
    model.final_norm.weight = model.final_norm.weight * (81 / mx.minimum(logits.max(), -logits.min()))
    logits = model(inputs)
    assert float(logits.min()) < -80 and float(logits.max()) > 80
    assert_agrees(model, inputs, random_tokens(2, 3, 16))
    assert_agrees(model, inputs, mx.argmin(logits, axis=-1))


@pytest.mark.parametrize("outlier", [0, 3000, 5000])
def test_loss_and_gradients_agree_if_one_token_dominates_a_large_vocabulary(outlier: int) -> None:
    model, inputs = random_model(False, vocabulary_size=5001), random_tokens(1, 3, 16)
    weight, bias = model.head.weight, model.final_norm.bias
    weight[outlier] = 200 * bias / (bias * bias).sum()
    model.head.weight = weight
    assert float(model(inputs)[..., outlier].min()) > 100
    assert_agrees(model, inputs, random_tokens(2, 3, 16))


class GivenLogits(GPT):
    """A model whose logits (1, T, V) are a parameter, so that nothing rounds them."""

    def __init__(self, logits: np.ndarray) -> None:
        _, T, V = logits.shape
        super().__init__(GPTConfig(1, V, 1, 1, T, V, tied_head=False))
        self.given = mx.array(logits.astype(np.float32))
        self.head.weight = mx.eye(V)

    def hidden(self, tokens: mx.array, kept: mx.array | None = None) -> mx.array:
        return self.given


def test_the_gradient_is_the_probabilities_minus_the_target_for_extreme_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [[80, -80, 0], [-80, 80, 79], [80, 80, 80], [-80, -80, -80], [80, -80, -80], [-80, -79, -78], [0.5, 0, -9]]
    logits = np.repeat(np.array(rows, np.float64), 3, axis=0)[None]  # (1, T, V)
    targets = np.tile([0, 1, 2], len(rows))[None]  # (1, T), each row with each target
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * logits.shape[-1])
    model, batch = GivenLogits(logits), (mx.zeros(targets.shape, mx.int32), mx.array(targets))
    value, gradients = value_and_gradients(mean_loss, model, *batch)
    probabilities = np.exp(logits - 80) / np.exp(logits - 80).sum(-1, keepdims=True)
    losses = np.log(np.exp(logits - 80).sum(-1)) + 80 - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert value == pytest.approx(losses.mean(), rel=1e-5)
    assert token_losses(model, *batch).mean().item() == pytest.approx(losses.mean(), rel=1e-5)
    difference = (probabilities - np.eye(3)[targets]) / targets.size
    for name, expected in (("given", difference), ("head.weight", difference[0].T @ logits[0])):
        np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_arrays_need_not_be_contiguous() -> None:
    model = random_model(tied_head=False)
    model.head.weight = mx.random.normal((32, 2 * VOCABULARY), scale=0.3).T[::2]
    assert_agrees(model, random_tokens(1, 16, 3).T, random_tokens(2, 16, 6)[:, ::2].T)


def test_gradients_pass_through_a_function_of_the_loss() -> None:
    def cube(function: Loss) -> Loss:
        return lambda model, inputs, targets: function(model, inputs, targets) ** 3

    model = random_model(tied_head=True)
    assert_agrees(model, random_tokens(1, 2, 9), random_tokens(2, 2, 9), cube(mean_loss), cube(plain_loss))


def test_a_compiled_step_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training compiles its step, and compiled code uses other kernels."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    model, batch = random_model(tied_head=True), (random_tokens(1, 3, 16), random_tokens(2, 3, 16))

    expected_value, expected = value_and_gradients(plain_loss, model, *batch)

    take = partial(nn.value_and_grad(model, mean_loss), model)
    value, gradients = mx.compile(take, inputs=[model.state], outputs=[model.state])(*batch)
    assert float(value) == pytest.approx(expected_value, rel=1e-5)
    named: dict[str, mx.array] = dict(tree_flatten(gradients))
    for name, gradient in named.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-4 * np.abs(expected[name]).max())


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_token_losses_agree_with_the_formula_in_64_bits(
    tied_head: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_rows * VOCABULARY)
    model, inputs, targets = random_model(tied_head), random_tokens(1, 3, 16), random_tokens(2, 3, 16)
    weights = {name: np.array(value, np.float64) for name, value in parameters_of(model).items()}
    expected = exact_losses(model, weights, np.array(inputs), np.array(targets))
    np.testing.assert_allclose(token_losses(model, inputs, targets), expected, rtol=1e-5, atol=1e-5)
    assert mean_loss(model, inputs, targets).item() == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("tied_head", [True, False])
def test_gradients_agree_with_central_differences_in_64_bits(tied_head: bool) -> None:
    """Along a random direction in each parameter."""
    model, inputs, targets = random_model(tied_head), random_tokens(1, 3, 16), random_tokens(2, 3, 16)
    _, gradients = value_and_gradients(mean_loss, model, inputs, targets)
    weights = {name: np.array(value, np.float64) for name, value in parameters_of(model).items()}
    generator = np.random.default_rng(3)
    step = 1e-5

    def moved(name: str, by: np.ndarray) -> float:
        shifted = weights | {name: weights[name] + by}
        return float(exact_losses(model, shifted, np.array(inputs), np.array(targets)).mean())

    for name, gradient in gradients.items():
        # Along the gradient itself, the slope is its norm, which cannot cancel; the random part covers the rest.
        unit = gradient / np.linalg.norm(gradient)
        noise = generator.standard_normal(gradient.shape)
        direction = unit + noise / np.linalg.norm(noise)
        slope = (moved(name, step * direction) - moved(name, -step * direction)) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-4), name


def test_weights_that_are_not_finite_give_a_loss_that_is_not_finite() -> None:
    model, inputs, targets = random_model(tied_head=True), random_tokens(1, 2, 16), random_tokens(2, 2, 16)
    weight = model.token_embedding.weight
    weight[int(inputs[1, 5])] = mx.nan
    model.token_embedding.weight = weight
    assert np.isnan(mean_loss(model, inputs, targets).item())
    assert np.isnan(token_losses(model, inputs, targets)[1]).any()


def test_losses_and_gradients_of_hidden_states_in_bf16_are_fp32() -> None:
    hidden, weight = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((12, 36), (VOCABULARY, 36)))
    outputs = loss._mean_cross_entropy(hidden, weight, random_tokens(1, 12), None, [], 0.0, 1.0)
    assert [output.dtype for output in outputs] == [mx.float32] * 3
