"""What the commands of both services do alike: one-sentence errors, tables, stages of work, durations."""

import sys

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from shared.errors import GptloopError, InvalidArgument


def run(app: typer.Typer) -> None:
    """Runs a command; an expected error, and one of the file system, is one sentence and exit code 1, or 2 where the
    call itself was wrong."""
    try:
        app()
    except GptloopError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidArgument) else 1)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}." if error.filename else f"error: {error}", file=sys.stderr)
        sys.exit(1)


def print_table(table: Table) -> None:
    """Prints a table; where no terminal bounds it, every row on one line."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)


def duration(seconds: float) -> str:
    """A span of time in its largest unit, as `17 s`, `4 min`, `3 h`, `12 d`."""
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


class Stages:
    """Shows work that has stages: a live bar on a terminal, a line a stage elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=self._console, transient=True
        )
        self._task = self._progress.add_task("", total=None)
        self._stage = ""

    def __enter__(self) -> "Stages":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, stage: str, fraction: float | None) -> None:
        """Shows a stage and how much of it is done, from 0 to 1."""
        total = 1.0 if fraction is not None else None
        self._progress.update(self._task, description=stage, total=total, completed=fraction or 0.0)
        if stage != self._stage and not self._console.is_terminal:
            self._console.print(stage, markup=False, highlight=False)
        self._stage = stage
