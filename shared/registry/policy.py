"""Which version a label names. Nothing is stored: labels follow from the manifests."""

from collections.abc import Sequence

from shared.registry.manifest import VersionManifest


def latest(versions: Sequence[VersionManifest]) -> VersionManifest | None:
    """The newest version."""
    return max(versions, key=lambda version: version.version, default=None)


def ranking(versions: Sequence[VersionManifest]) -> list[VersionManifest]:
    """The versions judged on the newest version's evaluation set: lowest bits per byte first, then the newest."""
    newest = latest(versions)
    comparable = [version for version in versions if newest and version.evaluation_set == newest.evaluation_set]
    return sorted(comparable, key=lambda version: (version.bits_per_byte, -version.version))


def labels(versions: Sequence[VersionManifest]) -> dict[str, int]:
    """The label of each kind that names a version now: `best` and `latest`."""
    newest = latest(versions)
    if newest is None:
        return {}
    return {"best": ranking(versions)[0].version, "latest": newest.version}
