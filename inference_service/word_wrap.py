"""Breaks text that arrives in pieces into lines without breaking its words."""

from rich.cells import cell_len

_TAB = 8


class WordWrap:
    """Wraps one text, piece by piece, whatever the pieces are.

    A word is held back until it has ended, and then printed where it fits; one that is wider than a line is broken.
    Characters of two cells, with which Chinese is written, are words of their own. Widths are in cells.
    """

    def __init__(self) -> None:
        self._column = 0
        # The spaces since the last word; a break replaces them.
        self._gap = ""
        self._word = ""

    def add(self, text: str, width: int) -> str:
        """Adds text; returns what can be printed now, on lines of at most `width` cells."""
        printed = []
        for character in text:
            cells = cell_len(character)
            if character in " \t\n" or cells > 1 or cell_len(self._word) + cells > width:
                printed.append(self.end(width))
            match character:
                case "\n":
                    printed.append("\n")
                    self._column, self._gap = 0, ""
                case "\t":
                    self._gap += " " * (_TAB - (self._column + len(self._gap)) % _TAB)
                case " ":
                    self._gap += " "
                case _:
                    self._word += character
            if cells > 1:
                printed.append(self.end(width))
        return "".join(printed)

    def end(self, width: int) -> str:
        """Returns the word that is held back."""
        if not self._word:
            return ""
        before, cells = self._gap, cell_len(self._word)
        if self._column + len(before) + cells > width:
            before = "\n" if self._column else ""
            self._column = 0
        printed = before + self._word
        self._column += cell_len(printed.removeprefix("\n"))
        self._gap = self._word = ""
        return printed
