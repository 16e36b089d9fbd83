"""One sample of a request while the engine works on it."""

from collections import defaultdict
from collections.abc import Callable

from inference_service.engine.detokenizer import Detokenizer
from inference_service.engine.request import (
    Delta,
    Draw,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptRead,
)
from shared.decoding.multi_step import DecodeRow
from shared.decoding.sampling import SamplingParameters
from shared.errors import GptloopError


class Sequence:
    """The progress of one sample.

    The keys and values of `computed_tokens` tokens are in its slot, `cached_tokens` of them from the prefix cache.
    """

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        context_length: int,
        end_token: int,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.request = request
        self.index = index
        self.computed_tokens = 0
        self.cached_tokens = 0
        self.admitted_at: float | None = None
        self.generated_tokens = 0
        self.last_token: int | None = None
        # How often each token was drawn, unless only a temperature is needed.
        self.counts: dict[int, int] = defaultdict(int)
        # The decoder then draws for all such sequences at once.
        self.needs_only_temperature = request.sampling == SamplingParameters(temperature=request.sampling.temperature)
        self._most_tokens = min(request.max_tokens, context_length - len(request.prompt))
        self._end_token = end_token
        self._detokenizer = Detokenizer(token_bytes, request.stop)
        self._first_token_at: float | None = None
        # The tokens of the prompt that `unreported` has returned.
        self._reported_prompt = 0

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.computed_tokens >= len(self.request.prompt)

    @property
    def can_decode_multi_step(self) -> bool:
        """Whether the decoder can draw several tokens without the engine in between."""
        return self.needs_only_temperature and self.request.logprobs is None

    @property
    def most_tokens_left(self) -> int:
        """The most tokens that the sequence may still draw."""
        return self._most_tokens - self.generated_tokens

    @property
    def seed(self) -> int:
        """The seed with which this sample draws."""
        return self.request.seed + self.index

    @property
    def masked_token(self) -> int | None:
        """The end token if the request forbids it as the next token."""
        forbidden = self.request.ignore_eos or self.generated_tokens < self.request.min_tokens
        return self._end_token if forbidden else None

    def decode_row(self, slot: int) -> DecodeRow:
        """Returns what a decoder needs to draw several tokens."""
        assert self.last_token is not None
        request = self.request
        return DecodeRow(
            slot=slot,
            start=self.computed_tokens,
            token=self.last_token,
            temperature=request.sampling.temperature,
            seed=self.seed,
            drawn=self.generated_tokens,
            masked=self._end_token,
            masked_draws=request.max_tokens
            if request.ignore_eos
            else max(request.min_tokens - self.generated_tokens, 0),
        )

    def accept(self, draws: tuple[Draw, ...], error: GptloopError | None, now: float) -> list[Event]:
        """Adds the next tokens, up to one that ends the stream, and returns the events that follow.

        An error comes after them, and ends the stream too.
        """
        ends: list[Event] = [] if error is None else [Failed(error)]
        tokens = [draw.token for draw in draws[: self.most_tokens_left]]
        if self._end_token in tokens:
            del tokens[tokens.index(self._end_token) + 1 :]
        text, count = self._detokenizer.add(tokens)
        if not count:
            return ends
        self.generated_tokens += count
        self.last_token = tokens[count - 1]
        if not self.needs_only_temperature:
            for token in tokens[:count]:
                self.counts[token] += 1
        if self._first_token_at is None:
            self._first_token_at = now
        if (reason := self._reason(self.last_token)) is not None:
            text += self._detokenizer.finish()
            ends = [self._finished(reason, now)]
        return [Delta((now,) * count, text, draws[:count]), *ends]

    def unreported(self, read: PromptRead) -> list[Event]:
        """Returns what was read of the prompt, without the tokens of an earlier reading whose slot was lost."""
        known = max(self._reported_prompt - read.start, 0)
        self._reported_prompt += len(read.tokens[known:])
        return [PromptRead(read.start + known, read.tokens[known:])] if read.tokens[known:] else []

    def end(self, reason: FinishReason, now: float) -> list[Event]:
        """Ends the stream from outside and returns its last events, with the text that was held back.

        The reason is STOP if that text completes a stop text.
        """
        rest = self._detokenizer.finish()
        return [*([Delta((), rest, ())] if rest else []), self._finished(reason, now)]

    def _reason(self, token: int) -> FinishReason | None:
        if self._detokenizer.matched_stop is not None:
            return FinishReason.STOP
        if token == self._end_token:
            return FinishReason.EOS
        if self.most_tokens_left > 0:
            return None
        return FinishReason.LENGTH if self.generated_tokens >= self.request.max_tokens else FinishReason.CONTEXT_LENGTH

    def _finished(self, reason: FinishReason, now: float) -> Finished:
        arrived = self.request.arrived
        # The text that was held back can complete a stop text and is then cut, whatever ended the stream.
        stop = self._detokenizer.matched_stop
        return Finished(
            reason=reason if stop is None else FinishReason.STOP,
            matched_stop=stop,
            prompt_tokens=len(self.request.prompt),
            cached_prompt_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            queue_s=None if self.admitted_at is None else self.admitted_at - arrived,
            first_token_s=None if self._first_token_at is None else self._first_token_at - arrived,
            total_s=now - arrived,
        )
