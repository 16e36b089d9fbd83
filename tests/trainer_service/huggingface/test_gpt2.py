import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from shared.decoding.cpu_decoder import CpuDecoder
from shared.decoding.decoder import Decoder
from shared.decoding.mlx_decoder import MlxDecoder
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.errors import CorruptCheckpoint, InvalidArgument, NotFound
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from tests.shared.gpt.random_models import forward
from trainer_service.huggingface.gpt2 import read_config, read_model, write_model

TIED = GPTConfig(
    layers=3, width=48, heads=3, hidden_width=100, context_length=20, vocabulary_size=97, tied_head=True, dropout=0.1
)
UNTIED = replace(TIED, tied_head=False, hidden_width=192)
END = 96

Floats = NDArray[np.float64]


def random_model(config: GPTConfig) -> GPT:
    """Weights, biases and LayerNorms that all show in the logits."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder of the tied model, not to be changed."""
    directory = tmp_path_factory.mktemp("published")
    write_model(random_model(TIED), END, directory)
    return directory


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(directory: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(directory / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def save(directory: Path, arrays: dict[str, mx.array]) -> None:
    # Under another name first, as arrays that are loaded are read when they are needed.
    mx.save_safetensors(str(directory / "new.safetensors"), arrays)
    (directory / "new.safetensors").replace(directory / "model.safetensors")


def configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reference(weights: Mapping[str, Floats], heads: int, tokens: NDArray[np.int64]) -> Floats:
    """GPT-2's logits (T, V) of (T,) tokens in float64, from its published names and layout."""

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
def test_logits_are_those_of_gpt2_by_its_definition(config: GPTConfig, tmp_path: Path) -> None:
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


def test_matrices_of_blocks_are_written_as_in_by_out(folder: Path) -> None:
    shapes = {name: array.shape for name, array in load(folder).items()}
    assert shapes["transformer.h.2.attn.c_attn.weight"] == (48, 144)
    assert shapes["transformer.h.2.mlp.c_fc.weight"] == (48, 100)
    assert shapes["transformer.h.2.mlp.c_proj.weight"] == (100, 48)
    assert shapes["transformer.wte.weight"] == (97, 48)
    assert "lm_head.weight" not in shapes


def test_a_written_configuration_says_everything_that_transformers_asks(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text()) == {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "n_layer": 3,
        "n_embd": 48,
        "n_head": 3,
        "n_inner": 100,
        "n_positions": 20,
        "vocab_size": 97,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.0,
        "bos_token_id": END,
        "eos_token_id": END,
    }
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert json.loads(file.read(length))["__metadata__"]["format"] == "pt"


def test_names_without_the_prefix_and_masks_are_understood(copy: Path) -> None:
    plain = {name.removeprefix("transformer."): array for name, array in load(copy).items()}
    masks = {"h.0.attn.bias": mx.ones((1, 1, 20, 20), mx.uint8), "h.2.attn.masked_bias": mx.array(-1e4)}
    expected = parameters_of(read_model(copy, TIED))
    save(copy, plain | masks)
    again = parameters_of(read_model(copy, TIED))
    assert all(mx.array_equal(array, expected[name]) for name, array in again.items())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_read_as_fp32(copy: Path, dtype: mx.Dtype) -> None:
    halves = {name: array.astype(dtype) for name, array in load(copy).items()}
    save(copy, halves)
    embedding = parameters_of(read_model(copy, TIED))["token_embedding.weight"]
    assert embedding.dtype == mx.float32
    assert mx.array_equal(embedding, halves["transformer.wte.weight"].astype(mx.float32))


def test_a_tied_head_may_be_stored_as_a_copy_only(copy: Path) -> None:
    arrays = load(copy)
    save(copy, arrays | {"lm_head.weight": arrays["transformer.wte.weight"]})
    assert "head.weight" not in parameters_of(read_model(copy, TIED))
    save(copy, arrays | {"lm_head.weight": arrays["transformer.wte.weight"] + 1})
    with pytest.raises(CorruptCheckpoint, match=r"another lm_head.weight than wte.weight"):
        read_model(copy, TIED)


def test_what_a_configuration_leaves_out_is_as_in_gpt2(copy: Path) -> None:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 300, "n_inner": None}
    (copy / "config.json").write_text(json.dumps(shape))
    published = read_config(copy)
    assert published.gpt == GPTConfig(2, 32, 4, 128, 64, 300, tied_head=True, dropout=0.1)
    assert published.end_tokens == ()


def test_several_end_tokens_are_told(copy: Path) -> None:
    configure(copy, eos_token_id=[96, 5])
    assert read_config(copy).end_tokens == (96, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("architectures", ["GPT2DoubleHeadsModel"]),
        ("activation_function", "gelu"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", "yes"),
        ("resid_pdrop", "0.1"),
        ("embd_pdrop", None),
        ("attn_pdrop", True),
        ("model_type", "x" * 10_000),
        ("n_layer", None),
        ("n_embd", "48"),
        ("n_head", 3.0),
        ("n_inner", True),
        ("n_positions", [20]),
        ("vocab_size", None),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(copy: Path, name: str, value: object) -> None:
    configure(copy, **{name: value})
    with pytest.raises(InvalidArgument, match=rf"says that {name} is .* but it must be"):
        read_config(copy)


@pytest.mark.parametrize(("name", "value"), [("n_layer", 0), ("n_head", 5), ("n_positions", -1), ("resid_pdrop", 1.5)])
def test_values_that_form_no_model_are_refused(copy: Path, name: str, value: object) -> None:
    configure(copy, **{name: value, "embd_pdrop": value if name == "resid_pdrop" else TIED.dropout})
    with pytest.raises(InvalidArgument):
        read_config(copy)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        read_config(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(NotFound, match=r"has no model\.safetensors and no model\.safetensors\.index\.json with shards"):
        read_model(copy, TIED)
    (copy / "pytorch_model.bin").touch()
    with pytest.raises(NotFound, match=r"as pytorch_model\.bin only.* write them as model\.safetensors"):
        read_model(copy, TIED)
    (copy / "config.json").unlink()
    with pytest.raises(NotFound, match=r"has no config\.json"):
        read_config(copy)
    with pytest.raises(NotFound, match=r"absent does not exist"):
        read_config(copy / "absent")


def test_dropouts_that_differ_are_told_with_the_one_that_training_takes(copy: Path) -> None:
    assert read_config(copy).notices == ()
    configure(copy, resid_pdrop=0.2, embd_pdrop=0.3, attn_pdrop=0.1)
    published = read_config(copy)
    assert published.gpt.dropout == 0.2
    (notice,) = published.notices
    assert notice.startswith("config.json says resid_pdrop 0.2, embd_pdrop 0.3, attn_pdrop 0.1; a run that continues")


def split(directory: Path, prefix: str = "transformer.") -> dict[str, str]:
    """Parts a folder's weights into two shards with an index, and returns which tensor is where."""
    arrays = {prefix + name.removeprefix("transformer."): array for name, array in load(directory).items()}
    places = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(sorted(arrays))}
    for place in set(places.values()):
        mx.save_safetensors(str(directory / place), {name: arrays[name] for name in arrays if places[name] == place})
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_shards_are_read_as_one_file(folder: Path, copy: Path, prefix: str) -> None:
    split(copy, prefix)
    expected = parameters_of(read_model(folder, TIED))
    for name, array in parameters_of(read_model(copy, TIED)).items():
        assert mx.array_equal(array, expected[name])


def test_shards_that_are_missing_or_lie_elsewhere_are_refused_by_name(copy: Path) -> None:
    places = split(copy)
    index = copy / "model.safetensors.index.json"
    first = "transformer.h.0.attn.c_attn.bias"
    for name in (
        "../elsewhere.safetensors",
        "/etc/passwd",
        "..",
        "",
        "pytorch_model.bin",
        "x" * 5000 + "/y.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": places | {first: name}}))
        with pytest.raises(
            InvalidArgument, match=r"names the file .*, but must name \.safetensors files beside it"
        ) as raised:
            read_model(copy, TIED)
        assert len(str(raised.value)) <= 300 + len(str(index))
    index.write_text(json.dumps({"weight_map": places | {first: "model-00003-of-00003.safetensors"}}))
    with pytest.raises(NotFound, match=r"has no 'model-00003-of-00003\.safetensors', which model"):
        read_model(copy, TIED)
    for wrong in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(wrong)
        with pytest.raises(InvalidArgument, match="has no weight_map from the names"):
            read_model(copy, TIED)


def test_a_tied_model_may_store_its_head_only(folder: Path, copy: Path) -> None:
    arrays = load(copy)
    arrays["lm_head.weight"] = arrays.pop("transformer.wte.weight")
    save(copy, arrays)
    expected = parameters_of(read_model(folder, TIED))
    for name, array in parameters_of(read_model(copy, TIED)).items():
        assert mx.array_equal(array, expected[name])


def test_rows_beyond_the_tokenizer_are_left_out(folder: Path) -> None:
    whole, cut = parameters_of(read_model(folder, TIED)), read_model(folder, TIED, 90)
    assert cut.config == replace(TIED, vocabulary_size=90)
    assert mx.array_equal(cut.token_embedding.weight, whole["token_embedding.weight"][:90])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.bias": None}, r"missing or extra are transformer\.ln_f\.bias"),
        ({"transformer.h.1.ln_3.bias": mx.zeros(48)}, r"missing or extra are transformer\.h\.1\.ln_3\.bias"),
        ({"wte.weight": mx.zeros((97, 48))}, r"missing or extra are wte\.weight"),
        ({"transformer.h.3.ln_1.bias": mx.zeros(48)}, "holds 4 layers, but n_layer is 3"),
        ({"transformer.wpe.weight": mx.zeros((21, 48))}, r"wpe\.weight as \(21, 48\), but .* \(20, 48\)"),
        ({"transformer.h.0.mlp.c_fc.weight": mx.zeros((100, 48))}, r"c_fc\.weight as \(100, 48\)"),
        ({"transformer.h.1.mlp.c_fc.bias": mx.full(100, mx.nan)}, "not finite"),
        ({"transformer.h.1.mlp.c_fc.bias": mx.full(100, mx.inf, mx.float16)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copy: Path, changes: dict[str, mx.array | None], message: str) -> None:
    save(copy, {name: array for name, array in (load(copy) | changes).items() if array is not None})
    with pytest.raises(CorruptCheckpoint, match=message):
        read_model(copy, TIED)


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"missing or extra are lm_head\.weight"):
        read_model(folder, replace(TIED, tied_head=False))


def test_a_claim_of_very_many_layers_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="holds 3 layers"):
        read_model(folder, replace(TIED, layers=10_000))


