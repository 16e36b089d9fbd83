"""One sample of a request while the engine works on it."""

from collections import Counter
from collections.abc import Callable

from inference_service.engine.detokenizer import Detokenizer
from inference_service.engine.request import Delta, Draw, Event, Finished, FinishReason, GenerationRequest
from shared.decoding.sampling import SamplingParameters


class Sequence:
    """How far one sample has come. `read` tokens of it are in its slot, `cached` of them from an earlier request."""

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        context_length: int,
        end_token: int,
        piece: Callable[[int], bytes],
    ) -> None:
        self.request = request
        self.index = index
        self.read = 0
        self.cached = 0
        self.admitted_at: float | None = None
        self.generated = 0
        self.last_token: int | None = None
        # How often each token was generated.
        self.counts: Counter[int] = Counter()
        # Whether a draw takes nothing but a temperature.
        self.draws_plainly = request.sampling == SamplingParameters(temperature=request.sampling.temperature)
        self._context_length = context_length
        self._end_token = end_token
        self._detokenizer = Detokenizer(piece, request.stop)
        self._first_token_at: float | None = None

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt was read."""
        return self.read >= len(self.request.prompt)

    @property
    def seed(self) -> int:
        """The seed that this sample draws with."""
        return self.request.seed + self.index

    @property
    def masked_token(self) -> int | None:
        """The token that must not be drawn next: the end token where the request forbids it."""
        forbidden = self.request.ignore_eos or self.generated < self.request.min_tokens
        return self._end_token if forbidden else None

    def accept(self, draw: Draw, now: float) -> list[Event]:
        """Takes the next token; what the stream shows of it, up to its end where this token ends it."""
        if self._first_token_at is None:
            self._first_token_at = now
        self.generated += 1
        self.last_token = draw.token
        self.counts[draw.token] += 1
        text = self._detokenizer.add(draw.token)
        reason = self._reason(draw.token)
        if reason is None:
            return [Delta((now,), text, (draw,))]
        return [Delta((now,), text + self._detokenizer.finish(), (draw,)), self._finished(reason, now)]

    def end(self, reason: FinishReason, now: float) -> list[Event]:
        """Ends from outside; the text that was held back comes first. Where that completes a stop text, the reason is
        STOP."""
        rest = self._detokenizer.finish()
        return [*([Delta((), rest, ())] if rest else []), self._finished(reason, now)]

    def _reason(self, token: int) -> FinishReason | None:
        if self._detokenizer.matched_stop is not None:
            return FinishReason.STOP
        if token == self._end_token:
            return FinishReason.EOS
        if self.generated >= self.request.max_tokens:
            return FinishReason.LENGTH
        if len(self.request.prompt) + self.generated >= self._context_length:
            return FinishReason.CONTEXT_LENGTH
        return None

    def _finished(self, reason: FinishReason, now: float) -> Finished:
        arrived = self.request.arrived
        # What was held back can complete a stop text too. Whatever ended the stream, its text is cut then.
        stop = self._detokenizer.matched_stop
        return Finished(
            reason=reason if stop is None else FinishReason.STOP,
            matched_stop=stop,
            prompt_tokens=len(self.request.prompt),
            cached_prompt_tokens=self.cached,
            generated_tokens=self.generated,
            queue_s=None if self.admitted_at is None else self.admitted_at - arrived,
            first_token_s=None if self._first_token_at is None else self._first_token_at - arrived,
            total_s=now - arrived,
        )
