"""One version's model and its cache: carries out the scheduler's plans. Belongs to the engine's thread.

Shapes: B slots, T tokens, V vocabulary.
"""

from collections.abc import Sequence as Many

import mlx.core as mx
import numpy as np

from inference_service.engine.request import Draw, TokenLogprob
from inference_service.engine.scheduler import Plan
from inference_service.engine.sequence import Sequence
from shared.gpt.cache import KVCache
from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu
from shared.gpt.sampling import Logits, log_probabilities, penalise_repetition, sample


class Runner:
    """A model with a cache of fixed slots. The slots that go through a decode forward never show in a row's numbers.

    At least two slots: a product of one row is computed in another way than that of several, with other last digits.
    """

    def __init__(self, model: GPT, slots: int) -> None:
        assert slots >= 2
        self._model = model
        self._cache = KVCache(model.config, slots)
        self._slots = slots
        self._counts = self._warm_up()

    def run(self, plan: Plan) -> list[tuple[Sequence, Draw | None]]:
        """Carries a plan out: the next token of each sequence that decodes or whose prompt is read to its end.

        None instead of a token where the logits are not finite.
        """
        return [(sequence, draw_token(sequence, row)) for sequence, row in self.forward(plan).items()]

    def forward(self, plan: Plan) -> dict[Sequence, Logits]:
        """The logits (V,) that `run` draws from."""
        logits: dict[Sequence, mx.array] = {}
        for chunk in plan.chunks:
            tokens = mx.array(chunk.sequence.request.prompt[chunk.start : chunk.end])  # (T,)
            after = self._model.prefill(tokens, self._cache, chunk.slot, chunk.start)  # (V,)
            if chunk.end == len(chunk.sequence.request.prompt):
                logits[chunk.sequence] = after
        if plan.rows:
            needed = 1 + max(row.slot for row in plan.rows)
            count = next(count for count in self._counts if count >= needed)
            last = [0] * count
            for row in plan.rows:
                last[row.slot] = row.sequence.generated[-1]
            decoded = self._model.decode(mx.array(last), self._cache, mx.array(plan.positions[:count]))  # (B, V)
        # On a GPU the step's only wait for the device.
        mx.eval(self._cache.arrays, *logits.values(), *([decoded] if plan.rows else []))
        rows = {sequence: np.asarray(array) for sequence, array in logits.items()}
        if plan.rows:
            block = np.asarray(decoded)  # (B, V)
            rows |= {row.sequence: block[row.slot] for row in plan.rows}
        return rows

    def clear(self, slot: int) -> None:
        """Overwrites a slot: what is not finite would reach its next sequence even through the attention mask."""
        for layer in self._cache.layers:
            layer.keys[slot] = 0.0
            layer.values[slot] = 0.0

    def _warm_up(self) -> list[int]:
        """Compiles what the first request would wait for; returns how many slots a decode may have, ascending.

        Fewer than all only where each row has the same bits then, which hangs on how products are computed.
        """
        first = self._model.prefill(mx.array([0]), self._cache, 0, 0)  # (V,)
        tokens = mx.arange(self._slots) % self._model.config.vocabulary_size  # (B,)
        positions = mx.zeros(self._slots, mx.int32)  # (B,)
        logits = self._model.decode(tokens, self._cache, positions)  # (B, V)
        mx.eval(first, logits, self._cache.arrays)
        counts = [1 << power for power in range(1, self._slots.bit_length()) if 1 << power < self._slots]
        if not on_cpu():
            counts = []

        def agrees(count: int) -> bool:
            fewer = self._model.decode(tokens[:count], self._cache, positions[:count])
            return bool(mx.array_equal(fewer, logits[:count]))

        return [*filter(agrees, counts), self._slots]


def draw_token(sequence: Sequence, logits: Logits) -> Draw | None:
    """Draws a sequence's next token from (V,) logits; None where they are not finite."""
    # Either is not a number where any of them is not.
    if not (np.isfinite(logits.max()) and np.isfinite(logits.min())):
        return None
    request = sequence.request
    choice = logits
    if request.sampling.repetition_penalty != 1.0:
        seen = np.array([*request.prompt, *sequence.generated], np.int32)
        choice = penalise_repetition(choice, seen, request.sampling.repetition_penalty)
    if sequence.masked_token is not None:
        choice = choice.copy()
        choice[sequence.masked_token] = -np.inf
    token = sample(choice, request.sampling, request.seed, len(sequence.generated))
    if request.logprobs is None:
        return Draw(token)
    logprobs = log_probabilities(logits)
    likeliest = _likeliest(logprobs, request.logprobs)
    return Draw(
        token, float(logprobs[token]), tuple(TokenLogprob(other, float(logprobs[other])) for other in likeliest)
    )


def _likeliest(logprobs: np.ndarray, count: int) -> Many[int]:
    """The `count` likeliest tokens, likeliest first."""
    if count == 0:
        return []
    candidates = np.argpartition(logprobs, -min(count, logprobs.size))[-count:]
    return [int(token) for token in candidates[np.argsort(-logprobs[candidates], kind="stable")]]
