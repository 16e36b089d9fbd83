"""The input of a decoder. Importing this loads no model framework."""

from dataclasses import dataclass

# The most tokens in a span.
SPAN_TOKENS = 64
# The fewest tokens that are scored at a time, except at the end of a text.
SCORED_TOKENS = 16


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a slot, at least one, of which the first is at position `start`."""

    slot: int
    start: int
    tokens: tuple[int, ...]
