"""A report as one HTML file that needs no network and no script."""

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from itertools import count, groupby

from trainer_service.evaluation.views.document import (
    Block,
    Line,
    Note,
    Plot,
    Report,
    Section,
    SideBySide,
    Table,
    printable_lines,
)
from trainer_service.evaluation.views.plots import COLOURS, draw, marker_of

# The browser itself refuses everything that the file does not hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# The form of each marker around the point 16, 6.
_FORMS = {
    "o": "M12.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "s": "M13 3h6v6h-6z",
    "^": "M16 2l4 7h-8z",
    "D": "M16 2l4 4l-4 4l-4-4z",
    "v": "M16 10l4-7h-8z",
    "P": "M14.7 2h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
}


def to_html(report: Report) -> str:
    """Returns the text of an HTML file; everything from outside is escaped."""
    names = (f"plot{number}" for number in count(1))
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    sections = "\n".join(line for section in report.sections for line in _section(section, names))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_text(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_text(report.title)}</h1>
<p class="subtitle">{_text(report.subtitle)}</p>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _section(section: Section, names: Iterator[str]) -> Iterator[str]:
    yield f"<section>\n<h2>{_text(section.title)}</h2>"
    # Plots that follow each other share a row.
    for is_plot, blocks in groupby(section.blocks, lambda block: isinstance(block, Plot)):
        lines = "\n".join(_block(block, names) for block in blocks)
        yield f'<div class="plots">\n{lines}\n</div>' if is_plot else lines
    yield "</section>"


def _block(block: Block, names: Iterator[str]) -> str:
    match block:
        case Note():
            return f"<p>{_text(block.text)}</p>"
        case Table():
            return _table(block)
        case Plot():
            return _plot(block, next(names))
        case SideBySide():
            return _side_by_side(block)


def _table(table: Table) -> str:
    def row(tag: str, cells: tuple[str, ...]) -> str:
        classes = [' class="left"' if column in table.left else "" for column in range(len(cells))]
        return "".join(f"<{tag}{name}>{_text(cell)}</{tag}>" for name, cell in zip(classes, cells, strict=True))

    rows = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in table.rows)
    # A scrolling area takes the focus, so that a keyboard can scroll it.
    return (
        f'<div class="table" tabindex="0"><table>\n<thead><tr>{row("th", table.headings)}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _plot(plot: Plot, name: str) -> str:
    svg = draw(plot, name).replace("<svg ", f'<svg role="img" aria-label="{_text(plot.description)}" ', 1)
    keys = "\n".join(f"<li>{_key(line)}{_text(line.name)}</li>" for line in plot.lines)
    return (
        f"<figure>\n<figcaption>{_text(plot.title)}</figcaption>\n"
        f'<ul class="keys">\n{keys}\n</ul>\n{svg}\n<p>{_text(plot.description)}</p>\n</figure>'
    )


def _key(line: Line) -> str:
    """Draws how a line looks."""
    colour = "var(--quiet)" if line.colour is None else f"var(--line-{line.colour % COLOURS})"
    marker = marker_of(line)
    dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
    form = f'<path d="{_FORMS[marker]}" style="fill:{colour}"/>' if marker else ""
    return (
        f'<svg viewBox="0 0 32 12" aria-hidden="true"><path d="M0 6h32" fill="none" '
        f'style="stroke:{colour}" stroke-width="{2 if marker else 1}"{dashes}/>{form}</svg>'
    )


def _side_by_side(block: SideBySide) -> str:
    texts = "\n".join(
        f'<section>\n<h3>{_text(passage.author)}</h3>\n<p dir="auto">{_text(passage.text)}</p>\n'
        f'<p class="remark">{_text(passage.remark)}</p>\n</section>'
        for passage in block.passages
    )
    return (
        f'<details open>\n<summary dir="auto">{_text(block.beginning)}</summary>\n'
        f'<div class="texts">\n{texts}\n</div>\n</details>'
    )


def _text(text: str) -> str:
    return escape("\n".join(printable_lines(text)))
