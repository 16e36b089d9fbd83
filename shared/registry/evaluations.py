"""The records of evaluations, beside the versions: evaluations/<version>/<method digest>.json.

A version never changes, so what is measured of it later stands here. The evaluation defines what a record holds; this
module reads only its figures on held-out text.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import NotFound
from shared.registry.commit import make_folder, replace_text, writing
from shared.registry.numbering import children

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """The figures of a record on a whole held-out text of `tokens` tokens.

    `low` and `high` are the ends of the confidence interval of `nats_per_token`; None if there is no interval.
    `measured_at` is in seconds since the epoch.
    """

    method_digest: str
    tokens: int
    nats_per_token: float
    low: float | None
    high: float | None
    perplexity: float
    bits_per_byte: float
    measured_at: float


class Evaluations:
    """The records of one registry. Methods that write raise `FailedPrecondition` if the disk fails."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # What each file holds, as long as its inode and its time stay the same.
        self._known: dict[Path, tuple[tuple[int, int], Figures | None]] = {}

    def folder(self, number: int) -> Path:
        """Returns the folder of a version's records, which may not exist."""
        return self._root / "evaluations" / str(number)

    def write(self, number: int, method_digest: str, text: str) -> None:
        """Writes or replaces a record; does nothing if the version was removed in the meantime."""
        if not (self._root / "versions" / str(number)).is_dir():
            return
        with writing(self._root):
            make_folder(self.folder(number), self._root)
            replace_text(self.path(number, method_digest), text)

    def path(self, number: int, method_digest: str) -> Path:
        """Returns the file of a record, which may not exist."""
        return self.folder(number) / f"{method_digest}.json"

    def read(self, number: int, method_digest: str) -> str:
        """Returns the text of a record; raises `NotFound` if there is none."""
        try:
            return self.path(number, method_digest).read_text(encoding="utf-8")
        except OSError:
            raise NotFound(f"Version {number} has no evaluation {method_digest[:12]}.") from None

    def figures(self, number: int) -> Sequence[Figures]:
        """Returns the figures of each record of a version that has some, the newest last; ignores other files."""
        found = [self._figures(path) for path in children(self.folder(number)) if path.suffix == ".json"]
        return sorted((each for each in found if each is not None), key=lambda each: each.measured_at)

    def _figures(self, path: Path) -> Figures | None:
        try:
            status = path.stat()
            state = (status.st_ino, status.st_mtime_ns)
            if self._known.get(path, (None, None))[0] != state:
                self._known[path] = (state, _figures_of(path))
            return self._known[path][1]
        except OSError:
            return None


def _figures_of(path: Path) -> Figures | None:
    try:
        record = json.loads(path.read_bytes())
        text, method = record["text"], record["method"]["text"]
        interval = text["interval"]
        figures = Figures(
            method_digest=path.stem,
            tokens=int(method["tokens"]),
            nats_per_token=float(text["nats_per_token"]),
            low=None if interval is None else float(interval["low"]),
            high=None if interval is None else float(interval["high"]),
            perplexity=float(text["perplexity"]),
            bits_per_byte=float(text["bits_per_byte"]),
            measured_at=float(record["measured_at"]["text"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # of an older program, or not complete yet
    return figures if math.isfinite(figures.bits_per_byte) else None
