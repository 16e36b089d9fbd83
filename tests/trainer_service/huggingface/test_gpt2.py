import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from shared.errors import CorruptCheckpoint, InvalidArgument
from shared.gpt.config import GPTConfig
from shared.gpt.model import parameters_of
from tests.trainer_service.huggingface.gpt2_folders import END, TIED, UNTIED, load, random_model, save
from trainer_service.huggingface.gpt2 import read_config, read_model, write_model

Floats = NDArray[np.float64]


def reference(weights: Mapping[str, Floats], heads: int, tokens: NDArray[np.int64]) -> Floats:
    """Computes GPT-2's logits (T, V) of (T,) tokens in float64 from the published names and layout."""

    def norm(x: Floats, name: str) -> Floats:
        centred = x - x.mean(-1, keepdims=True)
        scaled: Floats = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def project(x: Floats, name: str) -> Floats:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    T = len(tokens)
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:T]  # (T, C)
    C = x.shape[1]
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in weights:
        block = f"transformer.h.{layer}"
        q, k, v = np.split(project(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, axis=-1)  # (T, C) each
        attended = np.empty((T, C))
        for head in range(heads):
            part = slice(head * C // heads, (head + 1) * C // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(C // heads)  # (T, T)
            shares = np.exp(scores) * np.tri(T)
            attended[:, part] = shares / shares.sum(-1, keepdims=True) @ v[:, part]
        x = x + project(attended, f"{block}.attn.c_proj")
        up = project(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")  # (T, F)
        gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + project(gelu, f"{block}.mlp.c_proj")
        layer += 1
    head_weight = weights.get("lm_head.weight", weights["transformer.wte.weight"])  # (V, C)
    logits: Floats = norm(x, "transformer.ln_f") @ head_weight.T
    return logits


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_logits_equal_gpt2_by_its_definition(config: GPTConfig, tmp_path: Path) -> None:
    write_model(random_model(config), END, tmp_path)
    weights = {name: np.asarray(array, dtype=np.float64) for name, array in load(tmp_path).items()}
    tokens = np.random.default_rng(5).integers(0, config.vocabulary_size, config.context_length)
    expected = reference(weights, config.heads, tokens)
    actual = np.asarray(read_model(tmp_path, config)(mx.array(tokens[None])))[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_written_model_reads_back_with_the_same_bits(config: GPTConfig, tmp_path: Path) -> None:
    model = random_model(config)
    write_model(model, END, tmp_path)
    published = read_config(tmp_path)
    assert (published.gpt, published.end_tokens) == (config, (END,))
    again = parameters_of(read_model(tmp_path, published.gpt))
    expected = parameters_of(model)
    assert again.keys() == expected.keys()
    assert all(mx.array_equal(array, expected[name]) for name, array in again.items())


def test_matrices_of_blocks_are_written_as_in_by_out(model_folder: Path) -> None:
    shapes = {name: array.shape for name, array in load(model_folder).items()}
    assert shapes["transformer.h.2.attn.c_attn.weight"] == (48, 144)
    assert shapes["transformer.h.2.mlp.c_fc.weight"] == (48, 100)
    assert shapes["transformer.h.2.mlp.c_proj.weight"] == (100, 48)
    assert shapes["transformer.wte.weight"] == (97, 48)
    assert "lm_head.weight" not in shapes


def test_names_without_the_prefix_and_masks_are_read(model_copy: Path) -> None:
    plain = {name.removeprefix("transformer."): array for name, array in load(model_copy).items()}
    masks = {"h.0.attn.bias": mx.ones((1, 1, 20, 20), mx.uint8), "h.2.attn.masked_bias": mx.array(-1e4)}
    expected = parameters_of(read_model(model_copy, TIED))
    save(model_copy, plain | masks)
    again = parameters_of(read_model(model_copy, TIED))
    assert all(mx.array_equal(array, expected[name]) for name, array in again.items())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_read_as_fp32(model_copy: Path, dtype: mx.Dtype) -> None:
    halves = {name: array.astype(dtype) for name, array in load(model_copy).items()}
    save(model_copy, halves)
    embedding = parameters_of(read_model(model_copy, TIED))["token_embedding.weight"]
    assert embedding.dtype == mx.float32
    assert mx.array_equal(embedding, halves["transformer.wte.weight"].astype(mx.float32))


def test_a_stored_tied_head_must_equal_the_embedding(model_copy: Path) -> None:
    arrays = load(model_copy)
    save(model_copy, arrays | {"lm_head.weight": arrays["transformer.wte.weight"]})
    assert "head.weight" not in parameters_of(read_model(model_copy, TIED))
    save(model_copy, arrays | {"lm_head.weight": arrays["transformer.wte.weight"] + 1})
    with pytest.raises(CorruptCheckpoint, match=r"different lm_head.weight and wte.weight"):
        read_model(model_copy, TIED)


def test_a_tied_model_may_store_only_its_head(model_folder: Path, model_copy: Path) -> None:
    arrays = load(model_copy)
    arrays["lm_head.weight"] = arrays.pop("transformer.wte.weight")
    save(model_copy, arrays)
    expected = parameters_of(read_model(model_folder, TIED))
    for name, array in parameters_of(read_model(model_copy, TIED)).items():
        assert mx.array_equal(array, expected[name])


def test_rows_beyond_the_tokenizer_are_dropped(model_folder: Path) -> None:
    whole, cut = parameters_of(read_model(model_folder, TIED)), read_model(model_folder, TIED, 90)
    assert cut.config == replace(TIED, vocabulary_size=90)
    assert mx.array_equal(cut.token_embedding.weight, whole["token_embedding.weight"][:90])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.bias": None}, r"missing or extra weights are transformer\.ln_f\.bias"),
        ({"transformer.h.1.ln_3.bias": mx.zeros(48)}, r"missing or extra weights are transformer\.h\.1\.ln_3\.bias"),
        ({"wte.weight": mx.zeros((97, 48))}, r"missing or extra weights are wte\.weight"),
        ({"transformer.h.3.ln_1.bias": mx.zeros(48)}, "holds 4 layers, but n_layer is 3"),
        ({"transformer.wpe.weight": mx.zeros((21, 48))}, r"wpe\.weight with shape \(21, 48\), but .* \(20, 48\)"),
        ({"transformer.h.0.mlp.c_fc.weight": mx.zeros((100, 48))}, r"c_fc\.weight with shape \(100, 48\)"),
        ({"transformer.h.1.mlp.c_fc.bias": mx.full(100, mx.nan)}, "not finite"),
        ({"transformer.h.1.mlp.c_fc.bias": mx.full(100, mx.inf, mx.float16)}, "not finite"),
    ],
)
def test_weights_that_do_not_match_are_rejected(
    model_copy: Path, changes: dict[str, mx.array | None], message: str
) -> None:
    save(model_copy, {name: array for name, array in (load(model_copy) | changes).items() if array is not None})
    with pytest.raises(CorruptCheckpoint, match=message):
        read_model(model_copy, TIED)


def test_an_untied_model_needs_its_head(model_folder: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"missing or extra weights are lm_head\.weight"):
        read_model(model_folder, replace(TIED, tied_head=False))


def test_a_claim_of_very_many_layers_is_rejected_at_once(model_folder: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="holds 3 layers"):
        read_model(model_folder, replace(TIED, layers=10_000))


def test_quantised_weights_are_rejected(model_copy: Path) -> None:
    save(model_copy, load(model_copy) | {"transformer.wte.weight": mx.zeros((97, 48), mx.int8)})
    with pytest.raises(InvalidArgument, match=r"wte\.weight as .*int8, but it must be fp32, fp16 or bf16"):
        read_model(model_copy, TIED)


def test_a_file_that_is_cut_off_is_rejected(model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        read_model(model_copy, TIED)
