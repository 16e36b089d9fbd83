from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.errors import CorruptCheckpoint
from shared.gpt.cache import KVCache
from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.model import GPT
from shared.gpt.weights import load_model, save_model

CONFIG = GPTConfig(
    layers=2, width=48, heads=3, hidden_width=96, context_length=24, vocabulary_size=97, tied_head=True, dropout=0.1
)
SLOTS = 3


def arrays_of(model: Any) -> dict[str, mx.array]:
    """Every parameter by name; MLX types neither modules nor trees."""
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


@pytest.fixture(scope="module")
def model() -> GPT:
    mx.random.seed(3)
    model = GPT(CONFIG)
    # Weights larger than at the start of training, so that a wrong mask or position shows.
    model.load_weights([(name, value * 2) for name, value in arrays_of(model).items()])
    model.eval()
    return model


def random_tokens(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(5).integers(0, CONFIG.vocabulary_size, shape))


def test_a_token_changes_no_logits_before_it(model: GPT) -> None:
    tokens = random_tokens(1, 20)
    changed = mx.array(tokens)
    changed[0, 12] = (tokens[0, 12] + 1) % CONFIG.vocabulary_size
    difference = np.abs(np.asarray(model(tokens) - model(changed))[0]).max(axis=-1)
    assert difference[:12].max() < 1e-5
    assert difference[12:].min() > 1e-4


def test_cached_decoding_equals_the_full_forward(model: GPT) -> None:
    rows = random_tokens(SLOTS, 20)
    full = model(rows)
    cache = KVCache(CONFIG, SLOTS)
    prompts = [1, 5, 9]
    for slot, length in enumerate(prompts):
        logits = model.prefill(rows[slot, :length], cache, slot, 0)
        assert mx.allclose(logits, full[slot, length - 1], atol=1e-5)
    # Rows of different lengths advance together.
    for offset in range(11):
        positions = mx.array([length + offset for length in prompts])
        logits = model.decode(rows[mx.arange(SLOTS), positions], cache, positions)
        assert mx.allclose(logits, full[mx.arange(SLOTS), positions], atol=1e-5)


def test_a_prompt_read_in_chunks_equals_one_read_whole(model: GPT) -> None:
    tokens = random_tokens(17)
    whole = model.prefill(tokens, KVCache(CONFIG, SLOTS), 1, 0)
    cache = KVCache(CONFIG, SLOTS)
    for start in range(0, 17, 4):
        chunked = model.prefill(tokens[start : start + 4], cache, 1, start)
    assert mx.allclose(chunked, whole, atol=1e-5)


def test_rows_do_not_see_each_other(model: GPT) -> None:
    rows = random_tokens(SLOTS, 6)
    cache = KVCache(CONFIG, SLOTS)
    for slot in range(SLOTS):
        model.prefill(rows[slot, :5], cache, slot, 0)
    beside = KVCache(CONFIG, SLOTS)
    model.prefill(rows[1, :5], beside, 1, 0)
    positions = mx.full(SLOTS, 5)
    first = model.decode(rows[:, 5], cache, positions)[1]
    alone = model.decode(mx.array([0, int(rows[1, 5]), 0]), beside, mx.array([0, 5, 0]))[1]
    assert mx.array_equal(first, alone)


def test_a_write_beyond_what_was_read_changes_nothing(model: GPT) -> None:
    """Rows that do not decode take part in every decode forward, at the first position that is not filled."""
    rows = random_tokens(SLOTS, 10)
    cache = KVCache(CONFIG, SLOTS)
    model.prefill(rows[0, :5], cache, 0, 0)
    model.prefill(rows[1, :4], cache, 1, 0)
    model.decode(mx.array([int(rows[0, 5]), 0, 0]), cache, mx.array([5, 4, 0]))
    continued = model.prefill(rows[1, 4:8], cache, 1, 4)
    assert mx.allclose(continued, model(rows[1:2, :8])[0, -1], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        GPTConfig(4, 160, 5, 640, 128, 2048, tied_head=True),
        GPTConfig(6, 320, 5, 1280, 256, 4096, tied_head=False),
        GPTConfig(8, 384, 8, 1536, 512, 50257, tied_head=False),
        GPTConfig(12, 768, 12, 3072, 1024, 50257, tied_head=True),
    ],
)
def test_the_parameter_formula_counts_the_arrays(shape: GPTConfig, tied: bool) -> None:
    config = replace(shape, tied_head=tied)
    sizes = {name: value.size for name, value in arrays_of(GPT(config)).items()}
    count = count_parameters(config)
    assert count.total == sum(sizes.values())
    assert count.embedding == sum(size for name, size in sizes.items() if "embedding" in name)


def test_the_original_project_has_exactly_its_parameters() -> None:
    config = GPTConfig(8, 384, 8, 1536, 512, 50257, tied_head=False)
    assert count_parameters(config).total == 52_990_464
    assert count_parameters(replace(config, tied_head=True)).total == 33_691_776


def test_a_new_model_predicts_nearly_uniformly() -> None:
    model = GPT(CONFIG)
    model.eval()
    logits = model(random_tokens(4, 24))
    loss = mx.mean(mx.logsumexp(logits, axis=-1) - mx.mean(logits, axis=-1))
    assert float(loss) == pytest.approx(np.log(CONFIG.vocabulary_size), abs=0.05)


def test_dropout_acts_in_training_only(model: GPT) -> None:
    tokens = random_tokens(1, 8)
    assert mx.array_equal(model(tokens), model(tokens))
    model.train()
    try:
        assert not mx.array_equal(model(tokens), model(tokens))
    finally:
        model.eval()


def test_a_saved_model_loads_with_the_same_logits(model: GPT, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model.safetensors")
    tokens = random_tokens(2, 8)
    assert mx.array_equal(load_model(tmp_path / "model.safetensors", CONFIG)(tokens), model(tokens))


def test_weights_of_another_shape_are_refused(model: GPT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    with pytest.raises(CorruptCheckpoint, match="position_embedding"):
        load_model(path, replace(CONFIG, context_length=25))
    with pytest.raises(CorruptCheckpoint, match="head"):
        load_model(path, replace(CONFIG, tied_head=False))


def test_a_torn_file_is_refused(model: GPT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint):
        load_model(path, CONFIG)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = GPT(CONFIG)
    model.final_norm.bias = mx.full(CONFIG.width, mx.nan)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        load_model(tmp_path / "model.safetensors", CONFIG)
