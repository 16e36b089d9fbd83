"""Ways to spoil a version's folder, before its files are hashed or after."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from shared.gpt.weights import load_arrays, save_arrays, save_model
from tests.fakes import TINY, tiny_model

# Of two random models the first predicts the held-out windows better, by more than the margin of the gate.
GOOD_SEED, BAD_SEED = 0, 1


def spoil_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    arrays = load_arrays(path)
    name = next(iter(arrays))
    arrays[name] = arrays[name] * mx.nan
    save_arrays(arrays, path)


def huge_weights(directory: Path) -> None:
    """Makes weights that are finite, but whose results are not."""
    path = directory / "model.safetensors"
    arrays = load_arrays(path)
    # With both signs, since inputs whose mean is 0 would give 0 with equal weights.
    arrays["head.weight"] = mx.sign(arrays["head.weight"]) * 3e38
    save_arrays(arrays, path)


def other_shape(directory: Path) -> None:
    save_model(tiny_model(0, replace(TINY, layers=3)), directory / "model.safetensors")


def no_windows(directory: Path) -> None:
    np.save(directory / "evaluation.npy", np.zeros((0, 9), np.uint16))


def strange_windows(directory: Path) -> None:
    np.save(directory / "evaluation.npy", np.full((2, 9), 60000, np.uint16))


def no_array(directory: Path) -> None:
    (directory / "evaluation.npy").write_bytes(b"windows")


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def flip_a_bit(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(directory: Path) -> None:
    (directory / "evaluation.npy").unlink()
