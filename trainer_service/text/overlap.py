"""Finds texts that share a run of words with held-out text.

Source: Brown et al. 2020 (GPT-3), appendix C: a text overlaps if it shares a run of 13 words, in lower case and without
punctuation.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from trainer_service.text.word_grams import Grams, WordGrams, words_of

RUN_WORDS = 13


class HeldOutRuns:
    """The runs of 13 words in some texts. `tick` is called after each text; an exception from it ends the reading."""

    def __init__(self, texts: Iterable[str], grams: WordGrams, tick: Callable[[], object] = lambda: None) -> None:
        self._grams = grams
        parts = []
        for text in texts:
            parts.append(grams.of(words_of(text), RUN_WORDS))
            tick()
        self._runs: Grams = np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))  # (M,), sorted

    def overlap(self, words: Sequence[str]) -> bool:
        """Returns whether a run of words of a text is held out."""
        runs = self._grams.of(words, RUN_WORDS)  # (N,)
        places = np.searchsorted(self._runs, runs)  # (N,)
        inside = places < self._runs.size
        return bool((self._runs[places[inside]] == runs[inside]).any())
