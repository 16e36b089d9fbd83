"""Held-out evaluation: always the same windows, dropout off.

Shapes: N windows, T tokens of context, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from shared.version_format import MAX_WINDOWS
from trainer_service.training.batches import Tokens
from trainer_service.training.loss import window_losses
from trainer_service.training.workers import Workers


@dataclass(frozen=True)
class EvaluationSet:
    """Windows (N, T+1) of held-out tokens, the bytes of text that their targets spell, and a name for all of it."""

    windows: Tokens
    target_bytes: int
    digest: str

    @classmethod
    def from_tokens(cls, tokens: Tokens, tokenizer: Tokenizer, *, windows: int, context_length: int) -> "EvaluationSet":
        """The first windows of the held-out tokens, side by side; as many as there are, up to `windows`."""
        count = min(windows, (tokens.size - 1) // context_length)
        starts = np.arange(count) * context_length
        chosen = np.stack([tokens[start : start + context_length + 1] for start in starts])  # (N, T+1)
        digest = hashlib.sha256(f"{tokenizer.digest} {chosen.shape}".encode() + chosen.tobytes()).hexdigest()
        return cls(chosen, int(tokenizer.byte_lengths[chosen[:, 1:]].sum()), digest)

    @property
    def carried(self) -> Tokens:
        """The windows that go into a version."""
        return self.windows[:MAX_WINDOWS]


@dataclass(frozen=True)
class HeldOutLoss:
    """How well a model predicts the evaluation set.

    `claimed` is the loss on the carried windows alone. Bits per byte count every target's nats, also those of
    end tokens, over the bytes of text, so that tokenizers compare.
    """

    nats_per_token: float
    bits_per_byte: float
    claimed: float


def evaluate(
    model: GPT,
    evaluation_set: EvaluationSet,
    rows: int,
    workers: Workers,
    report: Callable[[float], object] = lambda _: None,
) -> HeldOutLoss:
    """The loss on the whole set, `rows` windows at a time by all workers; leaves the model in the mode it was in.

    `report` is told the share that is done, from any thread; what it raises ends the evaluation.
    """
    windows = evaluation_set.windows
    was_training = model.training
    model.eval()
    mx.eval(model.parameters())
    share = -(-rows // workers.count)

    def losses_from(start: int) -> NDArray[np.float64]:
        report(start / len(windows))
        return _window_losses(model, windows[start : start + share])

    try:
        losses = np.concatenate(workers.map(losses_from, range(0, len(windows), share)))
    finally:
        model.train(was_training)
    tokens = windows[:, 1:].size
    nats = float(losses.mean()) * tokens
    return HeldOutLoss(
        nats_per_token=nats / tokens,
        bits_per_byte=nats / (math.log(2) * max(evaluation_set.target_bytes, 1)),
        claimed=float(losses[:MAX_WINDOWS].mean()),
    )


def _window_losses(model: GPT, windows: Tokens) -> NDArray[np.float64]:
    tokens = mx.array(windows.astype(np.int32))
    return np.array(window_losses(model, tokens[:, :-1], tokens[:, 1:]), dtype=np.float64)  # (N,)
