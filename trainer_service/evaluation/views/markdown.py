"""A report as Markdown, without its plots."""

import re
from collections.abc import Iterator

from trainer_service.evaluation.views.document import Block, Note, Plot, Report, SideBySide, Table, printable_lines

# What has a meaning in Markdown, HTML, or GitHub's tables and links; a backslash makes it plain (CommonMark 0.31, 2.4).
_SPECIAL = re.compile(r"[\\`*_\[\]<>&|~$@]|:(?=//)|(?<=www)\.")
# What begins a list, a heading or a rule, but only at the beginning of a line.
_BEGINNING = re.compile(r"^(\d*)([.)#+=-])")


def to_markdown(report: Report) -> str:
    """Returns the text of a Markdown file; everything from outside is escaped."""
    parts = [f"# {_escape(report.title)}", _paragraph(report.subtitle)]
    for section in report.sections:
        parts.append(f"## {_escape(section.title)}")
        for block in section.blocks:
            parts.extend(_block(block))
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Note():
            yield _paragraph(block.text)
        case Table():
            yield _table(block)
        case Plot():
            yield f"**{_escape(block.title)}:** {_escape(block.description)}"
        case SideBySide():
            yield f"**{_lines(block.beginning)}**"
            for passage in block.passages:
                yield f"> **{_escape(passage.author)}** ({_escape(passage.remark)})<br>{_lines(passage.text)}"


def _table(table: Table) -> str:
    rules = ("---" if column in table.left else "---:" for column in range(len(table.headings)))
    lines = [map(_escape, table.headings), rules, *(map(_escape, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _paragraph(text: str) -> str:
    return _BEGINNING.sub(r"\1\\\2", _escape(text))


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", " ".join(printable_lines(text)).strip())


def _lines(text: str) -> str:
    return "<br>".join(map(_escape, text.strip().split("\n")))
