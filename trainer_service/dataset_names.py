"""Expands what a person types for a data set into names of files: quotes, `~`, patterns and folders."""

import glob
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from shared.errors import InvalidArgument, NotFound, shown
from trainer_service.text.corpus import BUILTIN, is_named
from trainer_service.text.hub import HUB
from trainer_service.text.local_files import ENDINGS


def expand(values: Sequence[str]) -> tuple[str, ...]:
    """Returns the data sets and files that the values name, in their order.

    A value that is the name of a file or a folder means that file or folder. Any other value is split into words as in
    a shell, with quotes around names with spaces. In a word, `~` is the home folder. A pattern with `*`, `?` or `[…]`
    means all matching files, and a folder means its text files, both sorted by name.

    Raises `InvalidArgument` if quotes do not close or a name is unknown, and `NotFound` if nothing matches.
    """
    return tuple(name for value in values for word in _words(value) for name in _expand_word(word))


def _words(value: str) -> list[str]:
    if value and _exists(_home(value)):
        return [value]
    try:
        words = shlex.split(value)
    except ValueError:
        raise InvalidArgument(f"The quotes in {shown(value)} do not close.") from None
    if len(words) > 1 and not any(is_named(word) or _exists(_home(word)) or glob.has_magic(word) for word in words):
        raise NotFound(f"There is no file {shown(value)}, and no file that one of its words names.")
    return words


def _expand_word(word: str) -> Iterator[str]:
    if is_named(word):
        yield word
        return
    path = _home(word)
    if _exists(path):
        yield from _files_in(path) if path.is_dir() else [str(path)]
    elif glob.has_magic(word):
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not matches:
            raise NotFound(f"No file matches {shown(word)}.")
        yield from matches
    elif not path.suffix and (near := get_close_matches(word[:40], [BUILTIN, *HUB], n=1)):
        raise InvalidArgument(f"Unknown data set {shown(word)}. Did you mean {near[0]}?")
    else:
        yield str(path)  # checked as a file later


def _files_in(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(ENDINGS) and path.is_file())
    if not files:
        raise NotFound(f"The folder {shown(str(folder))} holds no file whose name ends in {', '.join(ENDINGS)}.")
    yield from map(str, files)


def _home(name: str) -> Path:
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path  # no such user exists, so this is an ordinary name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False  # the name is too long or has a null byte
