"""Examines a version before it serves: warms up its decoder and measures the loss of held-out text with it."""

from collections.abc import Callable, Generator, Sequence

from shared.decoding.decoder import Decoder
from shared.decoding.spans import SCORED_TOKENS, Span

Window = tuple[int, ...]


def examine(
    decoder: Decoder, windows: Sequence[Window], chunk_tokens: Callable[[], int]
) -> Generator[None, None, float]:
    """Warms a decoder up and scores windows of text, chunk by chunk; returns the mean loss in nats per token.

    A chunk has at most `chunk_tokens()` tokens, a multiple of SCORED_TOKENS. The loss is 0 if there are no windows.
    """
    yield from decoder.warm_up()
    losses: list[float] = []
    for window in windows:
        start, end = 0, len(window) - 1
        while start < end:
            length = chunk_tokens()
            if start % length:
                length = SCORED_TOKENS
            chunk = window[start : min(start + length, end)]
            losses += decoder.score(Span(0, start, chunk), window[start + 1 : start + 1 + len(chunk)])
            start += len(chunk)
            yield
    decoder.reset()
    return sum(losses) / max(len(losses), 1)
