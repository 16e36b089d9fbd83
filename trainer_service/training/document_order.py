"""The order in which a run reads a text: epoch by epoch, its documents shuffled, cut into windows, and these shuffled.

Shapes: N tokens of text, D documents, T tokens of context, B windows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Tokens that are searched for ends of documents at a time, so that a text of gigabytes stays on the disk.
_SEARCHED = 1 << 24


@dataclass(frozen=True)
class _Epoch:
    """An epoch, with its number.

    ends, shifts: for each of the shuffled documents, (D,), where it ends in the epoch, and how many tokens later than
      in the epoch it stands in the text.
    offset: where the first window begins in the epoch.
    order: the places of the windows in the order in which they are read.
    """

    number: int
    ends: NDArray[np.int64]
    shifts: NDArray[np.int64]
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
        self._epoch = self._draw(0)

    def positions(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the positions (B, T+1) in the text of the tokens of some windows (B,)."""
        epochs, places = np.divmod(windows, self.windows_per_epoch)
        positions = np.empty((windows.size, self._context_length + 1), np.int64)
        for number in np.unique(epochs):
            if number != self._epoch.number:
                self._epoch = self._draw(int(number))
            epoch, rows = self._epoch, epochs == number
            starts = epoch.offset + epoch.order[places[rows]] * self._context_length
            wanted = starts[:, None] + np.arange(self._context_length + 1)  # (b, T+1)
            positions[rows] = wanted + epoch.shifts[np.searchsorted(epoch.ends, wanted, side="right")]
        return positions

    def _draw(self, number: int) -> _Epoch:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((*self._seed, number))))
        documents = generator.permutation(self._begins.size)
        begins, lengths = self._begins[documents], self._lengths[documents]
        ends = np.cumsum(lengths)
        left = self._tokens - self.windows_per_epoch * self._context_length
        return _Epoch(
            number=number,
            ends=ends,
            shifts=begins - (ends - lengths),
            offset=int(generator.integers(min(left, self._context_length))),
            order=generator.permutation(self.windows_per_epoch),
        )


def _begins(tokens: NDArray[np.uint16], end_token: int) -> NDArray[np.int64]:
    """Returns where the documents of a text begin (D,): at its first token, and after each end token but the last."""
    found = [np.zeros(1, np.int64)]
    for first in range(0, tokens.size, _SEARCHED):
        some = tokens[first : min(first + _SEARCHED, tokens.size - 1)]
        found.append(np.flatnonzero(some == end_token) + first + 1)
    return np.concatenate(found)
