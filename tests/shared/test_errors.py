from pathlib import Path

import pytest

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
def test_a_value_is_quoted_as_one_printable_line(value: object, text: str) -> None:
    assert shown(value) == text
