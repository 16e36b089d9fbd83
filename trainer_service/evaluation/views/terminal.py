"""A report as text for a terminal."""

from collections.abc import Iterator

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from shared.text import printable
from trainer_service.evaluation.views.document import (
    Block,
    Note,
    Plot,
    Report,
    Section,
    SideBySide,
    Table,
    printable_lines,
)

# The files have all of them.
_MOST_TEXTS = 2
_GAP = 2


def print_report(report: Report, console: Console) -> None:
    """Prints a report; tables that are too wide are continued below themselves."""
    console.print(Text(printable(report.title), style="bold"))
    console.print(Text(printable(report.subtitle)))
    for section in report.sections:
        console.print()
        console.print(Text(printable(section.title), style="bold"))
        for renderable in _section(section, console.width):
            console.print(renderable)


def _section(section: Section, width: int) -> Iterator[RenderableType]:
    texts = [block for block in section.blocks if isinstance(block, SideBySide)]
    for block in section.blocks:
        if not isinstance(block, SideBySide) or block in texts[:_MOST_TEXTS]:
            yield from _block(block, width)
    if len(texts) > _MOST_TEXTS:
        yield Text(f"{_MOST_TEXTS} of {len(texts)} texts are shown; the files of the report have all.")


def _block(block: Block, width: int) -> Iterator[RenderableType]:
    match block:
        case Note():
            yield Text(printable(block.text))
        case Table():
            yield from _tables(block, width)
        case Plot():
            yield Text(printable(f"{block.title}: {block.description}"))
        case SideBySide():
            yield _side_by_side(block)


def _tables(table: Table, width: int) -> Iterator[Grid]:
    """Yields a table, or parts of its columns that fit the width, each with the first column."""
    cells = [[printable(text) for text in row] for row in (table.headings, *table.rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    part, used = [0], widths[0]
    for column in range(1, len(widths)):
        if len(part) > 1 and used + _GAP + widths[column] > width:
            yield _grid(table, cells, part)
            part, used = [0], widths[0]
        part.append(column)
        used += _GAP + widths[column]
    yield _grid(table, cells, part)


def _grid(table: Table, cells: list[list[str]], columns: list[int]) -> Grid:
    grid = Grid(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), collapse_padding=True)
    for column in columns:
        grid.add_column(
            Text(cells[0][column]), justify="left" if column in table.left else "right", overflow="fold", style=""
        )
    for row in cells[1:]:
        grid.add_row(*(Text(row[column]) for column in columns))
    return grid


def _side_by_side(block: SideBySide) -> RenderableType:
    grid = Grid(box=box.SIMPLE, show_header=False, pad_edge=False, show_lines=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for passage in block.passages:
        grid.add_row(
            Text(printable(passage.author)),
            Group(
                Text("\n".join(printable_lines(passage.text))),
                Text(f"({printable(passage.remark)})", style="dim"),
            ),
        )
    beginning = Text("\n".join(printable_lines(block.beginning)), style="italic")
    return Padding(Group(beginning, grid), (1, 0, 0, 0))
