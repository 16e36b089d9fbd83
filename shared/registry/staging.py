"""The folders `staging/<id>/`, in which checkpoints are written before they are visible, and removed afterwards.

Such a folder contains `files/`, which is being written, and `lock`, which the writer holds; or it is a checkpoint that
is being removed.
"""

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared.registry.commit import is_locked, locked, make_folder, move, sync, writing
from shared.registry.numbering import children, is_there


class Staging:
    """The staging folder of one registry."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "staging"

    @contextmanager
    def new(self) -> Iterator[Path]:
        """Yields an empty folder, to be filled and then moved to its place; removes it if it was not moved."""
        place = self._new_place()
        with writing(self._root), ExitStack() as stack:
            make_folder(self._root, self._root)
            place.parent.mkdir(exist_ok=True)
            stack.callback(_discard, place)
            # Without this lock, a sweep could remove the folder before its own lock is held.
            with locked(self._root / "staging.lock"):
                (place / "files").mkdir(parents=True)
                stack.enter_context(locked(place / "lock"))
            yield place / "files"

    def remove(self, directory: Path) -> None:
        """Removes a folder atomically, if it exists."""
        grave = self._new_place()
        with writing(self._root):
            if not is_there(directory):
                return
            grave.parent.mkdir(exist_ok=True)
            try:
                move(directory, grave, directory.parent)
            except FileNotFoundError:
                return
        _discard(grave)

    def sweep(self, folders: Iterable[Path]) -> None:
        """Removes what dead processes left half-written or half-removed; `folders` are the parents of checkpoints."""
        with writing(self._root):
            if not children(self._folder):
                return
            with locked(self._root / "staging.lock"):
                # A process that died while removing a checkpoint may not have synced its parent.
                for folder in folders:
                    if folder.is_dir():
                        sync(folder)
                for place in children(self._folder):
                    if not is_locked(place / "lock"):
                        _discard(place)

    def _new_place(self) -> Path:
        return self._folder / uuid.uuid4().hex


def _discard(path: Path) -> None:
    """Removes a folder or a file; leaves what it cannot remove to the next sweep."""
    shutil.rmtree(path, ignore_errors=True)
    if path.is_file():
        path.unlink(missing_ok=True)
