"""Whether a version has learned enough to teach, or to be taught further. Loads no model framework."""

from shared.errors import FailedPrecondition
from shared.registry.manifest import VersionManifest

# The most bits per byte of such a version on its held-out text. Token frequencies alone give 1.96 to 2.03 (built-in
# stories) and 2.17 to 2.38 (TinyStories V2), pairs of tokens 0.85 and 1.45 to 1.52; a demo falls below the limit after
# 30 to 40 of its steps on the built-in stories, and after 100 to 120 on TinyStories.
MOST_BITS_PER_BYTE = 1.75


def require_trained(version: VersionManifest, force: bool) -> None:
    """Raises `FailedPrecondition` if a version may know no more than how frequent words are, unless `force`."""
    if force or version.bits_per_byte <= MOST_BITS_PER_BYTE:
        return
    raise FailedPrecondition(
        f"Version {version.version} has {version.bits_per_byte:.2f} bits per byte, but a teacher, or a version that "
        f"teachers improve, needs at most {MOST_BITS_PER_BYTE:g}: a model that is hardly trained teaches and keeps "
        "noise. Train it for longer, or use it all the same with --force (FORCE=1)."
    )
