import json
import struct
from pathlib import Path

import pytest

from shared.errors import InvalidArgument
from shared.gpt.config import GPTConfig
from tests.trainer_service.huggingface.gpt2_folders import END, TIED, configure
from trainer_service.huggingface.gpt2 import read_config


def test_a_written_configuration_has_everything_that_transformers_needs(model_folder: Path) -> None:
    assert json.loads((model_folder / "config.json").read_text()) == {
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
        "attn_pdrop": 0.1,
        "bos_token_id": END,
        "eos_token_id": END,
    }
    with (model_folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert json.loads(file.read(length))["__metadata__"]["format"] == "pt"


def test_missing_values_of_a_configuration_are_those_of_gpt2(model_copy: Path) -> None:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 300, "n_inner": None}
    (model_copy / "config.json").write_text(json.dumps(shape))
    published = read_config(model_copy)
    assert published.gpt == GPTConfig(2, 32, 4, 128, 64, 300, tied_head=True, dropout=0.1)
    assert published.end_tokens == ()


def test_several_end_tokens_are_read(model_copy: Path) -> None:
    configure(model_copy, eos_token_id=[96, 5])
    assert read_config(model_copy).end_tokens == (96, 5)


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
def test_the_error_for_an_unsupported_value_names_it(model_copy: Path, name: str, value: object) -> None:
    configure(model_copy, **{name: value})
    with pytest.raises(InvalidArgument, match=rf"sets {name} to .* but it must be"):
        read_config(model_copy)


@pytest.mark.parametrize(("name", "value"), [("n_layer", 0), ("n_head", 5), ("n_positions", -1), ("resid_pdrop", 1.5)])
def test_values_that_cannot_form_a_model_are_rejected(model_copy: Path, name: str, value: object) -> None:
    pdrop = value if name == "resid_pdrop" else TIED.dropout
    configure(model_copy, **{name: value, "embd_pdrop": pdrop, "attn_pdrop": pdrop})
    with pytest.raises(InvalidArgument):
        read_config(model_copy)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_not_a_json_object_is_rejected(model_copy: Path, content: bytes) -> None:
    (model_copy / "config.json").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        read_config(model_copy)


def test_a_notice_reports_different_dropouts_and_the_one_that_training_uses(model_copy: Path) -> None:
    assert read_config(model_copy).notices == ()
    configure(model_copy, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.1)
    published = read_config(model_copy)
    assert published.gpt.dropout == 0.2
    (notice,) = published.notices
    assert notice.startswith("config.json sets resid_pdrop 0.2, embd_pdrop 0.2, attn_pdrop 0.1; a run that continues")
