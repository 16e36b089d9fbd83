"""The texts of a group as the files of a folder."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from shared.errors import CorruptCheckpoint, UnreadableCheckpoint
from shared.registry.commit import make_folder, reading, replace_texts, sync
from shared.registry.numbering import children, is_not_regular, is_there, require_way
from shared.registry.store import Texts

# A folder inside the folder of a group.
_INNER = "findings"


class FileTexts(Texts):
    """The files of a folder, which may not exist; each is read when it is looked up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> str:
        path = self._folder / name
        try:
            if is_not_regular(path):
                raise CorruptCheckpoint(f"{path} cannot be read: it is not a file.")
            return path.read_bytes().decode()
        except FileNotFoundError:
            require_way(path)
            raise KeyError(name) from None
        except NotADirectoryError:
            raise KeyError(name) from None  # a file in the place of the folder holds no texts
        except OSError as error:
            raise UnreadableCheckpoint(f"{path} cannot be read: {error}.") from error
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from error

    def __contains__(self, name: object) -> bool:
        with reading(self._folder):
            return isinstance(name, str) and is_there(self._folder / name)

    def __iter__(self) -> Iterator[str]:
        with reading(self._folder):
            for path in children(self._folder):
                if path.name == _INNER:
                    yield from (f"{_INNER}/{each.name}" for each in children(path))
                else:
                    yield path.name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def written_at(self, name: str) -> float:
        """Returns the time of the file."""
        with reading(self._folder):
            try:
                return (self._folder / name).stat().st_mtime
            except FileNotFoundError:
                return 0.0

    def stamp(self) -> Hashable:
        """Returns a value that changes whenever a text is written or removed."""
        found = []
        for name in sorted(self):
            with suppress(OSError):
                status = (self._folder / name).stat()
                found.append((name, status.st_ino, status.st_mtime_ns))
        return tuple(found)


def write_texts(folder: Path, texts: Mapping[str, str | None], root: Path) -> None:
    """Writes the texts of a group of the registry at `root`, and removes those that are None.

    A text that only gets another name needs no space on the disk.
    """
    old = FileTexts(folder)
    gone = [name for name, text in texts.items() if text is None and name in old]
    new = {name: text for name, text in texts.items() if text is not None}
    for name in gone:
        for other in [other for other, text in new.items() if text == old.get(name)][:1]:
            (folder / name).rename(folder / other)
            del new[other]
    paths = {folder / name: text for name, text in new.items()}
    for parent in {path.parent for path in paths} - {folder}:
        make_folder(parent, root)
    if paths:
        replace_texts(paths)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in gone}:
        sync(parent)
