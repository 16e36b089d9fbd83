"""Multi-step decoding: a decoder draws several tokens for each slot, and its caller goes on only after the last."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import Span

# The most steps at a time.
MAX_DECODE_STEPS = 8


class DecodeRow(NamedTuple):
    """A slot that decodes: its last token, at position `start`, is not computed yet.

    Step i draws as `TemperatureSampling` does at the position `drawn` + i, and cannot draw `masked` while i is below
    `masked_draws`.
    """

    slot: int
    start: int
    token: int
    temperature: float
    seed: int
    drawn: int
    masked: int
    masked_draws: int

    def draw(self, logits: Any, step: int) -> TemperatureSampling:
        """Returns the draw of a step, from 0 on."""
        masked = self.masked if step < self.masked_draws else None
        return TemperatureSampling(logits, self.temperature, self.seed, self.drawn + step, masked)


class SingleStepDecoder(Protocol):
    """What `decode_step_by_step` uses of a decoder."""

    def forward(self, spans: Sequence[Span]) -> Sequence[Any]:
        """As in `Decoder`."""

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """As in `Decoder`."""


def decode_step_by_step(
    decoder: SingleStepDecoder, rows: Sequence[DecodeRow], steps: int, context_length: int
) -> list[list[int | None]]:
    """Decodes as `Decoder.decode` does, one step after the other."""
    drawn: list[list[int | None]] = [[] for _ in rows]
    # The last token of each row that goes on.
    last = {number: row.token for number, row in enumerate(rows)}
    for step in range(steps):
        last = {number: token for number, token in last.items() if rows[number].start + step < context_length}
        if not last:
            break
        spans = [Span(rows[number].slot, rows[number].start + step, (token,)) for number, token in last.items()]
        logits = decoder.forward(spans)
        tokens = decoder.draw([rows[number].draw(each, step) for number, each in zip(last, logits, strict=True)])
        for number, token in zip(list(last), tokens, strict=True):
            drawn[number].append(token)
            if token is None:
                del last[number]
            else:
                last[number] = token
    return drawn
