"""Finds near-duplicates among texts: those with about the same runs of words as an earlier text.

The similarity of two texts is that of their sets of runs of 5 words: runs in both by runs in either (Jaccard). Each
text gets a signature of 128 numbers, each the least value of one hash function over its runs. The share of equal
numbers in two signatures estimates the similarity, with a standard deviation of at most 0.044. Only texts that agree in
all numbers of a band are compared: 32 bands of 4 numbers find a pair of similarity s with probability
1 - (1 - s^4)^32, so 0.87 at 0.5, 0.99 at 0.6 and 0.9998 at 0.7.

Sources: Broder 1997, "On the resemblance and containment of documents", for signatures; Leskovec, Rajaraman & Ullman,
"Mining of Massive Datasets", section 3.4, for bands; Lee et al. 2022, "Deduplicating Training Data Makes Language
Models Better", section 4.2, for runs of 5 words; Dietzfelbinger 1996 for the hash functions.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer_service.text.word_grams import Grams

RUN_WORDS = 5
BANDS, ROWS = 32, 4
HASHES = BANDS * ROWS
# From this estimated similarity on, texts are near-duplicates.
SIMILARITY = 0.5
_SEED = 5

Signature = NDArray[np.uint32]


class MinHash:
    """Computes signatures, the same in every process."""

    def __init__(self) -> None:
        generator = np.random.Generator(np.random.Philox(key=_SEED))
        factors, terms = generator.integers(0, 1 << 64, size=(2, HASHES, 1), dtype=np.uint64)  # (K, 1) each
        self._factors, self._terms = factors, terms

    def signature(self, runs: Grams) -> Signature:
        """Returns the signature, (K,), of a text with the runs (N,); N must not be 0."""
        halves = (runs >> np.uint64(32)) ^ (runs & np.uint64(0xFFFFFFFF))  # (N,)
        hashed = (self._factors * halves + self._terms) >> np.uint64(32)  # (K, N)
        signature: Signature = hashed.min(axis=1).astype(np.uint32)  # (K,)
        return signature


def similarity(first: Signature, others: Signature) -> NDArray[np.float64]:
    """Returns the estimated similarity, (N,), of a signature, (K,), to others, (N, K)."""
    share: NDArray[np.float64] = (others == first).mean(axis=-1)
    return share


def near_duplicates(signatures: Signature, tick: Callable[[], object] = lambda: None) -> NDArray[np.bool_]:
    """Returns which of the signatures, (N, K), are near-duplicates of an earlier one that is none itself, (N,).

    Whether a text is one depends on no later text. `tick` is called after each text.
    """
    keys = _band_keys(signatures)  # (N, BANDS)
    dropped = np.zeros(len(signatures), dtype=bool)
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    shared = _shared(keys)
    for index in np.flatnonzero(shared.any(axis=1)).tolist():
        buckets = [(band, int(keys[index, band])) for band in np.flatnonzero(shared[index]).tolist()]
        earlier = list({other for bucket in buckets for other in kept[bucket]})
        dropped[index] = bool((similarity(signatures[index], signatures[earlier]) >= SIMILARITY).any())
        if not dropped[index]:
            for bucket in buckets:
                kept[bucket].append(index)
        tick()
    return dropped


def _band_keys(signatures: Signature) -> NDArray[np.uint64]:
    """Returns a number for each band of each signature; different bands have different numbers, up to chance."""
    bands = signatures.reshape(-1, BANDS, ROWS).astype(np.uint64)  # (N, BANDS, ROWS)
    factors = np.random.Generator(np.random.Philox(key=_SEED + 1)).integers(0, 1 << 64, size=ROWS, dtype=np.uint64)
    keys: NDArray[np.uint64] = ((bands + np.uint64(1)) * (factors | np.uint64(1))).sum(axis=2, dtype=np.uint64)
    return keys  # (N, BANDS)


def _shared(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Returns which keys, (N, BANDS), another text has in the same band."""
    shared = np.zeros(keys.shape, dtype=bool)
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")  # (N,)
        equal = np.diff(keys[order, band]) == 0  # (N-1,)
        shared[order[:-1][equal], band] = True
        shared[order[1:][equal], band] = True
    return shared
