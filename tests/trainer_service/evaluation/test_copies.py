"""Criterion: for each text, the length of its longest run of tokens that stands in the training text."""

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import trainer_service.evaluation.copies as copies
from trainer_service.evaluation.copies import longest_copies

# Few different tokens, so that runs repeat; the highest one must fit into a table of all tokens.
TOKENS = st.sampled_from([0, 1, 2, 65535])
TEXTS = st.lists(st.lists(TOKENS, max_size=12), max_size=5)


def naive(text: Sequence[int], training: Sequence[int]) -> int:
    runs = {tuple(training[start:end]) for end in range(len(training) + 1) for start in range(end)}
    pieces = ((end - start, tuple(text[start:end])) for end in range(len(text) + 1) for start in range(end))
    return max((length for length, piece in pieces if piece in runs), default=0)


def found(texts: Sequence[Sequence[int]], training: Sequence[int]) -> tuple[int, ...]:
    return longest_copies(texts, np.array(training, np.uint16), lambda share: None)


@given(TEXTS, st.lists(TOKENS, max_size=60), st.integers(1, 7), st.integers(1, 9), st.integers(1, 30))
def test_the_longest_copy_is_that_of_all_pairs_of_runs(
    texts: list[list[int]], training: list[int], lanes: int, lane_tokens: int, indexed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_LANES", lanes)
        patch.setattr(copies, "_LANE_TOKENS", lane_tokens)
        patch.setattr(copies, "_INDEXED_TOKENS", indexed)
        assert found(texts, training) == tuple(naive(text, training) for text in texts)


def test_a_copy_is_found_wherever_it_stands_in_a_long_text() -> None:
    generator = np.random.default_rng(3)
    training = generator.integers(0, 1000, 40_000, np.uint16)
    starts = [0, 15_000, 39_900]
    texts = [[1001, *training[start : start + 100].tolist(), 1001] for start in starts]
    assert longest_copies(texts, training, lambda share: None) == (100, 100, 100)


def test_runs_of_one_text_do_not_join_those_of_another() -> None:
    assert found([[1, 2], [3, 4]], [1, 2, 3, 4]) == (2, 2)


def test_without_tokens_nothing_is_copied() -> None:
    assert found([], [1, 2]) == ()
    assert found([[], [5]], [1, 2]) == (0, 0)
    assert found([[1]], []) == (0,)


def test_the_share_that_is_done_rises_to_one_and_its_receiver_ends_the_work() -> None:
    shares: list[float] = []
    training = np.ones(100_000, np.uint16)
    longest_copies([[1] * 3000, [2] * 3000], training, shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 4
    with pytest.raises(KeyboardInterrupt):
        longest_copies([[1]], training, stop)


def stop(share: float) -> None:
    raise KeyboardInterrupt
