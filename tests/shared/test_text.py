import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text import excerpt, format_duration, format_size, printable, shorten, valid_unicode

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=300)


def test_a_number_too_long_to_be_written_out_is_described() -> None:
    assert excerpt(-(10**6000)) == "a number of about 6,000 digits"
    assert excerpt([10**6000]) == "a list with a very long number"


def test_an_excerpt_keeps_the_beginning_and_the_end() -> None:
    path = "/" + "d" * 5000 + "/stories.txt"
    assert excerpt(path).startswith("/ddd") and excerpt(path).endswith("ddd/stories.txt")
    assert len(excerpt(path)) == 80 and len(excerpt(path, 20)) == 20


@given(ANY_TEXT, st.integers(10, 100))
def test_an_excerpt_of_any_text_is_short_and_printable(text: str, limit: int) -> None:
    line = excerpt(text, limit)
    assert len(line) <= limit and line.isprintable()
    line.encode()


def test_a_text_is_shortened_only_if_it_is_too_long() -> None:
    assert shorten("four", 4) == "four"
    assert shorten("fives", 4) == "fiv…"


def test_lone_surrogates_are_escaped() -> None:
    assert valid_unicode("Grüße\n caf\udce9.txt") == "Grüße\n caf\\udce9.txt"


@given(ANY_TEXT)
def test_only_unprintable_characters_are_escaped(text: str) -> None:
    assert printable(text).isprintable()
    assert not text.isprintable() or printable(text) == text


@pytest.mark.parametrize(
    ("mebibytes", "text"), [(0, "0.0 MiB"), (0.42, "0.4 MiB"), (17.6, "18 MiB"), (1023, "1023 MiB"), (2560, "2.5 GiB")]
)
def test_a_size_is_in_a_fitting_unit(mebibytes: float, text: str) -> None:
    assert format_size(round(mebibytes * 2**20)) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3600.0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (60.0, "1 min"), (1e6, "12 d")]
)
def test_a_duration_is_in_its_largest_unit_and_never_negative(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
