"""Numbers for the runs of words in a text, the same in every process, so that runs can be compared as arrays."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Grams = NDArray[np.uint64]

_WORD = re.compile(r"\w+")
# An odd number: a product with it keeps all 64 bits of a word's number.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


class WordGrams:
    """Numbers words, and remembers the numbers of all words that it has seen."""

    def __init__(self) -> None:
        self._numbers = _Numbers()

    def of(self, words: Sequence[str], size: int) -> Grams:
        """Returns a number of 64 bits for each run of `size` words, (N - size + 1,), or (0,) for fewer words.

        A number is a polynomial in a constant over the numbers of the words, as in Karp & Rabin 1987.
        """
        numbers = np.fromiter(map(self._numbers.__getitem__, words), dtype=np.uint64, count=len(words))  # (N,)
        count = max(len(words) - size + 1, 0)
        grams = np.zeros(count, dtype=np.uint64)
        for first in range(size if count else 0):
            grams = grams * _MULTIPLIER + numbers[first : first + count]
        return grams


class _Numbers(dict[str, int]):
    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        self[word] = number = int.from_bytes(digest, "little")
        return number
