"""The records of evaluations, beside the versions: evaluations/<version>/<method digest>.json.

A version never changes, so what is measured of it later stands here. The evaluation defines what a record holds; this
module reads only its figures on held-out text.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

from shared.errors import CorruptCheckpoint, NotFound, UnreadableCheckpoint
from shared.registry.manifest import LATEST_S, VersionManifest
from shared.registry.store import Store

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
    """The records of one registry. Methods that write raise `FailedPrecondition` if the store fails."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # The figures of each version, as long as the stamp of its group stays the same.
        self._known: dict[int, tuple[Hashable, Sequence[Figures]]] = {}

    def write(self, number: int, method_digest: str, text: str) -> None:
        """Writes or replaces a record; does nothing if the version was removed in the meantime."""
        if self._store.exists(f"versions/{number}"):
            self._store.change(_group(number), lambda _: {f"{method_digest}.json": text})

    def read(self, number: int, method_digest: str) -> str:
        """Returns the text of a record; raises `NotFound` if there is none."""
        try:
            return self._store.read(_group(number))[f"{method_digest}.json"]
        except (KeyError, CorruptCheckpoint):
            raise NotFound(f"Version {number} has no evaluation {method_digest[:12]}.") from None

    def remove(self, number: int) -> None:
        """Removes the records of a version."""
        self._store.drop(_group(number))

    def figures(self, number: int) -> Sequence[Figures]:
        """Returns the figures of each record of a version that has some, the newest last; ignores other texts.

        Raises `UnreadableCheckpoint` if one cannot be read.
        """
        texts = self._store.read(_group(number))
        found = []
        for name in texts:
            if match := _RECORD.fullmatch(name):
                try:
                    found.append(_figures_of(match[1], texts.get(name, "")))
                except UnreadableCheckpoint:
                    raise
                except CorruptCheckpoint:
                    continue
        return sorted((each for each in found if each is not None), key=lambda each: each.measured_at)

    def of(self, versions: Sequence[VersionManifest]) -> dict[int, Sequence[Figures]]:
        """Returns the figures of each version that has some, the newest last.

        Those of another version that had the same number before do not count.
        """
        stamps = self._store.stamps("evaluations")
        known: dict[int, tuple[Hashable, Sequence[Figures]]] = {}
        for number in (version.version for version in versions if str(version.version) in stamps):
            stamp, before = stamps[str(number)], self._known.get(number)
            if before is None or before[0] != stamp:
                with suppress(CorruptCheckpoint):  # the figures that were read before stay
                    before = (stamp, self.figures(number))
            if before is not None:
                known[number] = before
        self._known = known
        found = {
            version.version: [each for each in known[version.version][1] if each.version_digest == version.digest]
            for version in versions
            if version.version in known
        }
        return {number: figures for number, figures in found.items() if figures}


def _group(number: int) -> str:
    return f"evaluations/{number}"


def _figures_of(method_digest: str, record_text: str) -> Figures | None:
    try:
        record = json.loads(record_text)
        text, method, digest = record["text"], record["method"]["text"], record["version"]["digest"]
        interval = text["interval"]
        figures = Figures(
            method_digest=method_digest,
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
