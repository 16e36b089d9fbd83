from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer_service.training import document_order
from trainer_service.training.document_order import DocumentOrder

END = 7
seeds = st.integers(0, 2**32 - 1)


@st.composite
def texts(draw: st.DrawFn) -> tuple[NDArray[np.uint16], int]:
    """Tokens of a text with documents of many lengths, some of them empty, and a context length that they exceed. The
    last document may have no end token, as in a text that a limit cuts."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=40))
    tokens = np.concatenate([np.array([1] * length + [END], np.uint16) for length in lengths])
    tokens = tokens[: tokens.size - draw(st.integers(0, 1))]
    tokens = tokens if tokens.size >= 3 else np.ones(3, np.uint16)
    return tokens, draw(st.integers(1, tokens.size - 1))


def epoch_of(order: DocumentOrder, number: int) -> NDArray[np.int64]:
    """Returns the positions of all windows of an epoch (W, T+1)."""
    return order.positions(np.arange(order.windows_per_epoch) + number * order.windows_per_epoch)


@given(texts(), seeds, st.integers(0, 10**12))
def test_an_epoch_reads_each_document_whole_and_once_apart_from_its_ends(
    text: tuple[NDArray[np.uint16], int], seed: int, number: int
) -> None:
    tokens, length = text
    windows = epoch_of(DocumentOrder(tokens, END, length, (seed,)), number)
    following = dict(zip(windows[:, :-1].flat, windows[:, 1:].flat, strict=True))
    # No token is an input twice, so no window repeats.
    assert len(following) == windows.shape[0] * length
    (first,) = set(following) - set(following.values())
    path = [first]
    while path[-1] in following:
        path.append(following.pop(path[-1]))
    assert not following and tokens.size - len(path) < 2 * length
    begins = {0, *(np.flatnonzero(tokens[:-1] == END) + 1).tolist()}
    for one, other in pairwise(path):
        ends = one + 1 in begins or one + 1 == tokens.size
        assert other in begins if ends else other == one + 1


@given(texts(), seeds, st.lists(st.integers(0, 10**14), min_size=1, max_size=6))
def test_a_window_is_a_pure_function_of_its_number(
    text: tuple[NDArray[np.uint16], int], seed: int, numbers: list[int]
) -> None:
    tokens, length = text
    together = DocumentOrder(tokens, END, length, (seed,)).positions(np.array(numbers))
    assert together.min() >= 0 and together.max() < tokens.size
    again = DocumentOrder(tokens, END, length, (seed,))
    for number, window in reversed(list(zip(numbers, together, strict=True))):
        np.testing.assert_array_equal(again.positions(np.array([number]))[0], window)


def test_each_epoch_cuts_elsewhere_and_shuffles_documents_and_windows() -> None:
    tokens = np.tile(np.array([1] * 9 + [END], np.uint16), 100)
    order = DocumentOrder(tokens, END, 50, (3,))
    epochs = [epoch_of(order, number) for number in range(12)]
    assert len({int(windows[0, 0]) % 10 for windows in epochs}) > 4
    # Where a document follows another one than in the text.
    pairs = [np.stack([windows[:, :-1], windows[:, 1:]], axis=-1).reshape(-1, 2) for windows in epochs]
    joints = [{(one, other) for one, other in each.tolist() if other != one + 1} for each in pairs]
    assert all(len(each) > 70 for each in joints) and len(joints[0] & joints[1]) < 10
    one_document = DocumentOrder(np.ones(1000, np.uint16), END, 50, (3,))
    first, second = (epoch_of(one_document, number)[:, 0] for number in range(2))
    assert (np.sort(first) != first).any() and set(first % 50) != set(second % 50)


def test_other_seeds_have_other_orders() -> None:
    tokens = np.ones(1000, np.uint16)
    orders = [epoch_of(DocumentOrder(tokens, END, 8, seed), 0) for seed in [(1, 0), (1, 1), (2, 0), (2**32 - 1, 0)]]
    assert len({order.tobytes() for order in orders}) == 4


@pytest.mark.parametrize("searched", [1, 3, 1 << 24])
def test_documents_are_found_however_much_is_searched_at_a_time(searched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_order, "_SEARCHED", searched)
    for tokens, begins in (([END, END, 1, END, 1, 1], [0, 1, 2, 4]), ([1, END], [0]), ([1, 1, 1], [0])):
        assert document_order._begins(np.array(tokens, np.uint16), END).tolist() == begins
