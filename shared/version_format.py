"""The files of a checkpoint, and how those of a version are read and written.

Importing this loads no model framework.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import CorruptCheckpoint
from shared.gpt.config import GPTConfig
from shared.gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from shared.gpt.model import GPT

# Both kinds hold the weights under their module names, in fp32, and the tokenizer.
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

# A version. Its configuration also stands in its manifest; the file is for other programs.
CONFIG_FILE = "config.json"
WINDOWS_FILE = "evaluation.npy"
SERVED_FILES = frozenset({MODEL_FILE, TOKENIZER_FILE, WINDOWS_FILE})
# At most this many held-out windows are part of a version, for a server to check the loss that the version claims.
MAX_WINDOWS = 16

# A state: the optimizer, the position in the schedule, and the revision of the text that the run trains on.
OPTIMIZER_FILE = "optimizer.safetensors"
POSITION_FILE = "position.json"
TEXT_FILE = "text.json"


def write_version(directory: Path, model: "GPT", tokenizer: Tokenizer, windows: NDArray[Any]) -> None:
    """Writes the files of a version into an empty folder.

    `windows` (N, T+1) holds at most `MAX_WINDOWS` held-out windows of tokens. Raises `OSError` if the disk fails.
    """
    from shared.gpt.weights import save_model

    assert len(windows) <= MAX_WINDOWS
    save_model(model, directory / MODEL_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(model.config.to_dict(), indent=2), encoding="utf-8")
    tokenizer.save(directory / TOKENIZER_FILE)
    np.save(directory / WINDOWS_FILE, windows)


def read_model(directory: Path, config: GPTConfig) -> "GPT":
    """Returns the model of a version; raises as `load_model` does."""
    from shared.gpt.weights import load_model

    return load_model(directory / MODEL_FILE, config)


def read_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer of a version or a state; raises as `Tokenizer.load` does."""
    return Tokenizer.load(directory / TOKENIZER_FILE)


def read_windows(directory: Path, config: GPTConfig) -> NDArray[np.integer]:
    """Returns the held-out windows (N, T+1) of a version, N at least 1.

    Raises `CorruptCheckpoint` if they are not a table of tokens of the model, and `OSError` if the disk fails.
    """
    path = directory / WINDOWS_FILE
    try:
        windows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from None
    if (
        not isinstance(windows, np.ndarray)
        or windows.ndim != 2
        or not np.issubdtype(windows.dtype, np.integer)
        or len(windows) == 0
    ):
        raise CorruptCheckpoint(f"{path} is not a table of tokens.")
    tokens = windows.shape[1] - 1
    if not 1 <= tokens <= config.context_length:
        raise CorruptCheckpoint(
            f"{path} does not fit its model: its windows have {tokens} tokens, but 1 to {config.context_length} fit."
        )
    if not 0 <= windows.min() <= windows.max() < config.vocabulary_size:
        raise CorruptCheckpoint(
            f"{path} does not fit its model: its tokens go from {windows.min()} to {windows.max()}, "
            f"but the model knows 0 to {config.vocabulary_size - 1}."
        )
    return windows
