"""What prompts of one version began with, so that a prompt that begins alike need not be read from its start.

It holds copies of keys and values in blocks of SPAN_TOKENS tokens. A block is found by its own tokens and the block
before it, so by all tokens up to its end, and fits wherever it is found. Those that were not used for longest go first,
and of one prompt's the last ones, as no block is found without those before it.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

from shared.gpt.spans import SPAN_TOKENS

Tokens = tuple[int, ...]

# What a prompt's first block follows.
_START = 0


class _Key(NamedTuple):
    before: int
    tokens: Tokens


class _Block(NamedTuple):
    number: int
    piece: Any


class PrefixCache:
    """Blocks of prompts. `capacity` is the most that are kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._numbers = count(_START + 1)
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()

    def find(self, prompt: Tokens) -> list[Any]:
        """What was kept of the blocks with which a prompt begins, first to last. At least its last token is left to be
        read, as only reading gives logits."""
        return [block.piece for block in self._use(prompt[:-1])]

    def keep(self, tokens: Tokens, read: Callable[[], Any]) -> None:
        """Keeps the last block of a prompt's beginning, which is whole blocks; it is read only where it is not there,
        and those before it are."""
        before = self._use(tokens)
        if len(before) == len(tokens) // SPAN_TOKENS - 1 < self._capacity:
            key = _Key(before[-1].number if before else _START, tokens[-SPAN_TOKENS:])
            self._blocks[key] = _Block(next(self._numbers), read())
            self._use(tokens)
            if len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything."""
        self._blocks.clear()

    def _use(self, tokens: Tokens) -> list[_Block]:
        """The blocks with which tokens begin, first to last; they are used now, the first one last."""
        keys: list[_Key] = []
        blocks: list[_Block] = []
        for start in range(0, len(tokens) - SPAN_TOKENS + 1, SPAN_TOKENS):
            key = _Key(blocks[-1].number if blocks else _START, tokens[start : start + SPAN_TOKENS])
            if key not in self._blocks:
                break
            keys.append(key)
            blocks.append(self._blocks[key])
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return blocks
