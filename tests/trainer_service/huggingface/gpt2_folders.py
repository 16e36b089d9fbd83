"""A small random GPT-2 and the files of its folder in Hugging Face's layout."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of

TIED = GPTConfig(
    layers=3, width=48, heads=3, hidden_width=100, context_length=20, vocabulary_size=97, tied_head=True, dropout=0.1
)
UNTIED = replace(TIED, tied_head=False, hidden_width=192)
END = 96


def random_model(config: GPTConfig) -> GPT:
    """Returns a model whose weights, biases and LayerNorms all affect the logits."""
    mx.random.seed(7)
    model = GPT(config)
    changed = []
    for name, value in parameters_of(model).items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        changed.append((name, mean + mx.random.normal(value.shape, scale=0.12 if value.ndim == 2 else 0.3)))
    model.load_weights(changed)
    model.eval()
    mx.eval(model)
    return model


def load(directory: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(directory / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def save(directory: Path, arrays: dict[str, mx.array]) -> None:
    # Written under another name first, because MLX reads loaded arrays lazily from the old file.
    mx.save_safetensors(str(directory / "new.safetensors"), arrays)
    (directory / "new.safetensors").replace(directory / "model.safetensors")


def configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
