"""One version's decoder: carries out the scheduler's plans and draws. Belongs to the engine's thread.

Shapes: V vocabulary.
"""

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference_service.engine.prefix_cache import PrefixCache
from inference_service.engine.request import Draw, NotFinite, StepFailed, TokenLogprob
from inference_service.engine.scheduler import Chunk, Plan
from inference_service.engine.sequence import Sequence
from shared.decoding.decoder import Decoder
from shared.decoding.sampling import Logits, PlainDraw, adjust, is_finite, log_probabilities, sample
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.errors import GptloopError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class After:
    """A sequence that draws its next token, and from what: logits as the decoder returned them."""

    sequence: Sequence
    slot: int
    logits: Any

    def plain_draw(self) -> PlainDraw:
        """For a sequence that draws plainly."""
        one = self.sequence
        return PlainDraw(self.logits, one.request.sampling.temperature, one.seed, one.generated, one.masked_token)


class Runner:
    """A decoder, and the beginnings of prompts that it has read. A row's numbers never depend on its neighbours."""

    def __init__(self, decoder: Decoder, prefix_blocks: int) -> None:
        self._decoder = decoder
        self._prefixes = PrefixCache(prefix_blocks)

    def reuse(self, first: Sequence, slot: int) -> None:
        """Brings into a slot what an earlier prompt began alike with."""
        for block in self._prefixes.find(first.request.prompt):
            self._decoder.write(slot, first.read, block)
            first.read += SPAN_TOKENS
        first.cached = first.read

    def run(self, plan: Plan) -> list[tuple[Sequence, Draw | GptloopError]]:
        """Carries a plan out: the next token of each sequence that draws, or what keeps this one sequence from it."""
        after = self.forward(plan)
        return list(zip((one.sequence for one in after), self.draw(after), strict=True))

    def forward(self, plan: Plan) -> list[After]:
        """The first half of `run`: what is drawn from."""
        spans, after = [], []
        for chunk in plan.chunks:
            spans.append(Span(chunk.slots[0], chunk.start, chunk.group[0].request.prompt[chunk.start : chunk.end]))
        for row in plan.rows:
            assert row.sequence.last_token is not None
            spans.append(Span(row.slot, row.sequence.read, (row.sequence.last_token,)))
        logits = self._decoder.forward(spans)
        for chunk, end in zip(plan.chunks, logits, strict=False):
            self._keep(chunk)
            if chunk.ends_prompt:
                if len(chunk.group) > 1:
                    self._decoder.copy(chunk.slots[0], chunk.slots[1:], chunk.end)
                after += [After(sequence, slot, end) for sequence, slot in zip(chunk.group, chunk.slots, strict=True)]
        for row, end in zip(plan.rows, logits[len(plan.chunks) :], strict=True):
            after.append(After(row.sequence, row.slot, end))
        return after

    def draw(self, after: Many[After]) -> list[Draw | GptloopError]:
        """The second half of `run`."""
        draws: dict[Sequence, Draw | GptloopError] = {}
        plain = [one for one in after if one.sequence.draws_plainly]
        tokens = self._decoder.draw([one.plain_draw() for one in plain]) if plain else []
        plainly = {one.sequence: token for one, token in zip(plain, tokens, strict=True)}
        for one in after:
            if one.sequence in plainly and one.sequence.request.logprobs is None:
                token = plainly[one.sequence]
                draws[one.sequence] = not_finite(one.sequence) if token is None else Draw(token)
            else:
                logits = np.asarray(one.logits)
                try:
                    draws[one.sequence] = draw_token(one.sequence, logits, plainly.get(one.sequence))
                except Exception as error:
                    logger.exception("drawing for request %s failed", one.sequence.request.id)
                    draws[one.sequence] = StepFailed(f"The next token of this stream could not be drawn: {error!r}.")
            if isinstance(draws[one.sequence], NotFinite):
                self._decoder.clear(one.slot)
                # What is not finite may have been kept before the prompt was read to its end.
                self._prefixes.clear()
        return [draws[one.sequence] for one in after]

    def drop(self, slot: int) -> None:
        """A sequence leaves its slot with its prompt half read: nothing has told whether its numbers are finite."""
        self._decoder.clear(slot)

    def reset(self) -> None:
        """Begins anew: what slots and prefixes hold may be wrong."""
        self._prefixes.clear()
        self._decoder.reset()

    def _keep(self, chunk: Chunk) -> None:
        if chunk.end % SPAN_TOKENS == 0:
            slot, start, end = chunk.slots[0], chunk.end - SPAN_TOKENS, chunk.end
            self._prefixes.keep(chunk.group[0].request.prompt[:end], lambda: self._decoder.read(slot, start, end))


def not_finite(sequence: Sequence) -> NotFinite:
    """The error of a sequence from whose logits nothing can be drawn."""
    return NotFinite(f"Version {sequence.request.version} computes no finite numbers for this text.")


def draw_token(sequence: Sequence, logits: Logits, token: int | None) -> Draw | NotFinite:
    """Draws a sequence's next token from (V,) logits, unless it is drawn already, and tells what the request asks."""
    if not is_finite(logits):
        return not_finite(sequence)
    request = sequence.request
    if token is None:
        choice = adjust(logits, request.sampling, request.prompt, sequence.counts)
        if sequence.masked_token is not None:
            choice = choice.copy()
            choice[sequence.masked_token] = -np.inf
        token = sample(choice, request.sampling, sequence.seed, sequence.generated)
    if request.logprobs is None:
        return Draw(token)
    logprobs = log_probabilities(logits)
    return Draw(
        token,
        float(logprobs[token]),
        int(np.count_nonzero(logits > logits[token])) + 1,
        tuple(TokenLogprob(other, float(logprobs[other])) for other in _likeliest(logprobs, request.logprobs)),
    )


def _likeliest(logprobs: np.ndarray, count: int) -> Many[int]:
    """The `count` likeliest tokens, likeliest first."""
    if count == 0:
        return []
    candidates = np.argpartition(logprobs, -min(count, logprobs.size))[-count:]
    return [int(token) for token in candidates[np.argsort(-logprobs[candidates], kind="stable")]]
