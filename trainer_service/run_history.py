"""The history of a run for people and for other programs: a table, CSV, JSON, TensorBoard's event files."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TextIO

from shared.registry.history import EvaluationLine, History, ReportLine
from shared.service.lists import Column, print_list
from shared.text import format_duration, format_size

_TABLE_ROWS = 20
# Marks the event files that an export may replace.
_SUFFIX = ".gptloop"
_TAGS = {
    "loss": "loss/training",
    "validation_loss": "loss/held_out",
    "bits_per_byte": "loss/bits_per_byte",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "active_memory_bytes": "memory/active_bytes",
    "peak_memory_bytes": "memory/peak_bytes",
    "resident_memory_bytes": "memory/resident_bytes",
}

# The values of a step, those of its report and those of its evaluation, by name.
Row = Mapping[str, float | None]
NAMES = tuple(dict.fromkeys(each.name for kind in (ReportLine, EvaluationLine) for each in fields(kind)))


def rows(history: History) -> list[Row]:
    """Returns a row for each step with a report or an evaluation; values that are missing are None."""
    by_step: dict[int, dict[str, float | None]] = {}
    for line in reversed(history.lines):
        by_step.setdefault(line.step, dict.fromkeys(NAMES)).update(vars(line))
    return [by_step[step] for step in sorted(by_step)]


def write_csv(history: History, file: TextIO) -> None:
    """Writes a line for each row, below a line with the names."""
    writer = csv.DictWriter(file, NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(history))


def write_events(history: History, directory: Path) -> Path:
    """Writes the history as an event file of TensorBoard, and returns its folder, which has the name of the run.

    The file replaces those of earlier exports of the run.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    folder = directory.absolute() / history.run
    folder.mkdir(parents=True, exist_ok=True)
    earlier = set(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
    # The writer of single events; the library's usual one swallows the errors of the disk on a thread.
    writer = EventsWriter(str(folder / "events"), _SUFFIX)
    for line in history.lines:
        for name, tag in _TAGS.items():
            if name in vars(line):
                summary = scalar(tag, getattr(line, name))
                writer.write_event(Event(wall_time=line.time, step=line.step, summary=summary))
    writer.close()
    for path in earlier - {Path(writer._file_name)}:
        path.unlink(missing_ok=True)
    return folder


def print_history(history: History, as_json: bool) -> None:
    """Prints all rows as JSON, or at most `_TABLE_ROWS` of them as a table, preferably of evaluations."""
    every = rows(history)
    chosen = every if as_json else _spread(every)
    began = every[0]["time"] or 0.0 if every else 0.0
    columns = (
        _column("step", "step", "{:,}"),
        _column("tokens", "tokens", "{:,}", 4),
        _column("training loss", "loss", "{:.4f}"),
        _column("held-out loss", "validation_loss", "{:.4f}"),
        _column("bits per byte", "bits_per_byte", "{:.4f}", 2),
        _column("version", "version", "{}", 1),
        _column("rate", "learning_rate", "{:.1e}", 5),
        _column("gradient norm", "gradient_norm", "{:.3f}", 7),
        _column("tokens/s", "tokens_per_second", "{:,.0f}", 3),
        _column("", "active_memory_bytes"),
        Column[Row](
            "memory",
            lambda row: row["peak_memory_bytes"],
            lambda row: "" if row["peak_memory_bytes"] is None else format_size(row["peak_memory_bytes"]),
            key="peak_memory_bytes",
            rank=6,
            right=True,
        ),
        _column("", "resident_memory_bytes"),
        Column[Row](
            "after",
            lambda row: row["time"],
            lambda row: format_duration((row["time"] or 0.0) - began),
            key="time",
            rank=4,
            right=True,
        ),
        _column("attempt", "attempt", "{}", 8),
    )
    print_list(chosen, columns, as_json=as_json, empty=f"The history of {history.run} has no line yet.")
    if not as_json and len(chosen) < len(every):
        print(f"{len(chosen)} of {len(every):,} rows; `gptloop history {history.run} --csv` prints all.")


def _spread(every: Sequence[Row]) -> Sequence[Row]:
    """Returns at most `_TABLE_ROWS` rows, evenly spread over the first, the last and those of evaluations."""
    if len(every) <= _TABLE_ROWS:
        return every
    telling = [row for row in every if row["validation_loss"] is not None or row is every[0] or row is every[-1]]
    if len(telling) <= _TABLE_ROWS // 2:
        telling = list(every)
    if len(telling) <= _TABLE_ROWS:
        return telling
    last = len(telling) - 1
    return [telling[round(place * last / (_TABLE_ROWS - 1))] for place in range(_TABLE_ROWS)]


def _column(heading: str, name: str, form: str = "", rank: int = 0) -> Column[Row]:
    def text(row: Row) -> str:
        return "" if row[name] is None else form.format(row[name])

    return Column(heading, lambda row: row[name], text, key=name, rank=rank, right=True)
