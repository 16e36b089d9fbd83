"""The records of evaluations, beside the versions: evaluations/<version>/<method digest>.json.

A version never changes, so what is measured of it later stands here. The evaluation defines what a record holds; this
module reads only its figures on held-out text.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from shared.errors import NotFound
from shared.registry.commit import make_folder, replace_text, writing
from shared.registry.manifest import LATEST_S, VersionManifest
from shared.registry.numbering import children

_RECORD = re.compile(r"([0-9a-f]{1,128})\.json")
# More tokens are not believed.
_MOST_TOKENS = 2**53


@dataclass(frozen=True)
class Figures:
    """The figures of a record on a whole held-out text of `tokens` tokens.

    `version_digest` is that of the manifest of the version that was measured. `low` and `high` are the ends of the
    confidence interval of `nats_per_token`; None if there is no interval. `measured_at` is in seconds since the epoch.
    """

    method_digest: str
    version_digest: str
    tokens: int
    nats_per_token: float
    low: float | None
    high: float | None
    perplexity: float
    bits_per_byte: float
    measured_at: float


def comparable(found: Mapping[int, Sequence[Figures]]) -> dict[int, Figures]:
    """Returns the figures by the method that most versions have, of equal ones the newest, of each version with it."""
    records = [each for some in found.values() for each in some]
    versions = Counter(each.method_digest for each in records)
    chosen = max(
        records, key=lambda each: (versions[each.method_digest], each.measured_at, each.method_digest), default=None
    )
    return {
        number: each
        for number, some in found.items()
        for each in some
        if chosen is not None and each.method_digest == chosen.method_digest
    }


def one_of_each(found: Mapping[int, Sequence[Figures]]) -> dict[int, Figures]:
    """Returns the comparable figures of each version that has some, and the newest ones of every other version."""
    return {number: some[-1] for number, some in found.items()} | comparable(found)


class Evaluations:
    """The records of one registry. Methods that write raise `FailedPrecondition` if the disk fails."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # The figures in each file, as long as its inode and its time stay the same.
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
            return self.path(number, method_digest).read_text(encoding="utf-8", errors="replace")
        except OSError:
            raise NotFound(f"Version {number} has no evaluation {method_digest[:12]}.") from None

    def figures(self, number: int) -> Sequence[Figures]:
        """Returns the figures of each record of a version that has some, the newest last; ignores other files."""
        found = [self._figures(path) for path in children(self.folder(number)) if _RECORD.fullmatch(path.name)]
        return sorted((each for each in found if each is not None), key=lambda each: each.measured_at)

    def of(self, versions: Sequence[VersionManifest]) -> dict[int, Sequence[Figures]]:
        """Returns the figures of each version that has some, the newest last.

        Those of another version that had the same number before do not count.
        """
        found: dict[int, Sequence[Figures]] = {}
        for version in versions:
            figures = [each for each in self.figures(version.version) if each.version_digest == version.digest]
            if figures:
                found[version.version] = figures
        # Another process may have removed versions.
        present = {str(version.version) for version in versions}
        self._known = {path: known for path, known in self._known.copy().items() if path.parent.name in present}
        return found

    def _figures(self, path: Path) -> Figures | None:
        before = self._known.get(path)
        try:
            status = path.stat()
            state = (status.st_ino, status.st_mtime_ns)
            if before is None or before[0] != state:
                before = self._known[path] = (state, _figures_of(path))
        except FileNotFoundError:
            return None
        except OSError:
            pass  # the figures that were read before stay
        return None if before is None else before[1]


def _figures_of(path: Path) -> Figures | None:
    try:
        record = json.loads(path.read_bytes())
        text, method, digest = record["text"], record["method"]["text"], record["version"]["digest"]
        interval = text["interval"]
        figures = Figures(
            method_digest=path.stem,
            version_digest=digest,
            tokens=int(method["tokens"]),
            nats_per_token=float(text["nats_per_token"]),
            low=None if interval is None else float(interval["low"]),
            high=None if interval is None else float(interval["high"]),
            perplexity=float(text["perplexity"]),
            bits_per_byte=float(text["bits_per_byte"]),
            measured_at=float(record["measured_at"]["text"]),
        )
        numbers = [float(each) for each in astuple(figures) if isinstance(each, int | float)]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # of an older program, or not complete yet
    is_plausible = isinstance(digest, str) and all(map(math.isfinite, numbers)) and min(numbers) >= 0
    return figures if is_plausible and figures.tokens <= _MOST_TOKENS and figures.measured_at < LATEST_S else None
