"""What prompts of one version began with, so that a prompt that begins alike need not be read from its start.

It holds copies of keys and values in blocks of SPAN_TOKENS tokens. A block is found by all tokens up to its end, and
fits wherever it is found. Those that were not used for longest go first, and of one prompt's the last ones, as no block
is found without those before it.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from shared.decoding.spans import SPAN_TOKENS

Tokens = tuple[int, ...]


class PrefixCache:
    """Blocks of prompts. `capacity` is the most that are kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[Tokens, Any] = OrderedDict()

    def find(self, prompt: Tokens) -> list[Any]:
        """What was kept of the blocks with which a prompt begins, first to last. At least its last token is left to be
        read, as only reading gives logits."""
        return [self._blocks[beginning] for beginning in self._use(prompt[:-1])]

    def keep(self, tokens: Tokens, read: Callable[[], Any]) -> None:
        """Keeps the last block of a prompt's beginning, which is whole blocks; it is read only where it is not there,
        and those before it are."""
        before = self._use(tokens)
        if len(before) == len(tokens) // SPAN_TOKENS - 1 < self._capacity:
            self._blocks[tokens] = read()
            self._use(tokens)
            if len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything."""
        self._blocks.clear()

    def _use(self, tokens: Tokens) -> list[Tokens]:
        """The beginnings of tokens that end with a kept block, shortest first; they are used now, the first one
        last."""
        beginnings = (tokens[:end] for end in range(SPAN_TOKENS, len(tokens) + 1, SPAN_TOKENS))
        kept = list(takewhile(self._blocks.__contains__, beginnings))
        for beginning in reversed(kept):
            self._blocks.move_to_end(beginning)
        return kept
