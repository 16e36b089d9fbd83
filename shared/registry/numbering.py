"""Numbers as names of folders and in files, and the next number for a version."""

import re
from pathlib import Path

from shared.errors import FailedPrecondition, shown
from shared.registry.commit import replace_text

# The number of a version, which fits into 64 bits.
NUMBER = re.compile("[1-9][0-9]{0,17}")
_MAX_DIGITS = 18


def is_number(name: str) -> bool:
    """Returns whether a version is named by its number, as the registry writes it, and not by a label."""
    return NUMBER.fullmatch(name) is not None


def children(directory: Path) -> list[Path]:
    """Returns the paths in a folder; an empty list if there is no folder. Raises `OSError` if it cannot be read."""
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbers(directory: Path) -> list[int]:
    """Returns the numbers that are names in a folder, in no order."""
    return [number for path in children(directory) if (number := number_of(path)) is not None]


def number_of(path: Path) -> int | None:
    """Returns the number that is the name of a path; None if the registry would not write it in this way."""
    # An imported model has trained for 0 steps.
    return int(path.name) if path.name == "0" or is_number(path.name) else None


def read_number(path: Path, right: str) -> int:
    """Returns the number in a file, 0 if there is no file.

    Raises `FailedPrecondition` if the file contains something else; `right` says what it must contain.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise FailedPrecondition(f"{path} contains {shown(text, 20)}, but must contain {right}.")
    return int(text)


def next_version(root: Path) -> int:
    """Returns the next number for a version of the registry at `root`; call it under the lock of the versions.

    Writes the number into the file `last_version` before its version is visible. So no number is given twice, even if
    versions are removed. Raises `FailedPrecondition` if the file is invalid or no number is left, and `OSError` if the
    disk fails.
    """
    highest, versions = root / "last_version", root / "versions"
    last = read_number(highest, "the highest number that any version ever had; write it there")
    number = 1 + max(last, *numbers(versions), 0)
    if len(str(number)) > _MAX_DIGITS:
        raise FailedPrecondition(f"{versions} contains version {number - 1}, so no higher number is left.")
    replace_text(highest, str(number))
    return number
