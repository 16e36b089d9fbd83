"""Measures how often a version prefers the right one of two sentences that differ in little.

A sentence is preferred if it is more probable as a whole after an end token, as the beginning of a document.
Source: Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", section 4.
Shapes: B sentences, T tokens of the longest one.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import FailedPrecondition, InvalidArgument, shown
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from trainer_service.evaluation.record import MinimalPairs
from trainer_service.evaluation.statistics import wilson_interval
from trainer_service.text.sentence_pairs import read_pairs
from trainer_service.training.token_losses import TokenLosses
from trainer_service.training.workers import Workers

_PAIRS_TOGETHER = 16


def measure_pairs(
    model: GPT, tokenizer: Tokenizer, path: Path, workers: Workers, report: Callable[[float], object]
) -> MinimalPairs:
    """Returns the share of the pairs in a file in which the model prefers the right sentence.

    `report` receives the share that is done, on any thread; an exception from it ends the work. Raises the errors of
    `read_pairs`, and `InvalidArgument` if a sentence does not fit the context of the model.
    """
    file = read_pairs(path)
    sentences = [tokenizer.encode(sentence) for pair in file.pairs for sentence in (pair.good, pair.bad)]
    context = model.config.context_length
    for index, sentence in enumerate(sentences):
        if len(sentence) > context:
            pair = file.pairs[index // 2]
            raise InvalidArgument(
                f"Line {pair.line:,} of {shown(path.name)} has a sentence of {len(sentence):,} tokens, but the version "
                f"sees at most {context:,} at once."
            )

    token_losses = TokenLosses(model)

    def measure(start: int) -> NDArray[np.bool_]:
        report(start / len(sentences))
        nats = _sentence_nats(token_losses, sentences[start : start + 2 * _PAIRS_TOGETHER], tokenizer.end_token)
        if not np.isfinite(nats).all():
            raise FailedPrecondition("The version computes no finite numbers for the minimal pairs; it is damaged.")
        return nats[::2] < nats[1::2]

    preferred = np.concatenate(workers.map(measure, range(0, len(sentences), 2 * _PAIRS_TOGETHER)))
    right, pairs = int(preferred.sum()), len(file.pairs)
    return MinimalPairs(path.name, file.sha256, pairs, right / pairs, wilson_interval(right, pairs))


def _sentence_nats(token_losses: TokenLosses, sentences: list[list[int]], end_token: int) -> NDArray[np.float64]:
    """Returns the negative logarithm of the probability of each sentence, (B,)."""
    lengths = np.array([len(sentence) for sentence in sentences])
    targets = np.full((len(sentences), lengths.max()), end_token, np.int32)  # (B, T)
    for row, sentence in zip(targets, sentences, strict=True):
        row[: len(sentence)] = sentence
    inputs = np.concatenate([np.full_like(targets[:, :1], end_token), targets[:, :-1]], axis=1)  # (B, T)
    nats = token_losses(inputs, targets).astype(np.float64)  # (B, T)
    inside = np.arange(targets.shape[1]) < lengths[:, None]  # (B, T)
    sums: NDArray[np.float64] = np.where(inside, nats, 0.0).sum(axis=1)
    return sums
