"""Reads and writes GPT-2 in Hugging Face's layout: config.json, and model.safetensors or its shards.

Sources: the published GPT-2, and `GPT2LMHeadModel` of the library transformers, which reads and writes such folders.
Shapes: C width, F hidden width, S positions of the context, V vocabulary.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from shared.errors import CorruptCheckpoint, InvalidArgument, NotFound, shown
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from shared.gpt.weights import load_arrays, save_arrays
from shared.text import excerpt

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Names the file of each tensor if the weights are in several files.
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX = "transformer."
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"
# Attention masks, which older files store beside the weights.
BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
# The values in config.json that our model supports; the first is the default.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "architectures": (["GPT2LMHeadModel"],),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class PublishedConfig:
    """The content of a config.json: the model's shape, the ids of the end tokens, and notices for the user."""

    gpt: GPTConfig
    end_tokens: tuple[int, ...]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A parameter with its published name (without `transformer.`), our name, and its published shape, in which the
    matrices of blocks are (in, out)."""

    published: str
    ours: str
    shape: tuple[int, ...]

    def stored(self, prefix: str) -> str:
        """Returns its name in a file; every name except the head's has the prefix."""
        return self.published if self.published == HEAD else prefix + self.published

    def converted(self, array: mx.array) -> mx.array:
        """Converts the array between the two layouts, in either direction."""
        return array.T if self.published.startswith("h.") else array


def tensors(config: GPTConfig) -> Iterator[Tensor]:
    """Yields every parameter of a model; a tied head is not a parameter."""
    C, F = config.width, config.hidden_width
    modules = [
        ("ln_1", "attention_norm", (C,)),
        ("attn.c_attn", "attention.qkv", (C, 3 * C)),
        ("attn.c_proj", "attention.output", (C, C)),
        ("ln_2", "feed_forward_norm", (C,)),
        ("mlp.c_fc", "feed_forward.up", (C, F)),
        ("mlp.c_proj", "feed_forward.down", (F, C)),
    ]
    yield Tensor(EMBEDDING, "token_embedding.weight", (config.vocabulary_size, C))
    yield Tensor("wpe.weight", "position_embedding.weight", (config.context_length, C))
    for layer in range(config.layers):
        for published, ours, shape in modules:
            yield Tensor(f"h.{layer}.{published}.weight", f"blocks.{layer}.{ours}.weight", shape)
            yield Tensor(f"h.{layer}.{published}.bias", f"blocks.{layer}.{ours}.bias", shape[-1:])
    yield Tensor("ln_f.weight", "final_norm.weight", (C,))
    yield Tensor("ln_f.bias", "final_norm.bias", (C,))
    if not config.tied_head:
        yield Tensor(HEAD, "head.weight", (config.vocabulary_size, C))


