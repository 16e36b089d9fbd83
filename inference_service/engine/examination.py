"""What a version goes through before it serves: it warms up, and predicts held-out text as it would serve it."""

from collections.abc import Callable, Generator, Sequence

from shared.decoding.decoder import Decoder
from shared.decoding.spans import SCORED_TOKENS, Span

Window = tuple[int, ...]


def examine(decoder: Decoder, windows: Sequence[Window], room: Callable[[], int]) -> Generator[None, None, float]:
    """Warms a decoder up and reads windows of text with it, piece by piece; the mean loss in nats a token at the end.

    A piece is at most `room()` tokens, a multiple of SCORED_TOKENS. The loss is 0 without windows.
    """
    yield from decoder.warm_up()
    losses: list[float] = []
    for window in windows:
        start, end = 0, len(window) - 1
        while start < end:
            length = room()
            if start % length:
                length = SCORED_TOKENS
            piece = window[start : min(start + length, end)]
            losses += decoder.score(Span(0, start, piece), window[start + 1 : start + 1 + len(piece)])
            start += len(piece)
            yield
    decoder.reset()
    return sum(losses) / max(len(losses), 1)
