"""Small real objects for tests: a tokenizer of bytes, a tiny model, versions in a registry."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.model import GPT
from shared.gpt.tokenizer import PATTERN, Tokenizer
from shared.gpt.weights import load_arrays, save_arrays, save_model
from shared.registry.manifest import FileRecord, VersionManifest
from shared.registry.registry import Registry
from tests.registries import state_folder, version_folder

TINY = GPTConfig(
    layers=2, width=32, heads=2, hidden_width=64, context_length=96, vocabulary_size=257, tied_head=False, dropout=0.1
)


def byte_tokenizer() -> Tokenizer:
    """Token n is the byte n; the end token is 256."""
    return Tokenizer("bytes", PATTERN, [bytes([value]) for value in range(256)])


def tiny_model(seed: int, config: GPTConfig = TINY) -> GPT:
    """Returns an untied model with random weights, large enough that every token and every seed changes the logits."""
    mx.random.seed(seed)
    model = GPT(config)
    for layer in (model.token_embedding, model.head):
        layer.weight = mx.random.normal(layer.weight.shape, scale=0.3)
    model.eval()
    mx.eval(model)
    return model


def loss_of(model: GPT, windows: np.ndarray) -> float:
    """Returns the mean loss of windows (N, T+1) in nats per token, by the plain formula."""
    logits = model(mx.array(windows[:, :-1].astype(np.int32))).astype(mx.float32)  # (N, T, V)
    targets = mx.array(windows[:, 1:].astype(np.int32))[..., None]
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets, axis=-1)[..., 0]
    return float(losses.mean())


def _held_out(windows: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (windows[0], windows[1] + 1), np.uint16)


@cache
def _loss_of_tiny_model(seed: int, config: GPTConfig, windows: tuple[int, int]) -> float:
    return loss_of(tiny_model(seed, config), _held_out(windows))


def publish_tiny_version(
    registry: Registry,
    bits_per_byte: float,
    *,
    seed: int = 0,
    config: GPTConfig = TINY,
    run: str = "tiny",
    evaluation_set: str = "held-out",
    better_by: float = 0.0,
    windows: tuple[int, int] = (2, 40),
    change: Callable[[Path], None] | None = None,
) -> VersionManifest:
    """Publishes a version as training does.

    better_by: how much lower the claimed loss is than the real one, in nats per token.
    windows: the number of held-out windows, and their length in tokens.
    change: changes the files before they are hashed.
    """
    fence = registry.take_over(run)
    tokenizer = byte_tokenizer()
    held_out = _held_out(windows)
    loss = _loss_of_tiny_model(seed, config, windows)

    def write(directory: Path) -> None:
        save_model(tiny_model(seed, config), directory / "model.safetensors")
        tokenizer.save(directory / "tokenizer.json")
        (directory / "config.json").write_text("{}")
        np.save(directory / "evaluation.npy", held_out)
        if change is not None:
            change(directory)

    def manifest(number: int, files: tuple[FileRecord, ...]) -> VersionManifest:
        return VersionManifest(
            version=number,
            run=run,
            step=100 * number,
            parent=None,
            created_at=time.time(),
            preset="tiny",
            model=config.to_dict(),
            parameters=count_parameters(config).total,
            training={},
            tokenizer=tokenizer.name,
            tokenizer_digest=tokenizer.digest,
            dataset="none",
            dataset_revision="",
            dataset_files=(),
            validation_files=(),
            evaluation_set=evaluation_set,
            training_loss=1.0,
            validation_loss=1.1,
            bits_per_byte=bits_per_byte,
            claimed_loss=loss - better_by,
            files=files,
        )

    return registry.publish_version(fence, write, manifest)


def publish_overflowing_version(registry: Registry, number: int) -> VersionManifest:
    """Publishes a slightly worse copy of a version; its state has weights with which the next step overflows."""
    like, run = registry.version(number), "overflowing"
    fence = registry.take_over(run)

    def copy_files(source: Path, target: Path) -> None:
        for path in source.iterdir():
            if path.name != "manifest.json":
                shutil.copyfile(path, target / path.name)

    def write_state(directory: Path) -> None:
        copy_files(state_folder(registry, like.run, like.step), directory)
        weights = load_arrays(directory / "model.safetensors")
        save_arrays({name: 1e30 * array for name, array in weights.items()}, directory / "model.safetensors")

    registry.write_state(fence, like.step, write_state)
    return registry.publish_version(
        fence,
        lambda directory: copy_files(version_folder(registry, number), directory),
        lambda new, files: replace(like, version=new, run=run, bits_per_byte=like.bits_per_byte + 0.001, files=files),
    )
