"""What must hold of every model, tried on small random ones whose biases and LayerNorms are random too.

Shapes: B slots, T tokens, S positions of the context, V vocabulary.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.gpt.cache import KVCache
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from shared.gpt.operations import on_cpu

TOLERANCE = 1e-5
# As many slots as the inference server has unless it is told otherwise.
SLOTS = 8

seeds = st.integers(0, 2**32 - 1)


def random_model(config: GPTConfig, seed: int) -> GPT:
    """Every parameter is random, and so large that each shows in the logits, whose size is a few units."""
    generator = np.random.default_rng(seed)
    model = GPT(config)

    def value(name: str, shape: tuple[int, ...]) -> mx.array:
        numbers = generator.standard_normal(shape)
        if "embedding" in name or name == "head.weight":
            numbers *= 0.3
        elif len(shape) == 2:
            numbers /= shape[1] ** 0.5
        elif name.endswith("norm.weight"):
            numbers = 1 + 0.3 * numbers
        return mx.array(numbers.astype(np.float32))

    model.load_weights([(name, value(name, array.shape)) for name, array in parameters_of(model).items()])
    model.eval()
    return model


@st.composite
def models(draw: st.DrawFn) -> GPT:
    heads = draw(st.integers(1, 4))
    config = GPTConfig(
        layers=draw(st.integers(1, 3)),
        # The LayerNorm of fewer numbers can be so steep that rounding shows.
        width=heads * draw(st.integers(-(-8 // heads), 11)),
        heads=heads,
        hidden_width=draw(st.integers(1, 40)),
        context_length=draw(st.integers(2, 21)),
        vocabulary_size=draw(st.integers(2, 60)),
        tied_head=draw(st.booleans()),
    )
    return random_model(config, draw(seeds))


def random_tokens(config: GPTConfig, seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, config.vocabulary_size, shape))


def fill(cache: KVCache, seed: int, scale: float = 1.0) -> None:
    """Puts random numbers wherever the cache holds any."""
    for index, layer in enumerate(cache.layers):
        key = mx.random.key(seed + index)
        layer.keys = scale * mx.random.normal(layer.keys.shape, key=key)
        layer.values = scale * mx.random.normal(layer.values.shape, key=mx.random.split(key)[0])


# Causality


@settings(deadline=None, max_examples=30)
@given(models(), seeds, st.data())
def test_a_token_changes_not_one_bit_before_it(model: GPT, seed: int, data: st.DataObject) -> None:
    tokens = random_tokens(model.config, seed, 2, model.config.context_length)
    position = data.draw(st.integers(0, model.config.context_length - 1))
    changed = mx.array(tokens)
    changed[0, position:] = random_tokens(model.config, seed + 1, model.config.context_length - position)
    before, after = model(tokens), model(changed)
    assert mx.array_equal(before[0, :position], after[0, :position])
    assert mx.array_equal(before[1], after[1])


@settings(deadline=None, max_examples=30)
@given(models(), seeds, st.data())
def test_logits_do_not_depend_on_how_many_tokens_follow(model: GPT, seed: int, data: st.DataObject) -> None:
    tokens = random_tokens(model.config, seed, 1, model.config.context_length)
    count = data.draw(st.integers(1, model.config.context_length))
    assert mx.allclose(model(tokens[:, :count]), model(tokens)[:, :count], rtol=0, atol=TOLERANCE)


# The cache


@dataclass
class Row:
    """What a slot should hold: the first `read` of these (S,) tokens, whose logits the full forward gives."""

    tokens: mx.array
    logits: mx.array
    read: int = 0


@settings(deadline=None, max_examples=30)
@given(models(), seeds, st.integers(1, 4), st.data())
def test_whatever_was_read_in_whatever_order_logits_are_those_of_a_full_forward(
    model: GPT, seed: int, slots: int, data: st.DataObject
) -> None:
    """Prompts in chunks of any length, decode forwards in which any of the slots take part, slots used again."""
    config = model.config

    def new_row(number: int) -> Row:
        tokens = random_tokens(config, seed + number, config.context_length)
        return Row(tokens, model(tokens[None])[0])

    cache = KVCache(config, slots)
    rows = [new_row(slot) for slot in range(slots)]
    for turn in range(data.draw(st.integers(1, 12), "turns")):
        for slot, row in enumerate(rows):
            if row.read == config.context_length:
                rows[slot] = new_row(slots + turn * slots + slot)
        if data.draw(st.booleans(), "prefill"):
            slot = data.draw(st.integers(0, slots - 1), "slot")
            row = rows[slot]
            end = data.draw(st.integers(row.read + 1, config.context_length), "end")
            logits = model.prefill(row.tokens[row.read : end], cache, slot, row.read)
            assert mx.allclose(logits, row.logits[end - 1], rtol=0, atol=TOLERANCE)
            row.read = end
        else:
            taking_part = data.draw(st.sets(st.integers(0, slots - 1), min_size=1), "taking part")
            tokens = [int(row.tokens[row.read]) if slot in taking_part else 0 for slot, row in enumerate(rows)]
            decoded = model.decode(mx.array(tokens), cache, mx.array([row.read for row in rows]))
            for slot in taking_part:
                assert mx.allclose(decoded[slot], rows[slot].logits[rows[slot].read], rtol=0, atol=TOLERANCE)
                rows[slot].read += 1


@settings(deadline=None, max_examples=30)
@given(models(), seeds, st.sampled_from([1.0, 1e4, 1e30]), st.data())
def test_what_a_slot_held_before_changes_not_one_bit(model: GPT, seed: int, scale: float, data: st.DataObject) -> None:
    config = model.config
    length = data.draw(st.integers(1, config.context_length - 1))
    tokens = random_tokens(config, seed, config.context_length)
    new, used = KVCache(config, 3), KVCache(config, 3)
    fill(used, seed % 1000, scale)
    assert mx.array_equal(model.prefill(tokens[:length], new, 1, 0), model.prefill(tokens[:length], used, 1, 0))
    for position in range(length, config.context_length):
        row, positions = mx.array([0, int(tokens[position]), 0]), mx.array([0, position, 0])
        assert mx.array_equal(model.decode(row, new, positions)[1], model.decode(row, used, positions)[1])


# Rows side by side


def decode_among_others(model: GPT, prompt: mx.array, slots: int, slot: int, seed: int) -> mx.array:
    """Logits (V,) after the last token of a prompt that is decoded in a slot; all other slots hold random things."""
    config = model.config
    cache = KVCache(config, slots)
    fill(cache, seed)
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, config.vocabulary_size, slots)
    positions = generator.integers(0, config.context_length, slots)
    last = prompt.shape[0] - 1
    model.prefill(prompt[:last], cache, slot, 0)
    tokens[slot], positions[slot] = int(prompt[last]), last
    return model.decode(mx.array(tokens), cache, mx.array(positions))[slot]


@settings(deadline=None, max_examples=30)
@given(models(), st.integers(2, 33), st.integers(0, 1000), st.data())
def test_what_other_slots_hold_changes_not_one_bit(model: GPT, slots: int, seed: int, data: st.DataObject) -> None:
    prompt = random_tokens(model.config, seed, 2)
    slot = data.draw(st.integers(0, slots - 1))
    first, second = (decode_among_others(model, prompt, slots, slot, neighbours) for neighbours in (seed, seed + 1))
    assert mx.array_equal(first, second)


@settings(deadline=None, max_examples=30)
@given(models(), st.integers(0, 1000), st.data())
def test_which_of_eight_slots_a_row_has_changes_not_one_bit(model: GPT, seed: int, data: st.DataObject) -> None:
    prompt = random_tokens(model.config, seed, 2)
    slot = data.draw(st.integers(1, SLOTS - 1))
    first = decode_among_others(model, prompt, SLOTS, 0, seed)
    assert mx.array_equal(first, decode_among_others(model, prompt, SLOTS, slot, seed + 1))


@settings(deadline=None, max_examples=30)
@given(models(), st.integers(2, 33), st.data())
def test_a_prompt_is_read_alike_in_every_slot(model: GPT, slots: int, data: st.DataObject) -> None:
    config = model.config
    tokens = random_tokens(config, slots, config.context_length)
    slot = data.draw(st.integers(0, slots - 1))
    first = model.prefill(tokens, KVCache(config, 1), 0, 0)
    assert mx.array_equal(first, model.prefill(tokens, KVCache(config, slots), slot, 0))


@pytest.mark.skipif(not on_cpu(), reason="MLX does not compute on the CPU")
@pytest.mark.parametrize(("width", "heads"), [(160, 5), (320, 5), (384, 8), (768, 12)])
def test_how_many_rows_are_decoded_changes_not_one_bit(width: int, heads: int) -> None:
    config = GPTConfig(1, width, heads, 4 * width, 8, 2049, tied_head=True)
    model = random_model(config, width)
    prompt = random_tokens(config, 1, 4)
    expected = decode_among_others(model, prompt, 2, 0, 0)
    for slots in range(2, 34):
        assert mx.array_equal(decode_among_others(model, prompt, slots, slots // 2, slots), expected)


# Dropout


@settings(deadline=None, max_examples=10)
@given(models(), seeds)
def test_dropout_is_off_in_evaluation(model: GPT, seed: int) -> None:
    config = model.config
    dropping = GPT(replace(config, dropout=0.5))
    dropping.load_weights(list(parameters_of(model).items()))
    dropping.eval()
    tokens = random_tokens(config, seed, 1, config.context_length)
    assert mx.array_equal(dropping(tokens), model(tokens))
    cache, other = KVCache(config, 2), KVCache(config, 2)
    assert mx.array_equal(dropping.prefill(tokens[0, :1], other, 0, 0), model.prefill(tokens[0, :1], cache, 0, 0))
    row, positions = mx.array([int(tokens[0, 1]), 0]), mx.array([1, 0])
    assert mx.array_equal(dropping.decode(row, other, positions), model.decode(row, cache, positions))


def constant_model(ones: str) -> GPT:
    """A model in training whose residual stream is what one parameter, all ones, adds to it, less what is dropped."""
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
    # The final LayerNorm leaves two values: one for what was dropped, a higher one for what was kept.
    share = (hidden < 0).mean()
    # Six standard deviations of a share of 10,000.
    assert share == pytest.approx(0.25, abs=6 * (0.25 * 0.75 / hidden.size) ** 0.5)


def test_dropout_drops_others_each_time() -> None:
    model = constant_model("token_embedding.weight")
    tokens = mx.zeros((1, 25), mx.int32)
    assert not mx.array_equal(model.hidden(tokens), model.hidden(tokens))
