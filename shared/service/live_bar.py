"""A progress bar followed by facts, on one line that always fits the terminal."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESHES_PER_SECOND = 8
_NARROWEST = 8
_WIDEST = 24
_GAP = "  "


class LiveBar:
    """Shows progress on a terminal inside a `with` block; what the console prints appears above the bar.

    The facts are ordered by importance: the line shows as many as fit beside the narrowest bar, and the bar takes the
    remaining room, up to its maximum width. Each frame measures the terminal, so the bar follows a resize.
    `above` is shown above the bar.
    """

    def __init__(self, console: Console, facts: Sequence[str] = ("",), above: RenderableType | None = None) -> None:
        self._above = above
        self._fraction: float | None = None
        self._facts = tuple(facts)
        self._live = Live(
            self, console=console, transient=True, refresh_per_second=_REFRESHES_PER_SECOND, vertical_overflow="crop"
        )

    def __enter__(self) -> "LiveBar":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, fraction: float | None, *facts: str) -> None:
        """Shows the fraction that is done (`None` if it is unknown), and the facts, the most important one first."""
        self._fraction, self._facts = fraction, facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._above is not None:
            yield self._above
        # A terminal wraps a line that fills it, and then cannot draw over it.
        room = options.max_width - 1
        share = "" if self._fraction is None else f"{self._fraction:5.0%}"
        behind = f"{share}{_GAP}{fitting(self._facts, room - _NARROWEST - len(share + _GAP))}"
        bar = min(_WIDEST, room - cell_len(behind))
        if bar < 1:
            yield Text(fitting(self._facts, room), no_wrap=True)
            return
        # The table pads a bar without colors, which would be shorter.
        line = Table.grid()
        line.add_column(width=bar)
        line.add_column(no_wrap=True)
        line.add_row(ProgressBar(1.0, self._fraction or 0.0, width=bar, pulse=self._fraction is None), Text(behind))
        yield line


def fitting(facts: Sequence[str], room: int) -> str:
    """Joins as many of the first facts as fit into `room` characters; at least one, cut if it is too long."""
    line = ""
    for fact in facts:
        longer = f"{line}{_GAP}{fact}" if line else fact
        if line and cell_len(longer) > room:
            break
        line = longer
    return line if cell_len(line) <= room else set_cell_size(line, max(room, 0)).rstrip()