def read_config(directory: Path) -> PublishedConfig:
    """Reads a folder's config.json.

    Our model uses `resid_pdrop` as dropout, also after the embeddings and in attention; this matters only in training.
    Raises `NotFound` if the folder or the file is missing, and `InvalidArgument` if our model does
    not support a value.
    """
    if not directory.is_dir():
        raise NotFound(f"The folder {directory} does not exist.")
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise NotFound(f"{directory} has no {CONFIG_FILE}, so it is not a model in Hugging Face's layout.")
    settings = read_json(path)

    def unsupported(name: str, right: str) -> InvalidArgument:
        value = excerpt(json.dumps(settings.get(name)))
        return InvalidArgument(f"{path} sets {name} to {value}, but it must be {right}.")

    def number(name: str) -> int:
        value = settings.get(name)
        if type(value) is not int:
            raise unsupported(name, "a whole number")
        return value

    for name, supported in SUPPORTED.items():
        if settings.get(name, supported[0]) not in (None, *supported):
            raise unsupported(name, " or ".join(map(json.dumps, supported)))
    dropouts = {name: settings.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    for name, value in dropouts.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise unsupported(name, "a number")
    dropout = dropouts["resid_pdrop"]
    notices: tuple[str, ...] = ()
    if (dropouts["embd_pdrop"], dropouts["attn_pdrop"]) != (dropout, dropout):
        stated = ", ".join(f"{name} {shown(value, 20)}" for name, value in dropouts.items())
        notices = (
            f"{CONFIG_FILE} sets {stated}; a run that continues this version uses a dropout of {shown(dropout, 20)} "
            "after embeddings, in attention and after layers, unless you set dropout.",
        )
    tied = settings.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise unsupported("tie_word_embeddings", "true or false")
    width, end = number("n_embd"), settings.get("eos_token_id")
    config = GPTConfig(
        layers=number("n_layer"),
        width=width,
        heads=number("n_head"),
        hidden_width=4 * width if settings.get("n_inner") is None else number("n_inner"),
        context_length=number("n_positions"),
        vocabulary_size=number("vocab_size"),
        tied_head=tied,
        dropout=float(dropout),
    )
    ends = end if isinstance(end, list) else [end]
    return PublishedConfig(config, tuple(each for each in ends if isinstance(each, int)), notices)


def read_model(directory: Path, config: GPTConfig, vocabulary_size: int | None = None) -> GPT:
    """Returns the model of a folder in fp32, evaluated and in evaluation mode; converts fp16 and bf16.

    A `vocabulary_size` below the configuration's keeps only the first tokens: those of the tokenizer, without the rows
    with which many programs pad the embedding. Raises `CorruptCheckpoint` if names or shapes do not match the
    configuration or a value is not finite, `InvalidArgument` for numbers of another type, and `NotFound` for a missing
    file.
    """
    path, stored = _read_arrays(directory)
    arrays = {name: array for name, array in stored.items() if not BUFFER.fullmatch(name)}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in arrays) else ""
    # Counted first, because a configuration may claim a million layers, each with many names.
    layers = len({name.removeprefix(prefix).split(".")[1] for name in arrays if name.startswith(f"{prefix}h.")})
    if layers != config.layers:
        raise CorruptCheckpoint(f"{path} holds {layers} layers, but n_layer is {config.layers} in {CONFIG_FILE}.")
    if config.tied_head and HEAD in arrays:
        # A file may hold only one of the two.
        arrays.setdefault(prefix + EMBEDDING, arrays[HEAD])
    head = arrays.pop(HEAD, None) if config.tied_head else None
    expected = {tensor.stored(prefix): tensor for tensor in tensors(config)}
    if odd := sorted(set(arrays) ^ set(expected)):
        raise CorruptCheckpoint(
            f"{path} does not match {CONFIG_FILE}: missing or extra weights are "
            f"{', '.join(excerpt(name, 60) for name in odd[:3])}."
        )
    for name, tensor in expected.items():
        array = arrays[name]
        if array.shape != tensor.shape:
            raise CorruptCheckpoint(
                f"{path} holds {name} with shape {array.shape}, but {CONFIG_FILE} requires {tensor.shape}."
            )
        if array.dtype not in (mx.float32, mx.float16, mx.bfloat16):
            raise InvalidArgument(f"{path} holds {name} as {array.dtype}, but it must be fp32, fp16 or bf16.")
    if head is not None and not mx.array_equal(head, arrays[prefix + EMBEDDING]):
        raise CorruptCheckpoint(f"{path} holds different {HEAD} and {EMBEDDING}, but tie_word_embeddings is true.")
    if not mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in arrays.values()])):
        raise CorruptCheckpoint(f"{path} holds values that are not finite.")
    for name in (prefix + EMBEDDING, HEAD):
        if vocabulary_size is not None and name in arrays:
            arrays[name] = arrays[name][:vocabulary_size]
    model = GPT(replace(config, vocabulary_size=vocabulary_size or config.vocabulary_size))
    model.load_weights(
        [(tensor.ours, tensor.converted(arrays[name]).astype(mx.float32)) for name, tensor in expected.items()]
    )
    model.eval()
    mx.eval(model.parameters())
    return model


def _read_arrays(directory: Path) -> tuple[Path, dict[str, mx.array]]:
    """Returns the path of a folder's weights or of their index, and every array, from one file or several shards."""
    path, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if path.is_file():
        return path, load_arrays(path)
    if not index.is_file():
        if pickled := next((name for name in PICKLED_FILES if (directory / name).is_file()), None):
            raise NotFound(
                f"{directory} has weights only in {pickled}, a format that can run code when it is read; save them as "
                f"{WEIGHTS_FILE} with `save_pretrained` of transformers."
            )
        raise NotFound(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE} with shards.")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InvalidArgument(f"{index} has no weight_map from tensor names to file names.")
    arrays: dict[str, mx.array] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidArgument(
                f"{index} names the file {shown(name)}, but may only name .safetensors files in its own folder."
            )
        if not (directory / name).is_file():
            raise NotFound(f"{directory} has no {shown(name)}, which {INDEX_FILE} names.")
        arrays |= load_arrays(directory / name)
    return index, arrays


def write_model(model: GPT, end_token: int, directory: Path) -> None:
    """Writes config.json, and model.safetensors in fp32, into a folder."""
    config, parameters = model.config, parameters_of(model)
    settings = {name: supported[0] for name, supported in SUPPORTED.items()} | {
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.hidden_width,
        "n_positions": config.context_length,
        "vocab_size": config.vocabulary_size,
        "tie_word_embeddings": config.tied_head,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": end_token,
        "eos_token_id": end_token,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    arrays = {tensor.stored(PREFIX): tensor.converted(parameters[tensor.ours]) for tensor in tensors(config)}
    # transformers rejects a file whose metadata does not name a framework.
    save_arrays(arrays, directory / WEIGHTS_FILE, {"format": "pt"})


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises `InvalidArgument` if there is none."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise InvalidArgument(f"{path} must contain a JSON object, but contains {type(values).__name__}.")
    return values
