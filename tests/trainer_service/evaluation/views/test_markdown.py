import re

from tests.trainer_service.evaluation.views.documents import EVIL, document
from trainer_service.evaluation.views.document import Note, Report, Section
from trainer_service.evaluation.views.markdown import to_markdown


def test_blocks_are_markdown() -> None:
    text = to_markdown(document())
    assert "| figure | version 000000000 |" in text
    assert "\n| --- | ---: |\n" in text
    assert "## Texts" in text
    assert "> **version 3** (seed 1)<br>The cat ran.<br>It slept." in text


def test_everything_from_outside_is_escaped() -> None:
    text = to_markdown(document(EVIL)).replace("<br>", "")
    assert "\x1b" not in text and "\u202e" not in text
    # No tag, link or code is left, and the cells are as many as the columns.
    assert not re.search(r"(?<!\\)[<`\[$&]", text)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")} == {3, 14}
    assert not re.search(r"(?<!\\)://", text)


def test_a_note_never_begins_a_list_or_a_heading() -> None:
    notes = ["# no heading", "- no list", "12. no number", "a 1. b - c"]
    text = to_markdown(Report("t", "s", (Section("n", tuple(map(Note, notes))),)))
    assert text.split("\n\n")[3:] == ["\\# no heading", "\\- no list", "12\\. no number", "a 1. b - c\n"]
