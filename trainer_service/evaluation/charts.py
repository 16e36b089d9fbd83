"""The plots of a report on evaluations. Loads no model framework."""

import math
from collections.abc import Sequence

from shared.registry.history import History
from trainer_service.evaluation.record import Record
from trainer_service.evaluation.views.document import Line, Mark, Plot

# A plot is about this many pixels wide, so more points of a line would not be seen.
_MOST_POINTS = 300


def loss_over_tokens(histories: Sequence[History], records: Sequence[Record]) -> Plot | None:
    """Draws the losses of runs over their tokens, with the versions of the records marked; None without a history."""
    lines, marks, words = list[Line](), list[Mark](), list[str]()
    for colour, history in enumerate(histories):
        reports = [(each.tokens, each.loss) for each in history.reports]
        evaluations = [(each.tokens, each.validation_loss) for each in history.evaluations]
        if reports:
            lines.append(_line(f"{history.run}, training", _thinned(reports), colour, dashed=True, markers=False))
        if evaluations:
            lines.append(_line(f"{history.run}, held-out", _thinned(evaluations), colour))
            words.append(f"{evaluations[-1][1]:.4f} after {evaluations[-1][0]:,} tokens of run {history.run}")
        numbers = {record.version.number for record in records if record.version.run == history.run}
        marks += [
            Mark(str(each.version), each.tokens, each.validation_loss, colour)
            for each in history.evaluations
            if each.version in numbers
        ]
    if not lines:
        return None
    return Plot(
        title="Loss over tokens",
        description=f"The held-out loss that training reported: {'; '.join(words)}. The numbers are versions."
        if words
        else "The loss that training reported.",
        x_label="tokens",
        y_label="nats per token",
        lines=tuple(lines),
        marks=tuple(marks),
        log_x=True,
    )


def loss_by_position(records: Sequence[Record]) -> Plot | None:
    """Draws the loss by position in the window, for records of one method; None without figures on text."""
    found = [(colour, record.version.number, record.text) for colour, record in enumerate(records) if record.text]
    if not found:
        return None
    longest = max((text.positions for _, _, text in found), key=len)
    falls = "; ".join(
        f"from {text.positions[0].nats_per_token:.4f} to {text.positions[-1].nats_per_token:.4f} in version {number}"
        for _, number, text in found
        if text.positions
    )
    return Plot(
        title="Loss by position in the window",
        description=f"From the first to the last positions the loss goes {falls}. It falls if the context is used.",
        x_label="positions",
        y_label="nats per token",
        lines=tuple(
            _line(
                f"version {number}", [(place, each.nats_per_token) for place, each in enumerate(text.positions)], colour
            )
            for colour, number, text in found
        ),
        names=tuple(f"{each.first}-{each.last}" for each in longest),
    )


def decoding_speed(records: Sequence[Record]) -> Plot | None:
    """Draws tokens a second by the number of requests at once; None without measurements."""
    found = [(colour, record.version.number, record.speed) for colour, record in enumerate(records) if record.speed]
    counts = sorted({each.rows for _, _, speed in found for each in speed.decoding})
    if not counts:
        return None
    return Plot(
        title="Speed of serving",
        description="Tokens a second of all requests together, by the number of requests at once.",
        x_label="requests at once",
        y_label="tokens/s",
        lines=tuple(
            _line(
                f"version {number}", [(counts.index(each.rows), each.tokens_per_s) for each in speed.decoding], colour
            )
            for colour, number, speed in found
        ),
        names=tuple(f"{count:,}" for count in counts),
        from_zero=True,
    )


def training_memory(records: Sequence[Record]) -> Plot | None:
    """Draws the peak of training by batch size beside its estimate, for one version of each run; None without any.

    The versions of a run have the same shape, so their memory is the same.
    """
    by_run = {record.version.run: (record.version.number, record.memory) for record in records if record.memory}
    sizes = sorted({each.batch_size for _, memory in by_run.values() for each in memory.training})
    if not sizes:
        return None
    lines = list[Line]()
    for colour, (number, memory) in enumerate(by_run.values()):
        peaks = [(sizes.index(each.batch_size), each.peak_bytes / 2**20) for each in memory.training]
        estimates = [
            (sizes.index(each.batch_size), each.estimated_bytes / 2**20)
            for each in memory.training
            if each.estimated_bytes is not None
        ]
        lines.append(_line(f"version {number}, measured", peaks, colour))
        if estimates:
            lines.append(_line(f"version {number}, estimated", estimates, colour, dashed=True, markers=False))
    return Plot(
        title="Memory of training",
        description="The peak of the process by batch size, beside the estimate that `gptloop train` prints.",
        x_label="batch size",
        y_label="MiB",
        lines=tuple(lines),
        names=tuple(f"{size:,}" for size in sizes),
        from_zero=True,
    )


def _line(
    name: str, points: Sequence[tuple[float, float]], colour: int, *, dashed: bool = False, markers: bool = True
) -> Line:
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return Line(name, tuple(x for x, _ in finite), tuple(y for _, y in finite), colour, dashed, markers)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the means of equal parts of the points, or the points themselves if they are few."""
    size = -(-len(points) // _MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(math.fsum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part)) for part in parts]
