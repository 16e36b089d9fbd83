"""Versions that jobs wait for: the file `holds/<job>` names them, and protects them from removal.

It contains numbers, and labels `run:<name>`, each of which stands for the best version that the run has at any time.
"""

import re
import time
from contextlib import suppress
from pathlib import Path

from shared.registry.commit import locked, make_folder, replace_text, writing
from shared.registry.decisions import run_of
from shared.registry.manifest import RUN_NAME
from shared.registry.numbering import children, is_number

_JOB = re.compile(r"[0-9A-Za-z_-]{1,64}")
# No job waits longer, so an older hold no longer counts.
_LONGEST_S = 30 * 24 * 3600.0


class Holds:
    """The holds of one registry. Methods that write raise `FailedPrecondition` if the disk fails."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "holds"

    def add(self, job: str, *names: int | str) -> None:
        """Holds versions for a job; from then on they cannot be removed, unless they were removed before."""
        with writing(self._root):
            make_folder(self._folder, self._root)
            with locked(self._root / "serving.lock"):
                replace_text(self._folder / job, " ".join(map(str, names)))

    def hand_over(self, job: str, other: str) -> None:
        """Moves the hold of a job to another job, which needs no space on the disk."""
        with writing(self._root):
            (self._folder / job).rename(self._folder / other)

    def remove(self, job: str) -> None:
        """Removes the hold of a job, if it has one."""
        with writing(self._root):
            (self._folder / job).unlink(missing_ok=True)

    def ages_s(self) -> dict[str, float]:
        """Returns the age of each hold, by its job."""
        now, found = time.time(), {}
        for path in children(self._folder):
            if _JOB.fullmatch(path.name):
                with suppress(OSError):  # Another process may have removed it.
                    found[path.name] = now - path.stat().st_mtime
        return found

    def jobs(self) -> dict[int, str]:
        """Returns the versions that are held by their numbers, each with one job that waits for it."""
        return {int(name): job for name, job in self._names().items() if is_number(name)}

    def runs(self) -> dict[str, str]:
        """Returns the runs whose best versions are held, each with one job that waits for it."""
        return {run: job for name, job in self._names().items() if (run := run_of(name)) is not None}

    def _names(self) -> dict[str, str]:
        held: dict[str, str] = {}
        for job, age_s in self.ages_s().items():
            with suppress(OSError, ValueError):
                names = (self._folder / job).read_text(encoding="utf-8").split(" ")
                if age_s < _LONGEST_S and all(map(_is_name, names)):
                    held |= dict.fromkeys(names, job)
        return held


def _is_name(text: str) -> bool:
    run = run_of(text)
    return is_number(text) if run is None else RUN_NAME.fullmatch(run) is not None
