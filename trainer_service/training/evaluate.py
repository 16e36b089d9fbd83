"""Measures the held-out loss, always on the same windows and without dropout.

Shapes: N windows, T tokens of context, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from shared.version_format import MAX_WINDOWS
from trainer_service.training.batches import Tokens
from trainer_service.training.token_losses import TokenLosses
from trainer_service.training.workers import Workers


@dataclass(frozen=True)
class EvaluationSet:
    """Windows (N, T+1) of held-out tokens, the number of text bytes in their targets, and a digest of the set."""

    windows: Tokens
    target_bytes: int
    digest: str

    @classmethod
    def from_tokens(cls, tokens: Tokens, tokenizer: Tokenizer, *, windows: int, context_length: int) -> "EvaluationSet":
        """Makes a set of the first adjacent windows of the held-out tokens, at most `windows`."""
        count = min(windows, (tokens.size - 1) // context_length)
        starts = np.arange(count) * context_length
        chosen = np.stack([tokens[start : start + context_length + 1] for start in starts])  # (N, T+1)
        digest = hashlib.sha256(f"{tokenizer.digest} {chosen.shape}".encode() + chosen.tobytes()).hexdigest()
        return cls(chosen, int(tokenizer.byte_lengths[chosen[:, 1:]].sum()), digest)

    @property
    def carried(self) -> Tokens:
        """The windows that are stored in a version."""
        return self.windows[:MAX_WINDOWS]


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a model on the evaluation set.

    `claimed` is the loss on the carried windows only. Bits per byte divide the loss of all targets, including end
    tokens, by the bytes of text, which makes different tokenizers comparable.
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
    """Returns the loss on the whole set, computed on `rows` windows at a time by all workers together.

    `report` receives the share that is done, on any thread; an exception from it ends the evaluation.
    """
    windows = evaluation_set.windows
    token_losses = TokenLosses(model)
    share = -(-rows // workers.count)

    def losses_from(start: int) -> NDArray[np.float64]:
        report(start / len(windows))
        tokens = windows[start : start + share].astype(np.int32)
        losses: NDArray[np.float64] = token_losses(tokens[:, :-1], tokens[:, 1:]).mean(axis=1, dtype=np.float64)
        return losses  # (N,)

    losses = np.concatenate(workers.map(losses_from, range(0, len(windows), share)))
    tokens = windows[:, 1:].size
    nats = float(losses.mean()) * tokens
    return HeldOutLoss(
        nats_per_token=nats / tokens,
        bits_per_byte=nats / (math.log(2) * max(evaluation_set.target_bytes, 1)),
        claimed=float(losses[:MAX_WINDOWS].mean()),
    )
