"""A cache of prompt prefixes of one version, so that prompts with a common prefix compute it once.

It holds copies of keys and values in blocks of SPAN_TOKENS tokens. All tokens up to the end of a block are its key. The
least recently used blocks are removed first, and of one prompt the last ones, because a block is of no use without the
blocks before it.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from shared.decoding.spans import SPAN_TOKENS

Tokens = tuple[int, ...]


class PrefixCache:
    """At most `capacity` blocks."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[Tokens, Any] = OrderedDict()

    def find(self, prompt: Tokens) -> list[Any]:
        """Returns the cached blocks with which a prompt begins, first to last.

        Leaves at least the last token to be computed, because logits are not cached.
        """
        return [self._blocks[prefix] for prefix in self._use(prompt[:-1])]

    def keep(self, tokens: Tokens, read: Callable[[], Any]) -> None:
        """Caches the last block of a prefix of whole blocks, if it is missing and those before it are cached.

        `read` returns the block.
        """
        before = self._use(tokens)
        if len(before) == len(tokens) // SPAN_TOKENS - 1 < self._capacity:
            self._blocks[tokens] = read()
            self._use(tokens)
            if len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Removes all blocks."""
        self._blocks.clear()

    def _use(self, tokens: Tokens) -> list[Tokens]:
        """Returns the keys of the cached blocks of a prefix, shortest first, and marks the shortest as used last."""
        prefixes = (tokens[:end] for end in range(SPAN_TOKENS, len(tokens) + 1, SPAN_TOKENS))
        cached = list(takewhile(self._blocks.__contains__, prefixes))
        for prefix in reversed(cached):
            self._blocks.move_to_end(prefix)
        return cached
