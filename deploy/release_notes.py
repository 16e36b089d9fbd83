"""Prints the notes of a release from CHANGELOG.md: `python -m deploy.release_notes v1.2.3`, in the project's folder."""

import re
import sys
import tomllib
from pathlib import Path

_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
_TAG = re.compile(r"v(\d+\.\d+\.\d+)")


def notes(tag: str, changelog: str, version: str) -> str:
    """Returns the section of a tag in a changelog, with each entry on one line, because releases keep line breaks.

    version: the version in pyproject.toml. Raises `ValueError` with a sentence if the three do not fit together.
    """
    found = _TAG.fullmatch(tag)
    if found is None:
        raise ValueError(f"The tag is {tag!r}, but must be like v1.2.3.")
    if found[1] != version:
        raise ValueError(f"The tag is {tag}, but the version in pyproject.toml is {version}.")
    (_, *parts) = _HEADING.split(changelog)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    for heading, text in sections.items():
        if re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading):
            if not text.strip():
                raise ValueError(f"CHANGELOG.md has no entries under {heading!r}.")
            return re.sub(r"\n +", " ", text.strip()) + "\n"
    raise ValueError(f"CHANGELOG.md has no heading like '## {version} (2026-12-31)'.")


def main(arguments: list[str]) -> int:
    """Prints the notes of the tag in the arguments; returns the exit code."""
    try:
        (tag,) = arguments or ("",)
        version = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        print(notes(tag, Path("CHANGELOG.md").read_text(encoding="utf-8"), version), end="")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
