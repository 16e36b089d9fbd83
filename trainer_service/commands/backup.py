"""The commands `gptloop backup` and `gptloop restore`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from shared.service import cli
from shared.text import format_size
from trainer_service.backup.backup import write_backup
from trainer_service.backup.restore import restore_backup
from trainer_service.commands.options import settings

app = cli.new_app(__doc__)


@app.command()
def backup(file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")]) -> None:
    """Write the registry, the jobs and the stories that were paid for into one file.

    Training and serving go on. Text files outside GPTLOOP_VAR are not in it; prepared text is prepared again. A
    registry in object storage is not in it either.

    Example: gptloop backup /backups/monday.tar
    """
    given = settings()
    contents = write_backup(file.absolute(), given)
    print(
        f"{file}: {format_size(contents.size_bytes)}, {contents.versions:,} versions, {contents.states:,} states, "
        f"{contents.jobs:,} jobs."
    )
    if given.directories.registry_url:
        print(f"The registry {given.directories.registry_url} is not in it: keep versions of the bucket's objects.")


@app.command()
def restore(file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `gptloop backup` wrote.")]) -> None:
    """Restore a backup into a new folder of state and an empty Redis.

    Queued jobs wait as before, and a run that was at work resumes from its last state after `gptloop up`.

    Example: GPTLOOP_VAR=/srv/gptloop gptloop restore /backups/monday.tar
    """
    given = settings()
    description = restore_backup(file.absolute(), given)
    made = time.strftime("%d %B %Y, %H:%M", time.localtime(description.created_at))
    print(f"Restored into {given.directories.var}: the backup of {made}. `gptloop up` goes on from there.")
