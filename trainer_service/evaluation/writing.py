"""Measures what a version writes, beside what people wrote after the same beginnings.

The server's decoder continues the beginnings of held-out documents, on a CPU in fp32, so that records do not depend on
a setting. A draw has the same number as in the engine, so that a server in fp32 answers the same prompt and seed with
the same text.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.decoding.decoder import Decoder, DecoderFactory
from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.decoding.weight_format import WeightFormat
from shared.errors import FailedPrecondition, shown
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from trainer_service.evaluation.copies import longest_copies
from trainer_service.evaluation.method import Method
from trainer_service.evaluation.record import Continuation, Writing, WritingFigures
from trainer_service.training.batches import Tokens

# Continuations that are written at the same time, at least 2.
_SLOTS = 32
# The share of the time that writing takes; the search for copies takes the rest.
_WRITING_SHARE = 0.8
_REPEATED_GRAM = 4


def measure_writing(
    model: GPT,
    tokenizer: Tokenizer,
    held_out: Tokens,
    training: Tokens | None,
    method: Method,
    *,
    threads: int,
    cache: Path,
    report: Callable[[float], object],
) -> Writing:
    """Continues beginnings of the held-out text (N,) with each seed, and measures the continuations.

    The prompts are the first tokens of documents that are longer than a prompt, evenly spread over them; if they are
    few, also tokens at places that are evenly spread over the text. A prompt takes at most half of the context. A
    continuation ends with the end token, after `max_tokens` draws, or with the context; so do the texts of people. With
    `training` (M,), the longest copies from it are measured. On a CPU, the same arguments give the same bits, whatever
    `threads` is. `report` receives the share that is done; an exception from it ends the work. Raises
    `FailedPrecondition` if the model computes numbers that are not finite, or as `load_library` does.
    """
    context = model.config.context_length
    prompt_tokens = max(min(method.prompt_tokens, context // 2), 1)
    limit = max(min(method.max_tokens, context - prompt_tokens), 1)
    beginnings = _beginnings(held_out, tokenizer.end_token, method.prompts, prompt_tokens, limit)
    wanted = [(beginning.prompt, seed) for seed in method.seeds for beginning in beginnings]
    writing_share = 1.0 if training is None else _WRITING_SHARE
    decoder = DecoderFactory(_SLOTS, threads, cache, WeightFormat.FP32).make(model)
    written: list[_Text] = []
    for first in range(0, len(wanted), _SLOTS):
        rows = _Rows(wanted[first : first + _SLOTS], method.temperature, limit, tokenizer)
        for draw in rows.write(decoder):
            report(writing_share * (first + len(rows.prompts) * draw / limit) / len(wanted))
        written += rows.texts()
    people = [beginning.text for beginning in beginnings]
    texts = [*written, *people]
    copied: Sequence[int | None] = [None] * len(texts)
    if training is not None:
        copied = longest_copies(
            [text.tokens for text in texts],
            training,
            lambda share: report(writing_share + (1 - writing_share) * share),
        )
    by_seed = [written[first : first + len(people)] for first in range(0, len(written), len(people))]
    return Writing(
        model=_figures(by_seed, copied[: len(written)]),
        human=_figures([people], copied[len(written) :]),
        training_tokens=0 if training is None else training.size,
        continuations=tuple(
            Continuation(
                prompt=tokenizer.decode(prompt),
                seed=seed,
                text=tokenizer.decode(text.tokens),
                tokens=len(text.tokens),
                ended=text.ended,
                copied=copy,
            )
            # Copies of people's texts follow those of the written ones.
            for (prompt, seed), text, copy in zip(wanted, written, copied, strict=False)
        ),
    )


@dataclass(frozen=True)
class _Text:
    """Tokens without the end token, and whether it follows them before the limit."""

    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class _Beginning:
    """The beginning of a document, and the text that follows there."""

    prompt: tuple[int, ...]
    text: _Text


def _beginnings(held_out: Tokens, end: int, count: int, prompt_tokens: int, limit: int) -> list[_Beginning]:
    """Returns at most `count` beginnings of documents, or of few documents places within them, and at least one."""
    ends = np.flatnonzero(held_out == end)
    starts = np.concatenate([[0], ends + 1])
    lengths = np.concatenate([ends, [held_out.size]]) - starts
    long = starts[lengths > prompt_tokens]
    if long.size < count:
        spread, needed = np.arange(count) * held_out.size // count, prompt_tokens + limit
        within = [
            at for at in spread.tolist() if at + needed <= held_out.size and end not in held_out[at : at + needed]
        ]
        long = np.union1d(long, within).astype(starts.dtype)
    if long.size:
        count = min(count, long.size)
        chosen = long[np.arange(count) * long.size // count]
    else:
        chosen, prompt_tokens = starts[:1], min(prompt_tokens, held_out.size)
    return [
        _Beginning(tuple(held_out[start:middle].tolist()), _cut(held_out[middle : middle + limit].tolist(), end))
        for start, middle in zip(chosen.tolist(), (chosen + prompt_tokens).tolist(), strict=True)
    ]


def _cut(tokens: list[int], end: int) -> _Text:
    """Returns the text before the first end token."""
    length = tokens.index(end) if end in tokens else len(tokens)
    return _Text(tuple(tokens[:length]), length < len(tokens))


class _Rows:
    """Continuations that a decoder writes at the same time, each in the slot of its number.

    Each of `prompts` holds tokens and a seed.
    """

    def __init__(
        self, prompts: Sequence[tuple[tuple[int, ...], int]], temperature: float, limit: int, tokenizer: Tokenizer
    ) -> None:
        self.prompts = prompts
        self._temperature = temperature
        self._limit = limit
        self._tokenizer = tokenizer
        self._drawn: list[list[int]] = [[] for _ in prompts]

    def write(self, decoder: Decoder) -> Iterator[int]:
        """Draws a token for each row until all have ended; yields the number of the draw."""
        spans = [span for slot, (prompt, _) in enumerate(self.prompts) for span in _spans(slot, prompt)]
        for draw in range(1, self._limit + 1):
            # The last span of a slot counts.
            logits = {span.slot: row for span, row in zip(spans, decoder.forward(spans), strict=True)}
            tokens = decoder.draw(
                [
                    TemperatureSampling(row, self._temperature, self.prompts[slot][1], draw - 1, masked=None)
                    for slot, row in logits.items()
                ]
            )
            spans = []
            for slot, token in zip(logits, tokens, strict=True):
                prompt = self.prompts[slot][0]
                if token is None:
                    text = shown(self._tokenizer.decode(prompt))
                    raise FailedPrecondition(f"The model computes numbers that are not finite after {text}.")
                self._drawn[slot].append(token)
                if token != self._tokenizer.end_token:
                    spans.append(Span(slot, len(prompt) + draw - 1, (token,)))
            yield draw
            if not spans:
                return

    def texts(self) -> list[_Text]:
        """Returns what was written."""
        return [_cut(drawn, self._tokenizer.end_token) for drawn in self._drawn]


def _spans(slot: int, prompt: tuple[int, ...]) -> Iterator[Span]:
    for start in range(0, len(prompt), SPAN_TOKENS):
        yield Span(slot, start, prompt[start : start + SPAN_TOKENS])


def _figures(by_seed: Sequence[Sequence[_Text]], copied: Sequence[int | None]) -> WritingFigures:
    """Returns the figures of texts, grouped by seed."""
    texts = [text for group in by_seed for text in group]
    known = [tokens for tokens in copied if tokens is not None]
    counts = [_distinct([text], _REPEATED_GRAM) for text in texts]
    grams = sum(count for _, count in counts)
    repeated = grams - sum(different for different, _ in counts)
    return WritingFigures(
        texts=len(texts),
        tokens=sum(len(text.tokens) for text in texts),
        distinct=(_share_distinct(by_seed, 1), _share_distinct(by_seed, 2), _share_distinct(by_seed, 3)),
        repeated=repeated / grams if grams else 0.0,
        ended=sum(text.ended for text in texts) / len(texts),
        copied_median=float(statistics.median(known)) if known else None,
        copied_longest=max(known, default=None),
    )


def _share_distinct(by_seed: Sequence[Sequence[_Text]], n: int) -> float:
    """Returns the mean over seeds of the share of different n-grams, which falls as the number of texts grows."""
    counts = [_distinct(texts, n) for texts in by_seed]
    shares = [different / grams for different, grams in counts if grams]
    return statistics.fmean(shares) if shares else 0.0


def _distinct(texts: Sequence[_Text], n: int) -> tuple[int, int]:
    """Returns the number of different n-grams of several texts, and of all of them."""
    grams = [text.tokens[start : start + n] for text in texts for start in range(len(text.tokens) - n + 1)]
    return len(set(grams)), len(grams)
