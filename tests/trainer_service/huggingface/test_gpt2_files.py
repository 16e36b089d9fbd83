"""The weights of a folder, in one file or several shards."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from shared.errors import InvalidArgument, NotFound
from shared.gpt.model import parameters_of
from tests.trainer_service.huggingface.gpt2_folders import TIED, load
from trainer_service.huggingface.gpt2 import read_config, read_model


def split(directory: Path, prefix: str = "transformer.") -> dict[str, str]:
    """Splits a folder's weights into two shards with an index; returns the file of each tensor."""
    arrays = {prefix + name.removeprefix("transformer."): array for name, array in load(directory).items()}
    files = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(sorted(arrays))}
    for file in set(files.values()):
        mx.save_safetensors(str(directory / file), {name: arrays[name] for name in arrays if files[name] == file})
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_shards_are_read_as_one_file(model_folder: Path, model_copy: Path, prefix: str) -> None:
    split(model_copy, prefix)
    expected = parameters_of(read_model(model_folder, TIED))
    for name, array in parameters_of(read_model(model_copy, TIED)).items():
        assert mx.array_equal(array, expected[name])


def test_the_error_for_a_shard_that_is_missing_or_elsewhere_names_it(model_copy: Path) -> None:
    files = split(model_copy)
    index = model_copy / "model.safetensors.index.json"
    first = "transformer.h.0.attn.c_attn.bias"
    for name in (
        "../elsewhere.safetensors",
        "/etc/passwd",
        "..",
        "",
        "pytorch_model.bin",
        "x" * 5000 + "/y.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": files | {first: name}}))
        with pytest.raises(
            InvalidArgument, match=r"names the file .*, but may only name \.safetensors files in its own folder"
        ) as raised:
            read_model(model_copy, TIED)
        assert len(str(raised.value)) <= 300 + len(str(index))
    index.write_text(json.dumps({"weight_map": files | {first: "model-00003-of-00003.safetensors"}}))
    with pytest.raises(NotFound, match=r"has no 'model-00003-of-00003\.safetensors', which model"):
        read_model(model_copy, TIED)
    for wrong in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(wrong)
        with pytest.raises(InvalidArgument, match="has no weight_map from tensor names"):
            read_model(model_copy, TIED)


def test_the_error_for_a_missing_file_names_it(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(
        NotFound, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json with shards"
    ):
        read_model(model_copy, TIED)
    (model_copy / "pytorch_model.bin").touch()
    with pytest.raises(NotFound, match=r"only in pytorch_model\.bin.* save them as model\.safetensors"):
        read_model(model_copy, TIED)
    (model_copy / "config.json").unlink()
    with pytest.raises(NotFound, match=r"has no config\.json"):
        read_config(model_copy)
    with pytest.raises(NotFound, match=r"absent does not exist"):
        read_config(model_copy / "absent")
