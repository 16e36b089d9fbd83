"""Removes prepared tokens that no run has used for a month; they can be prepared again."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

# Tokens are removed if no run has started with them for this long.
UNUSED_S = 30 * 24 * 3600.0


def mark_used(folder: Path) -> None:
    """Records that a run starts with a set of tokens."""
    with suppress(OSError):  # the folder does not exist yet, or belongs to another user
        os.utime(folder)


def remove_unused(directory: Path) -> None:
    """Removes the sets that no run has started with for `UNUSED_S`; a run that reads one can still read it."""
    for folder in directory.glob("*"):
        with suppress(OSError):  # another process may be removing it
            if time.time() - folder.stat().st_mtime > UNUSED_S:
                shutil.rmtree(folder)
