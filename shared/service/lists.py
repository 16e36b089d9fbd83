"""Lists, as a table that fits the terminal or as JSON: here is decided which columns give way."""

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

# On a narrow terminal, columns are left out until those whose words may wrap are at least this wide.
_WRAPPED_WIDTH = 24
_GAP = 2

Row = TypeVar("Row")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: an array with an object for each row.")]


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a list.

    heading: what stands above it. The column without a heading is in JSON only.
    value: what JSON holds of a row: numbers and lists as they are.
    text: what people read of a row; without it the value as text.
    key: its name in JSON; without it the heading with underscores.
    rank: 0 for what always stays; on a narrow terminal columns of higher ranks are left out first.
    wraps: its text may go on in another line.
    right: numbers that people compare stand at the right.
    """

    heading: str
    value: Callable[[Row], object]
    text: Callable[[Row], str] | None = None
    key: str = ""
    rank: int = 0
    wraps: bool = False
    right: bool = False

    def shown(self, row: Row) -> str:
        """The text of a row, printable and on one line."""
        if self.text is not None:
            return printable(self.text(row))
        value = self.value(row)
        if isinstance(value, list | tuple):
            return printable(", ".join(map(str, value)))
        return "" if value is None else printable(str(value))


def print_list(rows: Sequence[Row], columns: Sequence[Column[Row]], *, as_json: bool = False, empty: str = "") -> None:
    """Prints a list as a table that fits the terminal, or as JSON: an array with an object for each row.

    No cell is ever cut: columns are left out by their rank, and then words wrap where they may. Where no terminal
    bounds it, every row is one line. `empty` is the sentence that stands for a table without rows.
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
    # Of a column that wraps: its longest word, unless that must be broken itself.
    narrowest = [
        min(width, max(map(cell_len, " ".join([column.heading, *texts]).split()))) if column.wraps else width
        for column, width, texts in zip(columns, least, cells, strict=True)
    ]
    kept = list(range(len(columns)))
    if console.is_terminal:
        kept = fitting(least, [column.rank for column in columns], console.width)
    needed = _width([narrowest[index] for index in kept])
    # Wider than a very narrow terminal, which wraps the lines itself: nothing is cut.
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
    """The indexes of the columns that stay on a line of `limit` characters: the highest rank goes first, and of equal
    ones the last; rank 0 stays in any case."""
    kept = list(range(len(widths)))
    for index in sorted(kept, key=lambda index: (-ranks[index], -index)):
        if ranks[index] and _width([widths[each] for each in kept]) > limit:
            kept.remove(index)
    return kept


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of texts of which no column may be left out."""
    print_list(rows, [Column(heading, itemgetter(index)) for index, heading in enumerate(headings)])
