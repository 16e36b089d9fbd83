"""Draws the loss of a run as text for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

# Dots of a Braille character, from its upper left to its lower right one: 4 rows of 2 (Unicode, U+2800).
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_LABEL = 7
_NARROWEST = 12


@dataclass(frozen=True)
class Point:
    """A loss at a step."""

    step: int
    loss: float


def draw(
    training: Sequence[Point], held_out: Sequence[Point], width: int, height: int, is_unicode: bool = True
) -> list[str]:
    """Returns `height` lines of at most `width` characters: the two curves, their axes, and which is which.

    A point stands for the mean of the training losses in its column, a mark for a held-out loss. Both axes are linear.
    Returns no line without two steps to draw, or without room. `is_unicode` allows more than ASCII.
    """
    training, held_out = ([each for each in points if isfinite(each.loss)] for points in (training, held_out))
    steps = [each.step for each in (*training, *held_out)]
    columns, rows = width - _LABEL, height - 2
    if columns < _NARROWEST or rows < 2 or len(set(steps)) < 2:
        return []
    first, last = min(steps), max(steps)
    losses = [each.loss for each in (*training, *held_out)]
    lowest, highest = min(losses), max(losses)
    canvas = _Canvas(columns, rows, is_unicode)

    def place(point: Point) -> tuple[float, float]:
        fall = (highest - point.loss) / ((highest - lowest) or 1.0)
        return (point.step - first) / (last - first), fall

    canvas.draw_dots([place(each) for each in training])
    canvas.draw_marks([place(each) for each in held_out])
    labels = [""] * rows
    labels[0], labels[-1] = f"{highest:.2f}", f"{lowest:.2f}"
    dot, mark = canvas.signs
    names = [f"{dot} training"] if training else []
    names += [f"{mark} held-out"] if held_out else []
    end = str(last)
    lines = [
        " " * _LABEL + f"loss: {', '.join(names)}",
        *(f"{label:>{_LABEL - 1}} {line}".rstrip() for label, line in zip(labels, canvas.lines(), strict=True)),
        " " * _LABEL + f"step {first}".ljust(columns - len(end)) + end,
    ]
    return [line[:width] for line in lines]


class _Canvas:
    """Characters, each of several dots; places are from (0, 0), the upper left corner, to (1, 1)."""

    def __init__(self, columns: int, rows: int, is_unicode: bool) -> None:
        self._columns, self._rows = columns, rows
        self._across, self._down = (2, 4) if is_unicode else (1, 1)
        self._is_unicode = is_unicode
        self.signs = ("⠒", "●") if is_unicode else (".", "o")
        self._dots = set[tuple[int, int]]()
        self._marks = set[tuple[int, int]]()

    def draw_dots(self, places: Sequence[tuple[float, float]]) -> None:
        """Draws a dot in each column of dots that has places, at their mean, and joins neighbouring dots."""
        columns, rows = self._columns * self._across, self._rows * self._down
        falls: dict[int, list[float]] = {}
        for along, fall in places:
            falls.setdefault(round(along * (columns - 1)), []).append(fall)
        before: tuple[int, int] | None = None
        for column in sorted(falls):
            row = round(sum(falls[column]) / len(falls[column]) * (rows - 1))
            for between in range(before[0] if before else column, column + 1):
                share = 1.0 if before is None or column == before[0] else (between - before[0]) / (column - before[0])
                self._dots.add((between, round(row if before is None else before[1] + share * (row - before[1]))))
            before = column, row

    def draw_marks(self, places: Sequence[tuple[float, float]]) -> None:
        """Draws a character at each place."""
        for along, fall in places:
            self._marks.add((round(along * (self._columns - 1)), round(fall * (self._rows - 1))))

    def lines(self) -> list[str]:
        """Returns the rows of characters."""
        return ["".join(self._character(column, row) for column in range(self._columns)) for row in range(self._rows)]

    def _character(self, column: int, row: int) -> str:
        dot, mark = self.signs
        if (column, row) in self._marks:
            return mark
        if not self._is_unicode:
            return dot if (column, row) in self._dots else " "
        bits = sum(
            bit
            for down, line in enumerate(_BRAILLE)
            for across, bit in enumerate(line)
            if (column * 2 + across, row * 4 + down) in self._dots
        )
        return chr(0x2800 + bits) if bits else " "