def test_quantised_weights_are_refused(copy: Path) -> None:
    save(copy, load(copy) | {"transformer.wte.weight": mx.zeros((97, 48), mx.int8)})
    with pytest.raises(InvalidArgument, match=r"wte\.weight as .*int8, but only fp32, fp16 and bf16"):
        read_model(copy, TIED)


def test_a_torn_file_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        read_model(copy, TIED)


# The published tiny GPT-2, with what another program computed from it.


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    if "GPTLOOP_TEST_DATA" not in os.environ:
        pytest.skip("GPTLOOP_TEST_DATA is not set")
    path = Path(os.environ["GPTLOOP_TEST_DATA"], "tiny-random-gpt2", "as-published.golden.json")
    values: dict[str, Any] = json.loads(path.read_text())
    assert len(values["cases"]) == 6
    return values


@pytest.fixture(scope="module")
def published(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> GPT:
    source = Path(os.environ["GPTLOOP_TEST_DATA"], "tiny-random-gpt2")
    directory = tmp_path_factory.mktemp("tiny")
    shutil.copyfile(source / "as-published.safetensors", directory / "model.safetensors")
    # The shape stands beside the logits: its own config.json is written for another program.
    settings = json.loads((source / "config.json").read_text()) | golden["config"]
    (directory / "config.json").write_text(json.dumps(settings))
    return read_model(directory, read_config(directory).gpt)


def test_published_logits_are_met(golden: dict[str, Any], published: GPT) -> None:
    for case in golden["cases"]:
        logits = np.asarray(published(mx.array([case["prompt"]])))[0]  # (T, V)
        np.testing.assert_allclose(logits[-1], case["last_logits"], rtol=0, atol=1e-5)
        assert logits.argmax(-1).tolist() == case["argmax_per_position"]


def spans_of(prompt: tuple[int, ...]) -> list[Span]:
    return [Span(1, start, prompt[start : start + SPAN_TOKENS]) for start in range(0, len(prompt), SPAN_TOKENS)]


decoders = pytest.mark.parametrize("make", [partial(CpuDecoder, threads=1), MlxDecoder], ids=["cpu", "mlx"])
MakeDecoder = Callable[[GPT, int], Decoder]


@decoders
def test_the_serving_path_meets_published_logits_and_greedy_tokens(
    golden: dict[str, Any], published: GPT, make: MakeDecoder
) -> None:
    decoder = make(published, 2)
    for case in golden["cases"]:
        prompt = tuple(case["prompt"])
        logits = forward(decoder, spans_of(prompt))[-1]
        np.testing.assert_allclose(logits, case["last_logits"], rtol=0, atol=1e-5)
        greedy: list[int] = []
        expected = case.get("greedy_24", [])
        while len(greedy) < len(expected):
            greedy.append(int(logits.argmax()))
            (logits,) = forward(decoder, [Span(1, len(prompt) + len(greedy) - 1, (greedy[-1],))])
        assert greedy == expected


@decoders
def test_the_last_position_of_the_context_is_decoded(golden: dict[str, Any], published: GPT, make: MakeDecoder) -> None:
    case = max(golden["cases"], key=lambda case: len(case["prompt"]))
    prompt = tuple(case["prompt"])
    assert len(prompt) == published.config.context_length == 512
    decoder = make(published, 2)
    forward(decoder, spans_of(prompt[:-1]))
    (logits,) = forward(decoder, [Span(1, 511, prompt[-1:])])
    np.testing.assert_allclose(logits, case["last_logits"], rtol=0, atol=1e-5)
