"""Runs the plans of the scheduler on one version's decoder, and draws. Belongs to the engine's thread.

Shapes: V vocabulary.
"""

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inference_service.engine.prefix_cache import PrefixCache
from inference_service.engine.request import Draw, NotFinite, PromptRead, StepFailed, TokenLogprob, plain_draw
from inference_service.engine.scheduler import Chunk, Plan
from inference_service.engine.sequence import Sequence
from shared.decoding.decoder import Decoder
from shared.decoding.sampling import Logits, TemperatureSampling, adjust, is_finite, log_probabilities, sample
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.errors import GptloopError

logger = logging.getLogger(__name__)


class NextTokens(NamedTuple):
    """The next tokens of a sequence, and the error that ends it after them."""

    draws: tuple[Draw, ...]
    error: GptloopError | None = None


@dataclass(frozen=True)
class Drawing:
    """A sequence that draws its next token, and the logits from which it draws, as the decoder returned them."""

    sequence: Sequence
    slot: int
    logits: Any

    def temperature_sampling(self) -> TemperatureSampling:
        """Returns the parameters for a sequence that needs only a temperature."""
        one = self.sequence
        return TemperatureSampling(
            self.logits, one.request.sampling.temperature, one.seed, one.generated_tokens, one.masked_token
        )


class Runner:
    """A decoder and its cache of prompt prefixes. The numbers of a row never depend on the rows beside it."""

    def __init__(self, decoder: Decoder, prefix_blocks: int) -> None:
        self._decoder = decoder
        self._prefixes = PrefixCache(prefix_blocks)

    def reuse(self, first: Sequence, slot: int) -> None:
        """Copies cached prefix blocks into a slot, unless the request wants the log-probabilities of its prompt."""
        if first.request.prompt_logprobs is not None:
            return
        for block in self._prefixes.find(first.request.prompt):
            self._decoder.write(slot, first.computed_tokens, block)
            first.computed_tokens += SPAN_TOKENS
        first.cached_tokens = first.computed_tokens

    @property
    def max_decode_steps(self) -> int:
        """The most tokens that a sequence should draw in one plan."""
        return self._decoder.max_decode_steps

    def run(self, plan: Plan) -> list[tuple[Sequence, PromptRead | NextTokens]]:
        """Carries a plan out; returns what was read of prompts, and what each sequence draws."""
        if plan.multi_step:
            return self._decode_multi_step(plan)
        reads, drawings = self.forward(plan)
        draws = self.draw(drawings)
        tokens = [NextTokens((draw,)) if isinstance(draw, Draw) else NextTokens((), draw) for draw in draws]
        return [*reads, *((one.sequence, each) for one, each in zip(drawings, tokens, strict=True))]

    def forward(self, plan: Plan) -> tuple[list[tuple[Sequence, PromptRead]], list[Drawing]]:
        """Computes the logits, the first half of `run`."""
        spans, ends, reads, drawings = list[Span](), dict[Chunk, Any](), [], list[Drawing]()
        for chunk in plan.chunks:
            first = chunk.group[0]
            span = Span(chunk.slots[0], chunk.start, first.request.prompt[chunk.start : chunk.end])
            if first.request.prompt_logprobs is None:
                spans.append(span)
            else:
                logits, ends[chunk] = self._decoder.logits(span)
                reads.append((first, _read_prompt(chunk, logits)))
        for row in plan.rows:
            assert row.sequence.last_token is not None
            spans.append(Span(row.slot, row.sequence.computed_tokens, (row.sequence.last_token,)))
        computed = iter(self._decoder.forward(spans) if spans else ())
        for chunk in plan.chunks:
            end = ends[chunk] if chunk in ends else next(computed)
            self._keep(chunk)
            if chunk.ends_prompt:
                if len(chunk.group) > 1:
                    self._decoder.copy(chunk.slots[0], chunk.slots[1:], chunk.end)
                drawings += [
                    Drawing(sequence, slot, end) for sequence, slot in zip(chunk.group, chunk.slots, strict=True)
                ]
        for row, end in zip(plan.rows, computed, strict=True):
            drawings.append(Drawing(row.sequence, row.slot, end))
        return reads, drawings

    def draw(self, drawings: Many[Drawing]) -> list[Draw | GptloopError]:
        """Draws the tokens, the second half of `run`."""
        draws: dict[Sequence, Draw | GptloopError] = {}
        together = [one for one in drawings if one.sequence.needs_only_temperature]
        tokens = self._decoder.draw([one.temperature_sampling() for one in together]) if together else []
        drawn = {one.sequence: token for one, token in zip(together, tokens, strict=True)}
        for one in drawings:
            if one.sequence in drawn and one.sequence.request.logprobs is None:
                token = drawn[one.sequence]
                draws[one.sequence] = not_finite(one.sequence) if token is None else plain_draw(token)
            else:
                logits = np.asarray(one.logits)
                try:
                    draws[one.sequence] = draw_token(one.sequence, logits, drawn.get(one.sequence))
                except Exception as error:
                    request = one.sequence.request
                    ids = {"request_id": request.call_id, "version": request.version}
                    logger.exception("drawing a token failed", extra={"ids": ids})
                    draws[one.sequence] = StepFailed(f"The next token of this stream could not be drawn: {error!r}.")
            if isinstance(draws[one.sequence], NotFinite):
                self._discard_not_finite(one.slot)
        return [draws[one.sequence] for one in drawings]

    def _decode_multi_step(self, plan: Plan) -> list[tuple[Sequence, PromptRead | NextTokens]]:
        """Carries out a plan of rows that draw several tokens."""
        rows = [row.sequence.decode_row(row.slot) for row in plan.rows]
        results = list[tuple[Sequence, PromptRead | NextTokens]]()
        drawn = self._decoder.decode(rows, plan.decode_steps, plan.next_decode_steps)
        for row, tokens in zip(plan.rows, drawn, strict=True):
            error = None
            if tokens[-1] is None:
                self._discard_not_finite(row.slot)
                error = not_finite(row.sequence)
            draws = tuple(plain_draw(token) for token in tokens if token is not None)
            results.append((row.sequence, NextTokens(draws, error)))
        return results

    def _discard_not_finite(self, slot: int) -> None:
        """Clears a slot with numbers that are not finite, and all cached prefixes."""
        self._decoder.clear(slot)
        # A block that is not finite may have been cached before the prompt was complete.
        self._prefixes.clear()

    def drop(self, slot: int) -> None:
        """Clears the slot of a sequence that ends before its prompt is complete: its numbers may not be finite."""
        self._decoder.clear(slot)

    def reset(self) -> None:
        """Discards the content of slots and cached prefixes, because it may be wrong."""
        self._prefixes.clear()
        self._decoder.reset()

    def _keep(self, chunk: Chunk) -> None:
        if chunk.end % SPAN_TOKENS == 0:
            slot, start, end = chunk.slots[0], chunk.end - SPAN_TOKENS, chunk.end
            self._prefixes.keep(chunk.group[0].request.prompt[:end], lambda: self._decoder.read(slot, start, end))


