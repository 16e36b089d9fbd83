import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from shared.gpt.operations import causal_attention, fast_exp, gelu
from trainer_service.training import loss
from trainer_service.training.loss import mean_loss, window_losses


def random_model(tied_head: bool) -> GPT:
    config = GPTConfig(
        layers=2, width=32, heads=4, hidden_width=64, context_length=16, vocabulary_size=50, tied_head=tied_head
    )
    mx.random.seed(7)
    model = GPT(config)
    shapes = {name: value.shape for name, value in parameters_of(model).items()}
    model.load_weights([(name, mx.random.normal(shape, scale=0.3)) for name, shape in shapes.items()])
    return model


def plain_loss(model: GPT, inputs: mx.array, targets: mx.array) -> mx.array:
    """The formula as MLX's own operations write it."""
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


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_loss_and_gradients_agree_with_the_plain_formula(
    tied_head: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", chunk_rows * 50)
    model = random_model(tied_head)
    inputs, targets = mx.random.randint(0, 50, (3, 16)), mx.random.randint(0, 50, (3, 16))
    value, gradients = nn.value_and_grad(model, mean_loss)(model, inputs, targets)
    expected_value, expected_gradients = nn.value_and_grad(model, plain_loss)(model, inputs, targets)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    assert window_losses(model, inputs, targets).mean().item() == pytest.approx(expected_value.item(), rel=1e-5)
    expected = dict(tree_flatten(expected_gradients))
    for name, gradient in dict(tree_flatten(gradients)).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-4 * np.abs(expected[name]).max())


def test_fast_exp_is_exact_enough_and_never_denormal() -> None:
    x = np.linspace(-50, 0, 100_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(np.array(fast_exp(mx.array(x)), np.float64) - exact) / exact
    assert error.max() < 1e-4 and error[x >= -10].max() < 1e-5
    assert fast_exp(mx.array([-1e9, -mx.inf])).tolist() == pytest.approx([np.exp(-50.0)] * 2, rel=1e-4)


def test_gelu_and_its_slope_agree_with_mlx() -> None:
    x = mx.linspace(-30, 30, 10_001)
    np.testing.assert_allclose(gelu(x), nn.gelu_approx(x), rtol=1e-4, atol=1e-6)
    slope = mx.grad(lambda x: gelu(x).sum())(x)
    np.testing.assert_allclose(slope, mx.grad(lambda x: nn.gelu_approx(x).sum())(x), rtol=1e-4, atol=1e-5)


def test_attention_agrees_with_mlx_even_where_scores_are_large() -> None:
    q, k, v = (40 * mx.random.normal((2, 3, 9, 8), key=mx.random.key(index)) for index in range(3))
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask="causal")
    np.testing.assert_allclose(causal_attention(q, k, v, 0.35), expected, rtol=1e-4, atol=1e-4)
