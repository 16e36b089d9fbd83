"""Compares the loss on a whole text with transformers: python -m tests.benchmarks.transformers_loss DIR FILE

DIR is an exported folder, FILE a text in one of the forms that a run reads. Both programs compute each token's loss in
the same windows. The exit code is 1 if the mean losses, or those of a passage or a document, differ by more than 1e-4
nats per token. It needs torch and transformers in the environment of this project.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np

from shared.device.accelerator import prepare
from shared.gpt.tokenizer import Tokenizer
from shared.service.settings import read_directories
from trainer_service.text.local_files import open_file

TOLERANCE = 1e-4


def encoded(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens (N,) of a file, with an end token after each document."""
    tokens: list[int] = []
    for passage in open_file(path).passages():
        tokens += tokenizer.encode(passage.text)
        if passage.ends_document:
            tokens.append(tokenizer.end_token)
    return np.array(tokens, np.uint16)


def their_losses(directory: Path, tokens: np.ndarray, end_token: int, window: int, stride: int) -> np.ndarray:
    """Returns the loss (N,) of each token in transformers, in the first window that predicts it."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    row = torch.tensor([end_token, *tokens.tolist()])
    losses: list[float] = []
    start = 0
    while len(losses) < tokens.size:
        start = min(start, max(tokens.size - window, 0))
        targets = row[start + 1 : start + window + 1]
        with torch.no_grad():
            logits = model(row[start : start + len(targets)][None]).logits[0]  # (T, V)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()  # (T,)
        losses += nats[len(losses) - start :].tolist()
        start += stride
    return np.array(losses)


def check(directory: Path, path: Path, threads: int) -> bool:
    """Prints the differences; returns whether they are small enough."""
    # Brings MLX in, so not before the accelerator is prepared.
    from trainer_service.evaluation.text_quality import measure_text
    from trainer_service.huggingface.gpt2 import read_config, read_model
    from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer
    from trainer_service.training.workers import Workers

    config = read_config(directory).gpt
    tokenizer = read_tokenizer(directory, config.vocabulary_size)
    tokens = encoded(path, tokenizer)
    window = config.context_length
    stride = window // 2
    with Workers(threads) as workers:
        ours = measure_text(
            read_model(directory, config),
            tokens,
            tokenizer,
            window=window,
            stride=stride,
            workers=workers,
            report=lambda _: None,
        )
    theirs = their_losses(directory, tokens, tokenizer.end_token, window, stride)
    units = np.repeat(np.arange(len(ours.unit_tokens)), ours.unit_tokens)  # (N,)
    by_unit = (np.bincount(units, weights=theirs) - ours.unit_nats) / ours.unit_tokens  # (U,)
    difference, largest = abs(ours.nats_per_token - theirs.mean()), float(np.abs(by_unit).max())
    print(
        f"{tokens.size:,} tokens in windows of {window} every {stride}: {ours.nats_per_token:.6f} nats per token here, "
        f"{theirs.mean():.6f} in transformers\n"
        f"difference {difference:.1e}; largest of {len(ours.unit_tokens):,} {ours.unit}s {largest:.1e}; "
        f"allowed {TOLERANCE:.0e}"
    )
    return difference <= TOLERANCE and largest <= TOLERANCE


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.benchmarks.transformers_loss DIR FILE")
    accelerator = prepare(read_directories(os.environ).cache / "transformers_loss")
    sys.exit(0 if check(Path(sys.argv[1]), Path(sys.argv[2]), accelerator.threads) else 1)
