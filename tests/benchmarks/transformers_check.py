"""Compares an exported folder in transformers and in gptloop: python -m tests.benchmarks.transformers_check DIR

Prints the largest difference of the logits of a row that fills the context, and compares the token ids of several
texts. The exit code is 1 if logits differ by more than 1e-4, or if any ids differ. It needs torch and transformers in
the environment of this project.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np

from shared.device.accelerator import prepare
from shared.service.settings import read_directories

TOLERANCE = 1e-4
TEXTS = (
    "Once upon a time, there was a little fox who couldn't sleep.",
    "  Don't WE'LL they've  12345 6.78e-9\t\ttabs\n\n\nand lines \n ",
    "naïve café — “quoted” … 日本語 Ελληνικά العربية 🙂👩‍👩‍👧 \u00a0\u2003\u0085\x00\x7f",
    "def f(x):\n    return x  # ###### ------ ======\r\n",
    "",
)


def check(directory: Path) -> bool:
    """Prints the differences; returns whether the folder passes."""
    # Brings MLX in, so not before the accelerator is prepared.
    import mlx.core as mx

    from trainer_service.huggingface.gpt2 import read_config, read_model
    from trainer_service.huggingface.gpt2_tokenizer import read_tokenizer

    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    config = read_config(directory).gpt
    tokens = np.random.default_rng(0).integers(0, config.vocabulary_size, (1, config.context_length))  # (1, T)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()  # (1, T, V)
    ours = np.array(read_model(directory, config)(mx.array(tokens)))  # (1, T, V)
    difference = float(np.abs(ours - expected).max())
    print(
        f"logits    largest difference {difference:.1e}, allowed {TOLERANCE:.0e}; "
        f"largest logit {np.abs(expected).max():.3g}"
    )

    tokenizer, their_tokenizer = (
        read_tokenizer(directory, config.vocabulary_size),
        transformers.GPT2TokenizerFast.from_pretrained(directory),
    )
    other = [text for text in TEXTS if tokenizer.encode(text) != their_tokenizer(text)["input_ids"]]
    print(
        f"token ids equal for {len(TEXTS) - len(other)} of {len(TEXTS)} texts"
        + "".join(f"\n  different for {text!r}" for text in other)
    )
    ends = their_tokenizer.eos_token_id, theirs.config.eos_token_id
    print(f"end token {tokenizer.end_token} in gptloop, {ends[0]} and {ends[1]} in transformers")
    return difference <= TOLERANCE and not other and set(ends) == {tokenizer.end_token}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.benchmarks.transformers_check DIR")
    prepare(read_directories(os.environ).cache / "transformers_check")
    sys.exit(0 if check(Path(sys.argv[1])) else 1)
