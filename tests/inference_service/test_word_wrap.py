import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from inference_service.word_wrap import WordWrap

WIDTHS = st.integers(4, 30)
TEXTS = st.text(st.sampled_from("abcé文😀\u0301 \n\t.,"), max_size=200)


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap()
    return "".join(wrap.add(piece, width) for piece in pieces) + wrap.end(width)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("Once upon a time", "Once upon\na time"),
        ("Once upon  tim", "Once upon\ntim"),
        ("1234567890 a", "1234567890\na"),
        ("a 123456789012345", "a\n1234567890\n12345"),
        ("a\n\n b", "a\n\n b"),
        ("a\tb", "a       b"),
        ("a\tb\tc", "a       b\nc"),
        ("文字文字文字", "文字文字文\n字"),
        (" " * 20 + "a", "a"),
    ],
)
def test_lines_break_between_words(text: str, printed: str) -> None:
    assert wrapped([text], 10) == printed


def test_a_word_is_printed_when_it_has_ended() -> None:
    wrap = WordWrap()
    assert [wrap.add(piece, 10) for piece in ("On", "ce", " upon", " a", " tim", "e", "\n")] == [
        "",
        "",
        "Once",
        " upon",
        "\na",
        "",
        " time\n",
    ]


@given(st.lists(TEXTS), WIDTHS)
def test_the_pieces_make_no_difference(pieces: list[str], width: int) -> None:
    assert wrapped(pieces, width) == wrapped(["".join(pieces)], width)


@given(TEXTS, WIDTHS)
def test_nothing_is_lost_and_every_line_fits(text: str, width: int) -> None:
    printed = wrapped([text], width)
    assert "".join(printed.split()) == "".join(text.split())
    assert all(cell_len(line) <= width for line in printed.split("\n"))


@given(st.lists(st.text("abcé", min_size=1, max_size=10)), st.integers(10, 30))
def test_no_word_that_fits_a_line_is_broken(words: list[str], width: int) -> None:
    assert wrapped([" ".join(words)], width).split() == words
