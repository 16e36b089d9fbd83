"""A document with every kind of block, whose texts from outside mean something to each view."""

from trainer_service.evaluation.views.document import (
    Line,
    Mark,
    Note,
    Passage,
    Plot,
    Report,
    Section,
    SideBySide,
    Table,
)

EVIL = '<script>alert("1")</script> & **bold** |`x`| [a](http://b) $x^2$ \x1b[31m\u202e'

PLOT = Plot(
    "Loss",
    "It falls.",
    "tokens",
    "nats per token",
    (
        Line("one", (1.0, 10.0, 100.0), (3.0, 2.0, 1.5), 0),
        Line("one, estimated", (1.0, 100.0), (3.0, 1.5), 0, dashed=True, markers=False),
        Line("two", (1.0, 100.0), (2.5, 1.0), 7),
    ),
    (Mark("7", 10.0, 2.0, 0),),
    log_x=True,
)
WIDE = Table(("figure", *(f"version {number:09}" for number in range(12))), (("loss", *("2.5" for _ in range(12))),))


def document(text: str = "The cat ran.\nIt slept.") -> Report:
    """Returns a report whose texts from outside are all `text`."""
    passages = (Passage("version 3", text, "seed 1"), Passage("version 7", text, "seed 1"))
    return Report(
        f"Title {text}",
        f"Subtitle {text}",
        (
            Section("Figures", (Note(text), Table(("", "value"), ((text, "1.5"),)), WIDE, PLOT, PLOT)),
            Section("Texts", tuple(SideBySide(f"{number} {text}", passages) for number in range(4))),
        ),
    )
