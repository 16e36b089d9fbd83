"""Finds the longest run of tokens that a text has in common with the training text, in one pass over that.

The written texts are short and the training text is long, so the index is one of the written texts: a suffix automaton
(Blumer et al. 1985), which reads the training text and keeps the longest run of written tokens that ends at each token.
Loads no model framework. Shapes: N training tokens, W lanes, K states, A different tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer_service.training.batches import Tokens

# Texts share an automaton up to this many tokens; its table then takes at most about 100 MB.
_INDEXED_TOKENS = 4096
# The automaton reads this many places of the training text at the same time, and at most this many tokens at each.
_LANES = 2048
_LANE_TOKENS = 4096
# Progress is reported after this many steps of all lanes.
_REPORTED_STEPS = 256
_UNLIMITED = (1 << 16) - 1
# Stands after each text; it is no token, so no run of the training text contains it.
_SEPARATOR = -1


def longest_copies(
    texts: Sequence[Sequence[int]], training: Tokens, report: Callable[[float], object]
) -> tuple[int, ...]:
    """Returns for each text the length of its longest run of tokens that also stands in the training text (N,).

    Takes time in proportion to N and a bounded amount of memory, even if `training` is mapped from a file. `report`
    receives the share that is done; an exception from it ends the work.
    """
    groups = _groups(texts)
    copies: list[int] = []
    for number, group in enumerate(groups):
        automaton = _Automaton.of(group)
        matched = np.zeros(len(automaton.length), np.intp)
        for share, longest in _matches(automaton, training):
            np.maximum(matched, longest, out=matched)
            report((number + share) / len(groups))
        copies += automaton.longest(matched.tolist())
    return tuple(copies)


def _groups(texts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = []
    tokens = 0
    for text in texts:
        tokens += len(text)
        if not groups or tokens > _INDEXED_TOKENS:
            groups.append([])
            tokens = len(text)
        groups[-1].append(text)
    return groups


@dataclass(frozen=True)
class _Automaton:
    """The suffix automaton of several texts, each followed by a separator.

    A state stands for runs of tokens with the same ends in the texts, each a suffix of the longest, which has `length`
    tokens. `link` is the state of the longest suffix with other ends, `following` the state after one more token.
    `ends` holds the state of each beginning of each text. State 0 is that of the empty run.
    """

    length: list[int] = field(default_factory=lambda: [0])
    link: list[int] = field(default_factory=lambda: [-1])
    following: list[dict[int, int]] = field(default_factory=lambda: [{}])
    ends: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "_Automaton":
        """Builds the automaton of texts."""
        automaton, last = cls(), 0
        for text in texts:
            automaton.ends.append([last := automaton._extend(last, token) for token in text])
            last = automaton._extend(last, _SEPARATOR)
        return automaton

    def _extend(self, last: int, token: int) -> int:
        """Appends a token after the state of all text so far; returns the state of all text then."""
        new = self._add(self.length[last] + 1, 0, {})
        at = last
        while at >= 0 and token not in self.following[at]:
            self.following[at][token] = new
            at = self.link[at]
        if at < 0:
            return new
        found = self.following[at][token]
        if self.length[found] != self.length[at] + 1:
            # The shorter runs of this state now end in one more place than the longer ones.
            shorter = self._add(self.length[at] + 1, self.link[found], dict(self.following[found]))
            self.link[found] = shorter
            while at >= 0 and self.following[at].get(token) == found:
                self.following[at][token] = shorter
                at = self.link[at]
            found = shorter
        self.link[new] = found
        return new

    def _add(self, length: int, link: int, following: dict[int, int]) -> int:
        self.length.append(length)
        self.link.append(link)
        self.following.append(following)
        return len(self.length) - 1

    def table(self) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
        """Returns the column of each token (65536,), 0 for tokens that no text has, and the steps (K, A).

        A step holds in its high 16 bits the next state and in its low ones the most tokens that match then.
        """
        tokens = sorted(self.following[0].keys() - {_SEPARATOR})
        columns = np.zeros(1 << 16, np.uint16)
        columns[tokens] = np.arange(1, len(tokens) + 1)
        steps = np.zeros((len(self.length), len(tokens) + 1), np.uint32)
        assert len(steps) <= 1 << 16
        for state in np.argsort(self.length, kind="stable").tolist():
            if state:
                # Without an own step, the match is shortened to the longest suffix that has one.
                shorter = steps[self.link[state]]
                limit = np.minimum(shorter & _UNLIMITED, self.length[self.link[state]] + 1)
                steps[state] = shorter & ~np.uint32(_UNLIMITED) | limit
            for token, target in self.following[state].items():
                if token != _SEPARATOR:
                    steps[state, columns[token]] = target << 16 | _UNLIMITED
        return columns, steps

    def longest(self, matched: list[int]) -> list[int]:
        """Returns the longest match of each text from the longest match in each state."""
        best = list(matched)
        for state in sorted(range(1, len(best)), key=self.length.__getitem__, reverse=True):
            if best[state]:
                best[self.link[state]] = self.length[self.link[state]]
        return [max((self._matched_suffix(state, best) for state in states), default=0) for states in self.ends]

    def _matched_suffix(self, state: int, best: list[int]) -> int:
        while state and not best[state]:
            state = self.link[state]
        return best[state]


def _matches(automaton: _Automaton, training: Tokens) -> Iterator[tuple[float, NDArray[np.intp]]]:
    """Reads the training text (N,) in pieces; yields the share that is read, and the longest match that ended in each
    state (K,) meanwhile."""
    columns, steps = automaton.table()
    longest = max(map(len, automaton.ends))
    states, width = steps.shape
    flat = steps.reshape(-1)  # (K * A,)
    lane_tokens = min(-(-training.size // _LANES), _LANE_TOKENS)
    for start in range(0, training.size if longest else 0, max(_LANES * lane_tokens, 1)):
        lanes = _lanes(columns, training[start:], lane_tokens, longest - 1)  # (T, W)
        state, matched = np.zeros(_LANES, np.intp), np.zeros(_LANES, np.intp)
        for first in range(0, len(lanes), _REPORTED_STEPS):
            seen = np.zeros(states * (longest + 1), bool)
            for column in lanes[first : first + _REPORTED_STEPS]:
                step = flat.take(state * width + column)
                state = (step >> 16).astype(np.intp)
                matched = np.minimum(matched + 1, step & _UNLIMITED)
                seen[state * (longest + 1) + matched] = True
            lengths = seen.reshape(states, longest + 1) * np.arange(longest + 1)  # (K, longest + 1)
            read = start + first / len(lanes) * _LANES * lane_tokens
            yield min(read / training.size, 1.0), lengths.max(axis=1)
    yield 1.0, np.zeros(states, np.intp)


def _lanes(columns: NDArray[np.uint16], tokens: Tokens, lane_tokens: int, overlap: int) -> NDArray[np.uint16]:
    """Returns the columns of the tokens of all lanes, (T, W): those that begin a run in each, and an overlap for its
    end."""
    size = _LANES * lane_tokens + overlap
    part = tokens[:size]
    padded = np.pad(columns[part], (0, size - part.size))
    lanes = np.lib.stride_tricks.sliding_window_view(padded, lane_tokens + overlap)[::lane_tokens]  # (W, T)
    return np.ascontiguousarray(lanes.T)
