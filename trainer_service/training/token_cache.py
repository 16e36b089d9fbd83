"""Prepared tokens stay as long as some run uses them now and then: they can be made again."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

# What no run has begun with for so long goes.
UNUSED_S = 30 * 24 * 3600.0


def mark_used(folder: Path) -> None:
    """Remembers that a run begins with a set of tokens."""
    with suppress(OSError):  # it is not there yet, or not ours
        os.utime(folder)


def remove_unused(directory: Path) -> None:
    """Removes the sets that no run has used for long; a run that still reads one goes on reading it."""
    for folder in directory.glob("*"):
        with suppress(OSError):  # another process may be at it
            if time.time() - folder.stat().st_mtime > UNUSED_S:
                shutil.rmtree(folder)
