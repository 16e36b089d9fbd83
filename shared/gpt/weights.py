"""Reads and writes models as safetensors files."""

import errno
import os
import shutil
from pathlib import Path

import mlx.core as mx

from shared.errors import CorruptCheckpoint
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of


class NotFiniteWeights(CorruptCheckpoint):
    """Some weights are infinite or NaN."""


def save_model(model: GPT, path: Path) -> None:
    """Writes every parameter under its module name, in fp32; raises `OSError` as `save_arrays` does."""
    save_arrays(parameters_of(model), path)


def save_arrays(arrays: dict[str, mx.array], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes arrays under their names to a safetensors file; raises `OSError` if the disk fails."""
    try:
        mx.save_safetensors(str(path), arrays, metadata=metadata)
    except RuntimeError as error:
        # MLX does not give the reason.
        is_full = shutil.disk_usage(path.parent).free < sum(array.nbytes for array in arrays.values())
        number = errno.ENOSPC if is_full else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def load_model(path: Path, config: GPTConfig) -> GPT:
    """Returns the model of a file, evaluated and in evaluation mode.

    Raises `CorruptCheckpoint` if names, shapes or types do not fit the configuration, and `NotFiniteWeights` if a value
    is not finite.
    """
    model = GPT(config)
    # The initial values of all models continue one chain of random keys, which grows until it is evaluated.
    mx.eval(mx.random.state)
    expected = parameters_of(model)
    arrays = load_arrays(path)
    if set(arrays) != set(expected):
        odd = ", ".join(sorted(set(arrays) ^ set(expected))[:5])
        raise CorruptCheckpoint(
            f"{path} does not hold the parameters of its configuration: missing or extra are {odd}."
        )
    for name, array in arrays.items():
        if array.shape != expected[name].shape or array.dtype != expected[name].dtype:
            raise CorruptCheckpoint(
                f"{path} holds {name} as {array.dtype} {array.shape}, but its configuration needs "
                f"{expected[name].dtype} {expected[name].shape}."
            )
    finite = mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in arrays.values()]))
    if not finite.item():
        raise NotFiniteWeights(f"{path} holds values that are not finite.")
    model.load_weights(list(arrays.items()))
    model.eval()
    mx.eval(model.parameters())
    return model


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Returns all arrays of a safetensors file, evaluated; raises `CorruptCheckpoint` if it cannot be read."""
    try:
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from error
    assert isinstance(arrays, dict)
    return arrays
