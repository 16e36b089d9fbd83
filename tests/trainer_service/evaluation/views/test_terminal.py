from io import StringIO

from rich.console import Console

from tests.trainer_service.evaluation.views.documents import EVIL, document
from trainer_service.evaluation.views.document import Report
from trainer_service.evaluation.views.terminal import print_report


def printed(report: Report) -> str:
    file = StringIO()
    print_report(report, Console(file=file, width=80))
    return file.getvalue()


def test_a_report_fits_80_columns_and_a_wide_table_goes_on_below() -> None:
    text = printed(document())
    assert max(map(len, text.splitlines())) <= 80
    for number in range(12):
        assert text.count(f"version {number:09}") == 1
    # The first column is repeated with each part.
    assert sum(line.startswith("loss ") for line in text.splitlines()) == 4


def test_texts_keep_their_lines() -> None:
    lines = [line.strip() for line in printed(document()).splitlines()]
    assert "version 3   The cat ran." in lines
    assert "It slept." in lines


def test_the_first_texts_are_shown_and_the_others_counted() -> None:
    text = printed(document())
    assert "2 of 4 texts are shown" in text
    assert "1 The cat" in text and "2 The cat" not in text


def test_nothing_from_outside_controls_the_terminal() -> None:
    text = printed(document(f"{EVIL} [red]"))
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in text and "\\x1b[31m" in text
