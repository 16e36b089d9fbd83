"""Properties of every model, on small random ones."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from shared.gpt.operations import causal_attention
from tests.shared.gpt.random_models import models, random_tokens, seeds

TOLERANCE = 1e-5


# Causality


@settings(deadline=None, max_examples=30)
@given(models(), seeds, st.data())
def test_a_token_does_not_change_one_bit_before_it(model: GPT, seed: int, data: st.DataObject) -> None:
    tokens = mx.array(random_tokens(model.config, seed, 2, model.config.context_length))
    position = data.draw(st.integers(0, model.config.context_length - 1))
    changed = mx.array(tokens)
    changed[0, position:] = mx.array(random_tokens(model.config, seed + 1, model.config.context_length - position))
    before, after = model(tokens), model(changed)
    assert mx.array_equal(before[0, :position], after[0, :position])
    assert mx.array_equal(before[1], after[1])


@settings(deadline=None, max_examples=30)
@given(models(), seeds, st.data())
def test_logits_do_not_depend_on_how_many_tokens_follow(model: GPT, seed: int, data: st.DataObject) -> None:
    tokens = mx.array(random_tokens(model.config, seed, 1, model.config.context_length))
    count = data.draw(st.integers(1, model.config.context_length))
    assert mx.allclose(model(tokens[:, :count]), model(tokens)[:, :count], rtol=0, atol=TOLERANCE)


# Dropout


@settings(deadline=None, max_examples=10)
@given(models(), seeds)
def test_dropout_is_off_in_evaluation(model: GPT, seed: int) -> None:
    config = model.config
    dropping = GPT(replace(config, dropout=0.5))
    dropping.load_weights(list(parameters_of(model).items()))
    dropping.eval()
    tokens = mx.array(random_tokens(config, seed, 1, config.context_length))
    assert mx.array_equal(dropping(tokens), model(tokens))


def constant_model(ones: str) -> GPT:
    """Returns a model in training whose residual stream is one parameter of ones, minus the dropped numbers."""
    model = GPT(GPTConfig(1, 400, 1, 8, 25, 2, tied_head=False, dropout=0.25))
    names = parameters_of(model)
    assert ones in names
    model.load_weights(
        [
            (name, mx.ones_like(value) if name in (ones, "final_norm.weight") else mx.zeros_like(value))
            for name, value in names.items()
        ]
    )
    model.train()
    return model


@pytest.mark.parametrize(
    "place", ["token_embedding.weight", "blocks.0.attention.output.bias", "blocks.0.feed_forward.down.bias"]
)
def test_dropout_drops_its_share_in_training(place: str) -> None:
    mx.random.seed(1)
    hidden = np.array(constant_model(place).hidden(mx.zeros((1, 25), mx.int32)))
    # The final LayerNorm has two values: one for dropped numbers, and a higher one for the others.
    share = (hidden < 0).mean()
    # Six standard deviations of a share of 10,000.
    assert share == pytest.approx(0.25, abs=6 * (0.25 * 0.75 / hidden.size) ** 0.5)


def test_attention_misses_whole_values_which_differ_between_rows_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        seen.append(np.array(v))
        return causal_attention(q, k, v, scale)

    monkeypatch.setattr("shared.gpt.model.causal_attention", attention)
    model = GPT(GPTConfig(2, 40, 4, 8, 100, 2, tied_head=False, dropout=0.25))
    model.load_weights([("blocks.1.attention.qkv.weight", mx.zeros((120, 40)))], strict=False)
    model.load_weights([("blocks.1.attention.qkv.bias", mx.arange(120.0))], strict=False)
    values = np.arange(80.0, 120.0).reshape(1, 4, 1, 10)
    tokens = mx.zeros((10, 100), mx.int32)
    mx.random.seed(1)
    model(tokens)
    dropped = seen[1][..., :1] == 0
    np.testing.assert_allclose(seen[1], np.where(dropped, 0, values / 0.75), rtol=1e-6)
    assert dropped.mean() == pytest.approx(0.25, abs=6 * (0.25 * 0.75 / dropped.size) ** 0.5)
    assert len(np.unique(dropped.reshape(40, 100), axis=0)) == 40
    # Each layer and each pass misses others.
    assert not np.array_equal((seen[0] == 0).any(axis=-1, keepdims=True), dropped)
    model(tokens)
    assert not np.array_equal(seen[3][..., :1] == 0, dropped)
    model.eval()
    model(tokens)
    np.testing.assert_allclose(seen[5], np.broadcast_to(values, seen[5].shape), rtol=1e-6)


def test_dropout_drops_other_numbers_each_time() -> None:
    model = constant_model("token_embedding.weight")
    tokens = mx.zeros((1, 25), mx.int32)
    assert not mx.array_equal(model.hidden(tokens), model.hidden(tokens))
