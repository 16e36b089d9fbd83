"""Whether a version has learned enough to teach, or to be taught further. Loads no model framework."""

from shared.errors import FailedPrecondition
from shared.registry.manifest import VersionManifest

# The most bits per byte of such a version on its held-out text. Measured on the built-in stories and on 1.4 MB of
# TinyStories, with vocabularies of 2048 to 50257 tokens: token frequencies alone give 1.96 to 2.03 and 2.17 to 2.38,
# pairs of tokens 0.85 and 1.45 to 1.52; the preset demo passes the limit at the steps 31 and 107 of its 400.
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
