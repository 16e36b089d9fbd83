"""Which version a label names."""

from collections.abc import Collection, Sequence

from shared.registry.manifest import VersionManifest


def latest(versions: Sequence[VersionManifest]) -> VersionManifest | None:
    """The newest version."""
    return max(versions, key=lambda version: version.version, default=None)


def ranking(versions: Sequence[VersionManifest]) -> list[VersionManifest]:
    """The versions judged on the newest version's evaluation set: lowest bits per byte first, then the newest."""
    newest = latest(versions)
    comparable = [version for version in versions if newest and version.evaluation_set == newest.evaluation_set]
    return sorted(comparable, key=lambda version: (version.bits_per_byte, -version.version))


def labels(
    versions: Sequence[VersionManifest],
    refused: Collection[int] = (),
    stable: int | None = None,
    pinned: int | None = None,
) -> dict[str, int]:
    """Every label that names a version now.

    `best` and `latest` follow from the manifests, but `best` never names a version that must not serve; `stable` and
    `pinned` are what somebody decided.
    """
    named: dict[str, int] = {}
    deserving = ranking([version for version in versions if version.version not in refused])
    newest = latest(versions)
    if deserving:
        named["best"] = deserving[0].version
    if newest is not None:
        named["latest"] = newest.version
    numbers = {version.version for version in versions}
    if stable in numbers:
        named["stable"] = stable
    if pinned in numbers:
        named[f"pinned:{pinned}"] = pinned
    return named
