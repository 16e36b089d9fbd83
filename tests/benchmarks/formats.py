"""Compares the formats of weights on a CPU: python -m tests.benchmarks.formats --help"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from shared.decoding.spans import SPAN_TOKENS, Span
from shared.decoding.weight_format import WeightFormat
from shared.device import accelerator
from shared.errors import FailedPrecondition, InvalidArgument
from shared.gpt.config import GPTConfig
from shared.registry.manifest import VersionManifest
from shared.service import cli
from shared.text import format_size
from tests.benchmarks.side_by_side import ROOT, cores, print_table
from trainer_service.child_process import last_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROWS = (1, 8, 32)
_SLOTS = 2
_CACHE = ROOT / ".pytest_cache" / "benchmarks"


@app.command()
def main(
    version: Annotated[Path, typer.Argument(help="The folder of a version in a registry.")],
    text: Annotated[Path, typer.Argument(help="A text that the version was not trained on.")],
    windows: Annotated[int, typer.Option(min=2, help="At most this many windows of the text are scored.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="The speeds are medians of this many.")] = 3,
) -> None:
    """Print for each format of weights the speed of the engine, the memory and the bits per byte of a text.

    The speed is in tokens per second, of a long prompt and at 1, 8 and 32 requests at once; the memory is that of the
    weights and of a token in a slot. The text is read in windows of the context, and the last column is the difference
    from fp32, with the standard error over the windows.

    Example: python -m tests.benchmarks.formats var/registry/versions/7 held-out.txt
    """
    if accelerator.prepare(_CACHE).backend != "cpu":
        raise FailedPrecondition("The formats of weights are compared on a CPU, but MLX computes on a GPU here.")
    examined = {weights: _examine(version, text, windows, weights) for weights in WeightFormat}
    speeds: dict[WeightFormat, list[dict[str, Any]]] = {weights: [] for weights in WeightFormat}
    options = [word for rows in _ROWS for word in ("--rows", str(rows))]
    command = [sys.executable, "-m", "inference_service", "measure", str(version), *options]
    for _ in range(rounds):
        for weights, measured in speeds.items():
            environment = {"GPTLOOP_INFERENCE_WEIGHTS": weights}
            measured.append(json.loads(last_line(command, environment, lambda seen: None, "The speed is not measured")))
    plain = examined[WeightFormat.FP32].bits
    print(f"{cores()} cores; {len(plain)} windows with {plain.mean():.4f} bits per byte in fp32")
    rows = []
    for weights, one in examined.items():
        answers = [
            [each["prefill_tokens_per_s"], *(x["tokens_per_s"] for x in each["decoding"])] for each in speeds[weights]
        ]
        more = one.bits - plain
        rows.append(
            [
                weights,
                *(f"{median(speed):,.0f}" for speed in zip(*answers, strict=True)),
                format_size(one.weights_bytes),
                f"{one.bytes_per_token / 1024:.1f} KiB",
                f"{more.mean():+.5f} ± {more.std(ddof=1) / math.sqrt(len(more)):.5f}",
            ]
        )
    print_table(["format", "prompt", *(f"x{each}" for each in _ROWS), "weights", "a token", "bits per byte"], rows)


@dataclass(frozen=True)
class _Examined:
    """The bits per byte of each window (N,), and the memory of the weights and of a token in a slot."""

    bits: np.ndarray
    weights_bytes: int
    bytes_per_token: int


def _examine(version: Path, text: Path, windows: int, weights: WeightFormat) -> _Examined:
    """Returns the bits per byte of each window, and the memory of the weights and of a token in a slot."""
    device = accelerator.prepare(_CACHE)
    from shared.decoding.decoder import DecoderFactory
    from shared.version_format import read_model, read_tokenizer

    config = GPTConfig.from_dict(VersionManifest.read(version).model)
    tokenizer, size = read_tokenizer(version), config.context_length
    tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
    pieces = [tokens[start : start + size + 1] for start in range(0, len(tokens) - size, size)]
    if len(pieces) < 2:
        raise InvalidArgument(f"{text} has {len(tokens)} tokens, but two windows take {2 * size + 1}.")
    chosen = [pieces[i] for i in np.linspace(0, len(pieces) - 1, min(windows, len(pieces)), dtype=int)]
    decoder = DecoderFactory(_SLOTS, 1, device.cache, weights).make(read_model(version, config))
    nats = [_score(decoder, piece) for piece in chosen]
    lengths = [int(tokenizer.byte_lengths[piece[1:]].sum()) for piece in chosen]
    return _Examined(
        np.array(nats) / np.array(lengths) / math.log(2),
        decoder.memory_bytes - _SLOTS * size * decoder.bytes_per_token,
        decoder.bytes_per_token,
    )


def _score(decoder: Any, tokens: list[int]) -> float:
    """Returns the loss of all tokens but the first, in nats."""
    return math.fsum(
        loss
        for start in range(0, len(tokens) - 1, SPAN_TOKENS)
        for loss in decoder.score(
            Span(0, start, tuple(tokens[start : min(start + SPAN_TOKENS, len(tokens) - 1)])),
            tokens[start + 1 : start + SPAN_TOKENS + 1],
        )
    )


if __name__ == "__main__":
    cli.run(app)
