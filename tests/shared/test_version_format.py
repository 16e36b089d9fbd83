"""The files of a version: written and read back, and named without a model framework."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import CorruptCheckpoint
from shared.gpt.model import parameters_of
from shared.version_format import SERVED_FILES, read_model, read_tokenizer, read_windows, write_version
from tests.fakes import TINY, byte_tokenizer, tiny_model

WINDOWS = np.arange(34, dtype=np.uint16).reshape(2, 17)


def test_a_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = tiny_model(0)
    write_version(tmp_path, model, byte_tokenizer(), WINDOWS)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "evaluation.npy",
    }
    assert {path.name for path in tmp_path.iterdir()} > SERVED_FILES
    assert json.loads((tmp_path / "config.json").read_text()) == TINY.to_dict()
    assert read_tokenizer(tmp_path).digest == byte_tokenizer().digest
    np.testing.assert_array_equal(read_windows(tmp_path, TINY), WINDOWS)
    parameters = parameters_of(read_model(tmp_path, TINY))
    assert all(mx.array_equal(array, parameters[name]) for name, array in parameters_of(model).items())


@pytest.mark.parametrize(
    ("windows", "sentence"),
    [
        (np.zeros((0, 9), np.uint16), "is not a table of tokens"),
        (np.zeros(9, np.uint16), "is not a table of tokens"),
        (np.zeros((2, 9)), "is not a table of tokens"),
        (np.zeros((2, 1), np.uint16), "its windows have 0 tokens, but 1 to 96 fit"),
        (np.zeros((2, 98), np.uint16), "its windows have 97 tokens, but 1 to 96 fit"),
        (np.full((2, 9), 257, np.uint16), "its tokens go from 257 to 257, but the model knows 0 to 256"),
        (np.full((2, 9), -1), "its tokens go from -1 to -1"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_rejected(tmp_path: Path, windows: np.ndarray, sentence: str) -> None:
    np.save(tmp_path / "evaluation.npy", windows)
    with pytest.raises(CorruptCheckpoint, match=sentence):
        read_windows(tmp_path, TINY)


def test_a_file_that_is_not_an_array_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "evaluation.npy").write_bytes(b"windows")
    with pytest.raises(CorruptCheckpoint, match=r"evaluation\.npy cannot be read"):
        read_windows(tmp_path, TINY)


def test_the_names_load_no_model_framework() -> None:
    check = "import sys, shared.version_format; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
