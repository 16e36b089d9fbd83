"""The pages for people, as text: what the README says, and the reference beside the code."""

import re

from tests.workplace import PROJECT

# A wing's page describes the package in whose folder it lies.
WINGS = ("trainer_service", "inference_service", "deploy", "shared")
PAGES = {
    name: (PROJECT / name).read_text(encoding="utf-8")
    for name in ("README.md", *(f"{wing}/README.md" for wing in WINGS), "CONTRIBUTING.md")
}
TEXT = "\n".join(PAGES.values())
# The fenced blocks: language and text.
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
# Blocks and spans of code, one a line or more.
CODE = "\n".join(
    block or span for block, span in re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", TEXT, re.DOTALL | re.MULTILINE)
)


def sections(title: str) -> dict[str, str]:
    """Returns the text below a heading up to the next heading of any level, of each page that has one."""
    found = {
        page: re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
        for page, text in PAGES.items()
    }
    return {page: str(texts[0]) for page, texts in found.items() if texts}


def tables(title: str) -> list[list[list[str]]]:
    """Returns the cells of the tables in all sections of this title, headings first, without the marks of code."""
    return [
        [
            [cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in table.splitlines()
            if not line.startswith("|---")
        ]
        for text in sections(title).values()
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    ]


def rows(title: str) -> list[list[str]]:
    """Returns the rows of these tables, without their headings."""
    return [row for _, *others in tables(title) for row in others]
