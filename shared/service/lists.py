"""Prints lists as a table that fits the terminal, or as JSON."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Generic, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.text import printable

# On a narrow terminal, columns are omitted until each column that may wrap is at least this wide.
_WRAPPED_WIDTH = 24
_GAP = 2

Row = TypeVar("Row")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: an array with an object for each row.")]


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a list.

    heading: the heading in the table; a column without one is only in JSON.
    value: returns the value of a row for JSON.
    text: returns the text of a row for the table; by default the value as text.
    key: the name in JSON; by default the heading with underscores.
    rank: 0 if the column is always shown; on a narrow terminal the columns with the highest rank are omitted first.
    wraps: whether the text may wrap.
    right: whether the text is aligned to the right, as numbers are.
    """

    heading: str
    value: Callable[[Row], object]
    text: Callable[[Row], str] | None = None
    key: str = ""
    rank: int = 0
    wraps: bool = False
    right: bool = False

    def shown(self, row: Row) -> str:
        """Returns the text of a row, as one printable line."""
        if self.text is not None:
            return printable(self.text(row))
        value = self.value(row)
        if isinstance(value, list | tuple):
            return printable(", ".join(map(str, value)))
        return "" if value is None else printable(str(value))


def print_list(rows: Sequence[Row], columns: Sequence[Column[Row]], *, as_json: bool = False, empty: str = "") -> None:
    """Prints a list as a table that fits the terminal, or as JSON: an array with an object for each row.

    Never cuts a cell: omits columns by their rank, then wraps words. If the output is not a terminal, every row is one
    line. Prints `empty` instead of a table without rows.
    """
    if as_json:
        print(json.dumps([_to_json(row, columns) for row in rows], indent=2))
    elif not rows:
        print(empty)
    else:
        _print_table(rows, [column for column in columns if column.heading])


def _to_json(row: Row, columns: Sequence[Column[Row]]) -> dict[str, object]:
    def plain(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        column.key or column.heading.replace(" ", "_").replace("-", "_"): plain(column.value(row)) for column in columns
    }


def _print_table(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> None:
    console = Console()
    cells = [[column.shown(row) for row in rows] for column in columns]
    natural = [max(map(cell_len, [column.heading, *texts])) for column, texts in zip(columns, cells, strict=True)]
    least = [
        max(cell_len(column.heading), min(width, _WRAPPED_WIDTH)) if column.wraps else width
        for column, width in zip(columns, natural, strict=True)
    ]
    # A column that wraps is at least as wide as its longest word, up to `_WRAPPED_WIDTH`.
    narrowest = [
        min(width, max(map(cell_len, " ".join([column.heading, *texts]).split()))) if column.wraps else width
        for column, width, texts in zip(columns, least, cells, strict=True)
    ]
    kept = list(range(len(columns)))
    if console.is_terminal:
        kept = fitting(least, [column.rank for column in columns], console.width)
    needed = _width([narrowest[index] for index in kept])
    # May be wider than a very narrow terminal, which then wraps the lines itself.
    width = max(console.width, needed) if console.is_terminal else _width(natural)
    table = Table(box=None, pad_edge=False)
    for index in kept:
        column = columns[index]
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=not column.wraps,
            overflow="fold",
            min_width=narrowest[index],
        )
    for row in zip(*(cells[index] for index in kept), strict=True):
        table.add_row(*map(Text, row))
    Console(width=width).print(table)


def fitting(widths: Sequence[int], ranks: Sequence[int], limit: int) -> list[int]:
    """Returns the indexes of the columns that fit on a line of `limit` characters.

    Omits the column with the highest rank first, of equal ranks the last one, and never one with rank 0.
    """
    kept = list(range(len(widths)))
    for index in sorted(kept, key=lambda index: (-ranks[index], -index)):
        if ranks[index] and _width([widths[each] for each in kept]) > limit:
            kept.remove(index)
    return kept


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of texts with all of its columns."""
    print_list(rows, [Column(heading, itemgetter(index)) for index, heading in enumerate(headings)])
