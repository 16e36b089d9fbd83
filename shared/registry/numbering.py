"""Numbers as names of folders and in texts, and looks at paths that another process may change."""

import re
from contextlib import suppress
from errno import ELOOP, ENOENT, ENOTDIR
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from shared.errors import FailedPrecondition, StoreFailed, shown

# The number of a version, which fits into 64 bits.
NUMBER = re.compile("[1-9][0-9]{0,17}")
_MAX_DIGITS = 18
# The errors of a path that leads to nothing.
_ABSENT = (ENOENT, ENOTDIR, ELOOP)


def is_number(name: str) -> bool:
    """Returns whether a version is named by its number, as the registry writes it, and not by a label."""
    return NUMBER.fullmatch(name) is not None


def children(directory: Path) -> list[Path]:
    """Returns the paths in a folder; an empty list if there is no folder. Raises `OSError` if it cannot be read."""
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        require_way(directory)
        return []


def is_there(path: Path) -> bool:
    """Returns whether a file or a folder exists; raises `OSError` if nobody can tell now."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        require_way(path)
        return False
    return True


def is_not_regular(path: Path) -> bool:
    """Returns whether a path exists and is not a regular file; raises `OSError` if that cannot be known now."""
    try:
        return not S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def require_way(path: Path) -> None:
    """Raises `StoreFailed` if a link on the way to a path has no target, or a file is in the place of a folder."""
    for each in (path, *path.parents):
        try:
            # One look decides, since another process may make the folder meanwhile.
            mode = each.stat().st_mode
        except OSError as error:
            if error.errno not in _ABSENT:
                continue  # the folder around it may not be read
            target = None
            with suppress(OSError):  # no link, or another process replaces it now
                target = None if each.exists() else each.readlink()
            if target is not None:
                raise StoreFailed(
                    f"The registry cannot be reached: {each} is a link to {target}, which cannot be followed; mount "
                    "its disk, or mend the link."
                ) from None
            continue
        if S_ISDIR(mode):
            return  # the way to it is whole
        if each is not path:
            raise StoreFailed(f"The registry cannot be reached: {each} is a file, and no folder; remove the file.")


def numbers(directory: Path) -> list[int]:
    """Returns the numbers that are names in a folder, in no order."""
    return [number for path in children(directory) if (number := number_of(path.name)) is not None]


def number_of(name: str) -> int | None:
    """Returns the number that is a name; None if the registry would not write it in this way."""
    # An imported model has trained for 0 steps.
    return int(name) if name == "0" or is_number(name) else None


def whole_number(text: str | None, place: str, right: str) -> int:
    """Returns the number that a text is, 0 if there is no text.

    Raises `FailedPrecondition` if the text is something else; `right` says what must be at its `place`.
    """
    if text is None:
        return 0
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise FailedPrecondition(f"{place} contains {shown(text, 20)}, but must contain {right}.")
    return int(text)


def next_number(last: int, versions: str) -> int:
    """Returns the number after the last one; raises `FailedPrecondition` if none is left. `versions` is their place."""
    if len(str(last + 1)) > _MAX_DIGITS:
        raise FailedPrecondition(f"{versions} contains version {last}, so no higher number is left.")
    return last + 1
