"""What a decoder reads. Importing this loads no model framework."""

from dataclasses import dataclass

# The most tokens of a span.
SPAN_TOKENS = 64
# The fewest tokens that are scored at a time, but at the end of a text.
SCORED_TOKENS = 16


@dataclass(frozen=True)
class Span:
    """Tokens, at least one, that follow one another in a slot from position `start` on."""

    slot: int
    start: int
    tokens: tuple[int, ...]
