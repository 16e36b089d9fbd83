"""Versions that jobs wait for: the text `holds/<job>` names them, and protects them from removal.

It contains numbers, and labels `run:<name>`, each of which stands for the best version that the run has at any time.
"""

import re
import time
from contextlib import suppress

from shared.errors import CorruptCheckpoint
from shared.registry.decisions import run_of
from shared.registry.manifest import RUN_NAME
from shared.registry.numbering import is_number
from shared.registry.store import Store, Texts

_GROUP = "holds"
_JOB = re.compile(r"[0-9A-Za-z_-]{1,64}")
# No job waits longer, so an older hold no longer counts.
_LONGEST_S = 30 * 24 * 3600.0


class Holds:
    """The holds of one registry. Methods that write raise `FailedPrecondition` if the store fails."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, job: str, *names: int | str) -> None:
        """Holds versions for a job; from then on they cannot be removed, unless they were removed before."""
        self._store.change(_GROUP, lambda _: {job: " ".join(map(str, names))})

    def hand_over(self, job: str, other: str) -> None:
        """Moves the hold of a job to another job, which needs no space on a disk."""
        self._store.change(_GROUP, lambda texts: {job: None, other: texts[job]})

    def remove(self, job: str) -> None:
        """Removes the hold of a job, if it has one."""
        if job in self._store.read(_GROUP):
            self._store.change(_GROUP, lambda _: {job: None})

    def ages_s(self) -> dict[str, float]:
        """Returns the age of each hold, by its job."""
        return _ages_s(self._store.read(_GROUP))

    def jobs(self) -> dict[int, str]:
        """Returns the versions that are held by their numbers, each with one job that waits for it."""
        return {int(name): job for name, job in self._names().items() if is_number(name)}

    def runs(self) -> dict[str, str]:
        """Returns the runs whose best versions are held, each with one job that waits for it."""
        return {run: job for name, job in self._names().items() if (run := run_of(name)) is not None}

    def _names(self) -> dict[str, str]:
        held: dict[str, str] = {}
        texts = self._store.read(_GROUP)
        for job, age_s in _ages_s(texts).items():
            with suppress(CorruptCheckpoint):
                names = texts.get(job, "").split(" ")
                if age_s < _LONGEST_S and all(map(_is_name, names)):
                    held |= dict.fromkeys(names, job)
        return held


def _ages_s(texts: Texts) -> dict[str, float]:
    now = time.time()
    written_at = {job: texts.written_at(job) for job in texts if _JOB.fullmatch(job)}
    # Another process may have removed one in the meantime.
    return {job: now - at for job, at in written_at.items() if at}


def _is_name(text: str) -> bool:
    run = run_of(text)
    return is_number(text) if run is None else RUN_NAME.fullmatch(run) is not None
