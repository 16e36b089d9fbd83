from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("best", "'best'"),
        ("", "''"),
        ("it's", '"it\'s"'),
        ("Grüße 😀", "'Grüße 😀'"),
        ("a\nb\x1b[31m\x00", "'a\\nb\\x1b[31m\\x00'"),
        ("cut \ud83d", "'cut \\ud83d'"),
        ("\u202egnp.txt", "'\\u202egnp.txt'"),
        (Path("/data/my file.txt"), "/data/my file.txt"),
        (Path("/data/\udcff.txt"), "/data/\\udcff.txt"),
        (-3, "-3"),
        (1.5, "1.5"),
        (None, "None"),
    ],
)
def test_a_value_is_shown_as_one_printable_line(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_number_too_long_to_be_written_out_is_described() -> None:
    assert shown(-(10**6000)) == "a number of about 6,000 digits"
    assert shown([10**6000]) == "a list with a very long number"


def test_of_a_long_value_the_beginning_and_the_end_are_shown() -> None:
    path = "/" + "d" * 5000 + "/stories.txt"
    assert shown(path).startswith("'/ddd") and shown(path).endswith("ddd/stories.txt'")
    assert len(shown(path)) == 82 and len(shown(path, 20)) == 22


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=300), st.integers(10, 100))
def test_whatever_a_text_holds_it_is_shown_short_and_printable(text: str, limit: int) -> None:
    line = shown(text, limit)
    assert len(line) <= limit + 2 and line.isprintable()
    line.encode()
