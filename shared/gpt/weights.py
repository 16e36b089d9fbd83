"""Models in and out of safetensors files."""

import errno
import os
import shutil
from pathlib import Path

import mlx.core as mx

from shared.errors import CorruptCheckpoint
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of


class NotFiniteWeights(CorruptCheckpoint):
    """Weights of which some are infinite or no numbers."""


def save_model(model: GPT, path: Path) -> None:
    """Writes every parameter under its module name, in fp32; raises `OSError` as `save_arrays` does."""
    save_arrays(parameters_of(model), path)


def save_arrays(arrays: dict[str, mx.array], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes arrays under their names into a safetensors file; raises `OSError` where the disk does not take it."""
    try:
        mx.save_safetensors(str(path), arrays, metadata=metadata)
    except RuntimeError as error:
        # MLX says only that it could not.
        is_full = shutil.disk_usage(path.parent).free < sum(array.nbytes for array in arrays.values())
        number = errno.ENOSPC if is_full else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def load_model(path: Path, config: GPTConfig) -> GPT:
    """The model of a file, evaluated and in evaluation mode.

    Raises `CorruptCheckpoint` where names, shapes or types do not fit the configuration, and `NotFiniteWeights` where a
    value is not finite.
    """
    model = GPT(config)
    # Each model's initial values continue one chain of random keys, which grows for ever where it is never computed.
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
    """Every array of a safetensors file, evaluated; raises `CorruptCheckpoint` where it cannot be read whole."""
    try:
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from error
    assert isinstance(arrays, dict)
    return arrays