def not_finite(sequence: Sequence) -> NotFinite:
    """Returns the error for a sequence whose logits are not finite."""
    return NotFinite(f"Version {sequence.request.version} computes no finite numbers for this text.")


def draw_token(sequence: Sequence, logits: Logits, token: int | None) -> Draw | NotFinite:
    """Draws a sequence's next token from (V,) logits, unless `token` is drawn already; adds the log-probabilities that
    the request asks for."""
    if not is_finite(logits):
        return not_finite(sequence)
    request = sequence.request
    if token is None:
        choice = adjust(logits, request.sampling, request.prompt, sequence.counts)
        if sequence.masked_token is not None:
            choice = choice.copy()
            choice[sequence.masked_token] = -np.inf
        token = sample(choice, request.sampling, sequence.seed, sequence.generated_tokens)
    return Draw(token) if request.logprobs is None else _with_logprobs(token, logits, request.logprobs)


def _read_prompt(chunk: Chunk, logits: Logits) -> PromptRead:
    """Returns the token after each of a chunk, whose logits are (T, V); the first chunk adds its own first token.

    A token has no log-probabilities if the logits are not finite; then the stream ends with an error when it draws.
    """
    request = chunk.group[0].request
    assert request.prompt_logprobs is not None
    tokens = [
        _with_logprobs(token, row, request.prompt_logprobs) if is_finite(row) else Draw(token)
        for token, row in zip(request.prompt[chunk.start + 1 : chunk.end + 1], logits, strict=False)
    ]
    if chunk.start == 0:
        return PromptRead(0, (Draw(request.prompt[0]), *tokens))
    return PromptRead(chunk.start + 1, tuple(tokens))


def _with_logprobs(token: int, logits: Logits, count: int) -> Draw:
    """Returns a token with its log-probability and those of the `count` likeliest ones, by (V,) logits."""
    logprobs = log_probabilities(logits)
    return Draw(
        token,
        float(logprobs[token]),
        int(np.count_nonzero(logits > logits[token])) + 1,
        tuple(TokenLogprob(other, float(logprobs[other])) for other in _likeliest(logprobs, count)),
    )


def _likeliest(logprobs: np.ndarray, count: int) -> Many[int]:
    """Returns the `count` likeliest tokens, likeliest first."""
    if count == 0:
        return []
    candidates = np.argpartition(logprobs, -min(count, logprobs.size))[-count:]
    return [int(token) for token in candidates[np.argsort(-logprobs[candidates], kind="stable")]]
