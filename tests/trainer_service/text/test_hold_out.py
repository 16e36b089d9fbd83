"""The held-out text has the requested share, starts at good boundaries, and is disjoint from the training text."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_service.text.whole_documents import whole_documents
from trainer_service.text import file_bytes
from trainer_service.text.corpus import DatasetSpec, open_corpus
from trainer_service.text.documents import Passage
from trainer_service.text.hold_out import hold_out


def split(texts: list[str], share: float, size: int = 1000) -> tuple[list[str], list[str], str]:
    """Returns the training documents, the held-out documents and the rule; the text is read in passages of a size."""

    def read() -> Iterator[Passage]:
        for text in texts:
            for start in range(0, len(text), size):
                yield Passage(text[start : start + size], start + size >= len(text))

    rule, part = hold_out(read, np.array([len(text) for text in texts]), share)
    return whole_documents(part(False)), whole_documents(part(True)), rule


def total(texts: list[str]) -> int:
    return sum(map(len, texts))


@given(
    texts=st.lists(st.text(alphabet="ab .\n。é", min_size=1, max_size=300), min_size=1, max_size=60),
    share=st.floats(0.01, 0.9),
    size=st.integers(1, 50),
)
def test_the_parts_are_disjoint_and_complete_and_have_the_share(texts: list[str], share: float, size: int) -> None:
    train, held, rule = split(texts, share, size)
    whole = total(texts)
    assert total(train) + total(held) == whole
    if "of each document" in rule:
        assert all(any(text.endswith(part) for text in texts) for part in held)
        assert abs(total(held) - share * whole) <= 0.1 * share * whole + 1 + len(texts)
    else:
        assert sorted(train + held) == sorted(texts)
        assert abs(total(held) - share * whole) <= 0.1 * share * whole


def test_one_of_every_20_documents_of_equal_length_is_held_out() -> None:
    texts = [f"document {number:03}" for number in range(100)]
    train, held, rule = split(texts, 0.05)
    assert held == [texts[index] for index in (9, 29, 49, 69, 89)]
    assert train == [text for text in texts if text not in held]
    assert rule == "5.0% of the text, 5 of 100 documents, evenly spread, is held out for validation."


def test_the_share_counts_characters_if_documents_differ_in_length() -> None:
    lengths = random.Random(1)
    texts = [f"{number} " * lengths.choice([5, 50, 800]) for number in range(3000)]
    _, held, _ = split(texts, 0.05)
    assert total(held) / total(texts) == pytest.approx(0.05, rel=0.1)
    # Long documents are held out as often as short ones.
    assert np.mean([len(text) for text in held]) == pytest.approx(np.mean([len(text) for text in texts]), rel=0.25)


@pytest.mark.parametrize("giant", [0, 12, 24])
def test_unequal_documents_are_cut_instead(giant: int) -> None:
    texts = [f"Chapter {number} is short. " * (3000 if number == giant else 40) for number in range(25)]
    _, held, rule = split(texts, 0.05)
    assert "The last 5.0% of each document" in rule
    assert total(held) / total(texts) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("unit", "held_begins", "train_ends"),
    [
        ("A line.\nAnother. And one more.\n\nA paragraph.\n", "A paragraph.", "\n\n"),
        ("word word. word word\n", "word word.", "\n"),
        ("Words of a sentence. And then? ", " ", (".", "?")),
        ("字字字字字。字字，字字字。", "字", "。"),  # noqa: RUF001
        ("word words ", " ", "s"),
        ("字字字字字字字", "字", "字"),
        ("e\u0301", "e", "\u0301"),
    ],
)
def test_a_document_is_cut_at_the_best_boundary_near_the_share(
    unit: str, held_begins: str, train_ends: str | tuple[str, ...]
) -> None:
    text = unit * 1000
    for size in (97, 10**6):
        (train,), (held,), _ = split([text], 0.05, size)
        assert train + held == text
        assert len(held) / len(text) == pytest.approx(0.05, rel=0.1)
        assert held.startswith(held_begins)
        assert train.endswith(train_ends)


@pytest.mark.skipif("GPTLOOP_TEST_DATA" not in os.environ, reason="GPTLOOP_TEST_DATA is not set")
@pytest.mark.parametrize(
    "name",
    [
        "awkward/names-no-spaces.txt",
        "awkward/table-no-spaces.tsv.txt",
        "awkward/chinese.txt",
        "tinystories/valid-v1.txt",
    ],
)
def test_the_share_of_a_real_text_is_held_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", 4096)
    corpus = open_corpus(DatasetSpec((str(Path(os.environ["GPTLOOP_TEST_DATA"]) / name),)), 0.05)
    train, held = total(whole_documents(corpus.train())), total(whole_documents(corpus.validation()))
    assert held / (train + held) == pytest.approx(0.05, rel=0.1)
