from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from shared.device import accelerator
from shared.errors import CorruptCheckpoint
from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.model import GPT, parameters_of
from shared.gpt.weights import load_model, save_model

CONFIG = GPTConfig(
    layers=2, width=48, heads=3, hidden_width=96, context_length=24, vocabulary_size=97, tied_head=True, dropout=0.1
)


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG)
    model.eval()
    return model


def random_tokens(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(5).integers(0, CONFIG.vocabulary_size, shape))


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
    sizes = {name: value.size for name, value in parameters_of(GPT(config)).items()}
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


def test_a_saved_model_loads_with_the_same_logits(model: GPT, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model.safetensors")
    tokens = random_tokens(2, 8)
    assert mx.array_equal(load_model(tmp_path / "model.safetensors", CONFIG)(tokens), model(tokens))


def test_loaded_models_leave_no_memory_behind(model: GPT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)

    def load(count: int) -> int:
        for _ in range(count):
            load_model(path, model.config)
        accelerator.release_memory()
        return accelerator.memory().resident_bytes

    before = load(20)
    assert load(400) - before < 6 << 20


def test_weights_of_another_shape_are_rejected(model: GPT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    with pytest.raises(CorruptCheckpoint, match="position_embedding"):
        load_model(path, replace(CONFIG, context_length=25))
    with pytest.raises(CorruptCheckpoint, match="head"):
        load_model(path, replace(CONFIG, tied_head=False))


def test_a_truncated_file_is_rejected(model: GPT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint):
        load_model(path, CONFIG)


def test_weights_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    model = GPT(CONFIG)
    model.final_norm.bias = mx.full(CONFIG.width, mx.nan)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        load_model(tmp_path / "model.safetensors", CONFIG)
