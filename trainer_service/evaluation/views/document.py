"""A report as plain values: sections of notes, tables, plots and texts side by side."""

from dataclasses import dataclass

from shared.text import printable


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table whose rows have a cell for each heading; the columns in `left` hold words, the others numbers."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    colour: lines with the same number have the same colour; None for a thin line without markers behind the others.
    dashed, markers: how the line is drawn, besides its colour.
    y: a value of NaN leaves a gap.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: int | None
    dashed: bool = False
    markers: bool = True


@dataclass(frozen=True)
class Mark:
    """A short text at a point of a plot, in the colour of a line."""

    text: str
    x: float
    y: float
    colour: int


@dataclass(frozen=True)
class Plot:
    """Lines over one axis; `description` says in words what the plot shows.

    names: the names of the places 0, 1, 2 … on the horizontal axis; without them it has numbers.
    from_zero: whether the vertical axis begins at 0.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    names: tuple[str, ...] = ()
    from_zero: bool = False
    log_x: bool = False


@dataclass(frozen=True)
class Passage:
    """A text with its author and a remark on it."""

    author: str
    text: str
    remark: str


@dataclass(frozen=True)
class SideBySide:
    """A beginning and what several authors made of it."""

    beginning: str
    passages: tuple[Passage, ...]


Block = Note | Table | Plot | SideBySide


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A title, a sentence about the whole, and sections."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def printable_lines(text: str) -> list[str]:
    """Returns the lines of a text from outside, without characters that control a terminal or a page."""
    return [printable(line) for line in text.split("\n")]
