"""Several tokens of a slot in a row, of which each is drawn by a temperature alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import Span

# The most tokens of a slot in a row.
MOST_STEPS = 8


@dataclass(frozen=True)
class Continuation:
    """A slot whose last token, at position `start`, is not computed yet.

    Its draws are those of `TemperatureSampling` with the positions from `drawn` on; `masked` is not drawn in the first
    `masked_draws` of them.
    """

    slot: int
    start: int
    token: int
    temperature: float
    seed: int
    drawn: int
    masked: int | None
    masked_draws: int

    def draw(self, logits: Any, step: int) -> TemperatureSampling:
        """Returns the draw of a step, from 0 on."""
        masked = self.masked if step < self.masked_draws else None
        return TemperatureSampling(logits, self.temperature, self.seed, self.drawn + step, masked)


class Draws(Protocol):
    """What `decode_in_turn` uses of a decoder."""

    def forward(self, spans: Sequence[Span]) -> Sequence[Any]:
        """As in `Decoder`."""

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """As in `Decoder`."""


def decode_in_turn(
    decoder: Draws, rows: Sequence[Continuation], steps: int, context_length: int
) -> list[list[int | None]]:
    """Decodes as `Decoder.decode` does, one step after the other."""
    drawn: list[list[int | None]] = [[] for _ in rows]
    for step in range(steps):
        going = [
            number
            for number, row in enumerate(rows)
            if row.start + step < context_length and (not step or drawn[number][-1] is not None)
        ]
        if not going:
            break
        last = [(drawn[number][-1] if step else None, rows[number]) for number in going]
        spans = [Span(row.slot, row.start + step, (row.token if token is None else token,)) for token, row in last]
        logits = decoder.forward(spans)
        tokens = decoder.draw([rows[number].draw(each, step) for number, each in zip(going, logits, strict=True)])
        for number, token in zip(going, tokens, strict=True):
            drawn[number].append(token)
    return drawn
