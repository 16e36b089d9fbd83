"""The order in which a run reads a text: epoch by epoch, its documents shuffled, cut into windows, and these shuffled.

Shapes: N tokens of text, D documents, T tokens of context, B windows.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Tokens that are searched for ends of documents at a time, so that a text of gigabytes stays on the disk.
_SEARCHED = 1 << 24


@dataclass(frozen=True)
class _Epoch:
    """An epoch: where each of the shuffled documents begins in the text and ends in the epoch, (D,) each, the place in
    the epoch at which its first window begins, and the order of its windows."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    offset: int
    order: NDArray[np.int64]


class DocumentOrder:
    """The windows of a text (N,), numbered from 0 without an end; a pure function of the text and the seed.

    In an epoch each document stands once, whole, in a random order. The windows begin at a random place, so that they
    are cut elsewhere each time, and are read in a random order, so that a batch has windows of many documents, even of
    a text with few. Less than two windows of an epoch are left out.
    """

    def __init__(self, tokens: NDArray[np.uint16], end_token: int, context_length: int, seed: tuple[int, ...]) -> None:
        assert tokens.size > context_length
        self._tokens = tokens.size
        self._context_length = context_length
        self._seed = seed
        self._begins = _begins(tokens, end_token)  # (D,)
        self._lengths = np.diff(self._begins, append=tokens.size)  # (D,)
        # The last window has one token more than the others, its last target.
        self.windows_per_epoch = max((tokens.size - context_length) // context_length, 1)
        # A step may have windows of two epochs.
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def positions(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the positions (B, T+1) in the text of the tokens of some windows (B,)."""
        epochs, places = np.divmod(windows, self.windows_per_epoch)
        positions = np.empty((windows.size, self._context_length + 1), np.int64)
        for number in np.unique(epochs):
            epoch, rows = self._epoch(int(number)), epochs == number
            starts = epoch.offset + epoch.order[places[rows]] * self._context_length
            wanted = starts[:, None] + np.arange(self._context_length + 1)  # (b, T+1)
            documents = np.searchsorted(epoch.ends, wanted, side="right")
            # Counted from the end of its document, which begins where the one before it ends.
            first = np.where(documents > 0, epoch.ends[documents - 1], 0)
            positions[rows] = epoch.begins[documents] + wanted - first
        return positions

    def _draw(self, number: int) -> _Epoch:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((*self._seed, number))))
        documents = generator.permutation(self._begins.size)
        left = self._tokens - self.windows_per_epoch * self._context_length
        return _Epoch(
            begins=self._begins[documents],
            ends=np.cumsum(self._lengths[documents]),
            offset=int(generator.integers(min(left, self._context_length))),
            order=generator.permutation(self.windows_per_epoch),
        )


def _begins(tokens: NDArray[np.uint16], end_token: int) -> NDArray[np.int64]:
    """Returns where the documents of a text begin (D,): at its first token, and after each end token but the last."""
    found = [np.zeros(1, np.int64)]
    for first in range(0, tokens.size - 1, _SEARCHED):
        some = tokens[first : min(first + _SEARCHED, tokens.size - 1)]
        found.append(np.flatnonzero(some == end_token) + first + 1)
    return np.concatenate(found)
