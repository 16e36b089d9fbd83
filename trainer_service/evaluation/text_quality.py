"""Measures the loss of a version on a whole text, in windows that overlap.

The end token is put before the text, so that every token is predicted, also the first one. A window of T inputs begins
every `stride` tokens, and the last one ends with the text. Each token counts once, in the first window that predicts
it; there at least T - stride tokens precede it, unless the text begins there.
Shapes: N tokens of text, K windows, B of them in a batch, T tokens of a window, U units.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared.errors import DataError, FailedPrecondition
from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu
from shared.gpt.tokenizer import Tokenizer
from trainer_service.evaluation.record import PositionLoss, TextQuality
from trainer_service.evaluation.statistics import ratio_interval
from trainer_service.training.batches import Tokens
from trainer_service.training.config import MICRO_BATCH_TOKENS
from trainer_service.training.token_losses import TokenLosses
from trainer_service.training.workers import Workers

# Fewer documents than this give no reliable interval, so passages are resampled instead.
_FEWEST_DOCUMENTS = 30
# A batch of windows on a GPU; it depends on nothing else, as bits may depend on the size of a batch.
_GPU_BATCH_TOKENS = 1 << 14
# The first positions of the ranges in `TextQuality.positions`.
_POSITIONS = (0, 32, 128, 512, 2048, 8192, 32768)
# The highest loss whose perplexity is a number.
_HIGHEST_NATS = 700.0


def measure_text(
    model: GPT,
    tokens: Tokens,
    tokenizer: Tokenizer,
    *,
    window: int,
    stride: int,
    workers: Workers,
    report: Callable[[float], object],
) -> TextQuality:
    """Returns the quality of a model on (N,) tokens, computed without dropout by all workers together.

    On a CPU its bits do not depend on the number of workers. `report` receives the share that is done, on any thread;
    an exception from it ends the work. Raises `DataError` if there are no tokens, and `FailedPrecondition` if the loss
    is not finite.
    """
    assert 1 <= stride <= window
    if tokens.size == 0:
        raise DataError("The text to measure is empty; it must have at least one token.")
    starts = _window_starts(tokens.size, window, stride)
    losses, positions = _losses(model, tokens, tokenizer.end_token, starts, window, workers, report)
    nats = float(losses.sum())
    nats_per_token = nats / tokens.size
    if not nats_per_token <= _HIGHEST_NATS:
        raise FailedPrecondition(
            f"The loss of the version is {nats_per_token:,.0f} nats per token, but must be at most "
            f"{_HIGHEST_NATS:.0f}: its weights are damaged, or not those of a trained model."
        )
    unit, units = _units(tokens, tokenizer.end_token, stride)
    unit_nats = np.bincount(units, weights=losses)  # (U,)
    unit_tokens = np.bincount(units)  # (U,)
    return TextQuality(
        nats_per_token=nats_per_token,
        perplexity=math.exp(nats_per_token),
        bits_per_byte=nats / (math.log(2) * max(int(tokenizer.byte_lengths[tokens].sum()), 1)),
        interval=ratio_interval(unit_nats, unit_tokens),
        unit=unit,
        unit_nats=tuple(unit_nats.tolist()),
        unit_tokens=tuple(unit_tokens.tolist()),
        positions=positions,
    )


def _window_starts(size: int, window: int, stride: int) -> NDArray[np.int64]:
    """Returns where each window starts, (K,)."""
    last = max(size - window, 0)
    return np.minimum(np.arange(0, last + stride, stride), last)


def _losses(
    model: GPT,
    tokens: Tokens,
    end_token: int,
    starts: NDArray[np.int64],
    window: int,
    workers: Workers,
    report: Callable[[float], object],
) -> tuple[NDArray[np.float64], tuple[PositionLoss, ...]]:
    """Returns the loss of each token, (N,), and the mean losses by position in all windows."""
    T = min(window, tokens.size)
    rows = max((MICRO_BATCH_TOKENS if on_cpu() else _GPU_BATCH_TOKENS) // T, 1)
    # Where the previous window ended: from there on, a window has the first prediction of a token.
    unseen = np.concatenate([[0], starts[:-1] + T])  # (K,)
    first = [position for position in _POSITIONS if position < T]

    token_losses = TokenLosses(model)

    def measure(batch: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        report(batch / starts.size)
        places = starts[batch : batch + rows, None] + np.arange(T)  # (B, T)
        inputs = np.where(places > 0, tokens[places - 1], end_token)  # (B, T)
        targets = tokens[places]  # (B, T)
        nats = token_losses(inputs.astype(np.int32), targets.astype(np.int32))
        new = nats[places >= unseen[batch : batch + rows, None]]  # (n,)
        return new, np.add.reduceat(nats.sum(axis=0, dtype=np.float64), first)

    measured = workers.map(measure, range(0, starts.size, rows))
    losses = np.concatenate([new for new, _ in measured]).astype(np.float64)  # (N,)
    sums = np.sum([sums for _, sums in measured], axis=0)
    positions = []
    for start, end, nats in zip(first, [*first[1:], T], sums.tolist(), strict=True):
        count = (end - start) * starts.size
        positions.append(PositionLoss(start, end - 1, nats / count, count))
    return losses, tuple(positions)


def _units(tokens: Tokens, end_token: int, stride: int) -> tuple[str, NDArray[np.int64]]:
    """Returns what is resampled, and the number of the unit of each token, (N,)."""
    ends = tokens == end_token
    documents = np.cumsum(ends) - ends  # an end token belongs to the document that it ends
    if documents[-1] + 1 >= _FEWEST_DOCUMENTS:
        return "document", documents
    return "passage", np.arange(tokens.size) // stride
