"""The numbers of versions and steps as names of folders, and the highest number that a version ever had."""

from pathlib import Path

from shared.errors import FailedPrecondition, shown
from shared.registry.commit import replace_text

# So a number fits into 64 bits.
_MOST_DIGITS = 18


def children(directory: Path) -> list[Path]:
    """What stands in a folder; nothing if there is none."""
    return list(directory.iterdir()) if directory.is_dir() else []


def numbers(directory: Path) -> list[int]:
    """The numbers that are names of folders in a folder, in no order."""
    return [number for path in children(directory) if (number := number_of(path)) is not None]


def number_of(path: Path) -> int | None:
    """The number that is a folder's name, in the one way in which the registry writes it."""
    name = path.name
    if not (name.isascii() and name.isdecimal()) or len(name) > _MOST_DIGITS or name != str(int(name)):
        return None
    return int(name)


class HighestVersion:
    """The file `last_version`: the highest number that was given to a version, which is given to no other one.

    A number is written there before its version is seen. So what was removed, by hand too, is never taken for another.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "last_version"
        self._versions = root / "versions"

    def next(self) -> int:
        """Takes the next number, which must happen under the versions' lock.

        Raises `FailedPrecondition` if the file holds no number or there is none left, and `OSError` if the disk does
        not take it.
        """
        number = 1 + max(self._read(), *numbers(self._versions), 0)
        if len(str(number)) > _MOST_DIGITS:
            raise FailedPrecondition(f"{self._versions} holds version {number - 1}, so there is no higher number left.")
        replace_text(self._path, str(number))
        return number

    def _read(self) -> int:
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return 0
        if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
            raise FailedPrecondition(
                f"{self._path} holds {shown(text, 20)}, but must hold the highest number that a version ever had; "
                "write it there."
            )
        return int(text)
