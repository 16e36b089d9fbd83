"""Draws a plot as SVG for a page: text stays text, and the page chooses the colours."""

import re
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from trainer_service.evaluation.views.document import Line, Plot

# The page declares this many colours for lines, `--line-0` to `--line-5`.
COLOURS = 6
# One for each of them, because colours alone do not tell lines apart for everybody.
_MARKERS = "os^DvP"
# Small, so that the text can be read on a phone, where a plot has about 330 pixels.
_SIZE_INCHES = (4.7, 3.1)
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#0f0f0a",
    "axes.grid": True,
    "axes.labelcolor": "#0f0f0a",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "#0f0f0b",
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.color": "#0f0f0a",
    "text.parse_math": False,
    "xtick.color": "#0f0f0a",
    "ytick.color": "#0f0f0a",
}
# What matplotlib draws with, and what the page is to use instead.
_VARIABLES = {
    "#0f0f0a": "var(--text)",
    "#0f0f0b": "var(--rule)",
    "#0f0f0c": "var(--quiet)",
    **{f"#0f0f0{number}": f"var(--line-{number})" for number in range(COLOURS)},
}
# Matplotlib's identifiers are unique in one picture, not in a page with several.
_IDENTIFIER = re.compile(r'(\bid="|href="#|url\(#)')


def draw(plot: Plot, name: str) -> str:
    """Returns a plot as an SVG element without its title and the names of its lines.

    name: begins all identifiers in the element; must be unique in the page.
    """
    # The salt makes the same plot the same text.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        _fill(figure.subplots(), plot)
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Without its own width and height, it fills the width that the page gives it.
    svg = re.sub(r'\b(width|height)="[\d.]+pt" ?', "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return _IDENTIFIER.sub(rf"\g<1>{name}-", svg)


def marker_of(line: Line) -> str | None:
    """Returns matplotlib's name of the marker of a line, if it has one."""
    return _MARKERS[line.colour % COLOURS] if line.markers and line.colour is not None else None


def _fill(axes: Axes, plot: Plot) -> None:
    for line in plot.lines:
        colour = None if line.colour is None else line.colour % COLOURS
        axes.plot(
            line.x,
            line.y,
            color="#0f0f0c" if colour is None else f"#0f0f0{colour}",
            linewidth=1.6 if marker_of(line) else 0.9,
            linestyle="--" if line.dashed else "-",
            marker=marker_of(line),
            markersize=4,
        )
    for mark in plot.marks:
        axes.annotate(
            mark.text,
            (mark.x, mark.y),
            # Above one line and below the next, because versions of several runs often have as many tokens.
            xytext=(0, -14 if mark.colour % 2 else 7),
            textcoords="offset points",
            ha="center",
            color=f"#0f0f0{mark.colour % COLOURS}",
            weight="bold",
        )
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if plot.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if plot.names:
        axes.set_xticks(range(len(plot.names)), plot.names)
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if plot.from_zero:
        axes.set_ylim(bottom=0)
