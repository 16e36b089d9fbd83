"""Which version a label names."""

from collections.abc import Mapping, Sequence

from shared.registry.decisions import Decided, pinned
from shared.registry.manifest import VersionManifest


def latest(versions: Sequence[VersionManifest]) -> VersionManifest | None:
    """The newest version."""
    return max(versions, key=lambda version: version.version, default=None)


def ranking(versions: Sequence[VersionManifest]) -> list[VersionManifest]:
    """The versions judged on the newest version's evaluation set: lowest bits per byte first, then the newest."""
    newest = latest(versions)
    comparable = [version for version in versions if newest and version.evaluation_set == newest.evaluation_set]
    return sorted(comparable, key=lambda version: (version.bits_per_byte, -version.version))


def labels(versions: Sequence[VersionManifest], decided: Decided) -> dict[str, int]:
    """Every label that names a version now.

    `best` and `latest` follow from the manifests, and never name a version that must not serve; `stable` and `pinned`
    are what somebody decided.
    """
    named: dict[str, int] = {}
    deserving = [version for version in versions if version.version not in decided.refused]
    if best := ranking(deserving):
        named["best"] = best[0].version
    if (newest := latest(deserving)) is not None:
        named["latest"] = newest.version
    numbers = {version.version for version in versions}
    if decided.stable in numbers:
        named["stable"] = decided.stable
    if decided.pinned in numbers:
        named[pinned(decided.pinned)] = decided.pinned
    return named


def labels_of(number: int, labels: Mapping[str, int]) -> tuple[str, ...]:
    """Those of all labels that name a version."""
    return tuple(label for label, named in labels.items() if named == number)
