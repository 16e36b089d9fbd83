"""The command that shows the history of a run."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import InvalidArgument
from shared.service import cli
from shared.service.lists import JsonOption
from shared.service.settings import read_directories
from trainer_service.run_history import print_history, write_csv, write_events

app = cli.new_app(None)


@app.command()
def history(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The name of the run, as `gptloop runs` lists it.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every row as CSV.")] = False,
    as_json: JsonOption = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write TensorBoard's event files to DIR/RUN.")
    ] = None,
) -> None:
    """Show what a run has reported, or export it for plots.

    These are losses, rate, speed and memory over its steps. They come from the registry, and stay as long as a state or
    a version of the run. Export a run again to see its later steps in TensorBoard: the new event file replaces the old
    one.

    \b
    Examples:
      gptloop history wide
      gptloop history wide --csv > wide.csv
      gptloop history wide --tensorboard boards
    """
    if as_csv + as_json + (tensorboard is not None) > 1:
        raise InvalidArgument("Give only one of --csv, --json and --tensorboard: each writes the whole history.")
    found = read_directories(os.environ).open_registry().histories.read(run)
    if tensorboard is not None:
        folder = write_events(found, tensorboard)
        count = len(found.lines)
        print(
            f"{count:,} reports and evaluations are in {folder}: show them with `tensorboard --logdir {tensorboard}`."
        )
    elif as_csv:
        write_csv(found, sys.stdout)
    else:
        print_history(found, as_json)
