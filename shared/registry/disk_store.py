"""A registry in a folder on a disk.

versions/<n>/              model, configuration, tokenizer, held-out windows, manifest
runs/<run>/states/<step>/  weights, optimizer, position, manifest
runs/<run>/teachers/<n>/   versions that teach it
runs/<run>/history.jsonl   what it has reported
runs/<run>/lock            held by who writes for the run; beside it stand its texts
evaluations/<n>/, serving/, holds/  texts, each a file; `serving.lock` is held by who changes them
staging/<id>/              checkpoints that are being written or removed: see `staging.py`
last_version               the highest number that any version ever had
id                         the id of the registry
"""

import errno
import os
import re
import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from shared.errors import FailedPrecondition, shown
from shared.registry.commit import (
    IGNORED_NAMES,
    files_state,
    lacking,
    locked,
    make_folder,
    reading,
    replace_text,
    reveal,
    seal,
    sync,
    verify_files,
    writing,
)
from shared.registry.disk_texts import FileTexts, write_texts
from shared.registry.fence import FENCE, Fence
from shared.registry.manifest import RUN_NAME, FileRecord, manifest_of
from shared.registry.numbering import children, is_there, next_number, number_of, numbers, whole_number
from shared.registry.staging import Staging
from shared.registry.store import Change, Run

_HISTORY = "history.jsonl"
_HIGHEST = "the highest number that any version ever had; write it there"


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _reading(
    method: Callable[Concatenate["DiskStore", Parameters], Result],
) -> Callable[Concatenate["DiskStore", Parameters], Result]:
    @wraps(method)
    def read(store: "DiskStore", /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        with reading(store.root):
            return method(store, *arguments, **named)

    return read


class DiskStore:
    """A `Store` in the folder `root`, which is created by the first write.

    Readers need no lock, because every visible folder is whole and never changes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = Staging(root)

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.root)

    def id(self) -> str:
        """Returns the id in the file `id`; creates the file, and the folder, if they do not exist.

        A copy of a folder has the same id until its file is removed. Raises `FailedPrecondition` if the folder cannot
        be written, or if the file is invalid.
        """
        path = self.root / "id"
        with writing(self.root):
            if not is_there(path):
                make_folder(self.root, self.root)
                with locked(self.root / "id.lock"):
                    if not is_there(path):
                        replace_text(path, secrets.token_hex(8))
            text = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch("[0-9a-f]{16}", text):
            raise FailedPrecondition(
                f"{shown(path)} contains {shown(text, 40)}, but must contain 16 hexadecimal digits. If you remove it, "
                "the registry gets a new id, and no longer sees the jobs that were queued under the old one."
            )
        return text

    def path(self, name: str) -> Path:
        """Returns the path of a folder or a text, which may not exist."""
        return self.root / name

    def place(self, name: str) -> str:
        """Returns its path."""
        return str(self.path(name))

    # Texts

    def read(self, group: str) -> FileTexts:
        """Returns the texts of a group, each of which is read when it is looked up."""
        return FileTexts(self.path(group))

    def change(self, group: str, change: Change) -> None:
        """Changes the texts of a group under its lock."""
        folder = self.path(group)
        with writing(self.root):
            make_folder(folder, self.root)
            with locked(self._lock(group)):
                write_texts(folder, change(FileTexts(folder)), self.root)

    def drop(self, group: str) -> None:
        """Removes a group."""
        self._staging.remove(self.path(group))

    @_reading
    def stamps(self, parent: str) -> Mapping[str, Hashable]:
        """Returns the groups below a name, each with the inodes and the times of its files."""
        return {folder.name: FileTexts(folder).stamp() for folder in children(self.path(parent))}

    def _lock(self, group: str) -> Path:
        # Holds and decisions have one lock, which `remove` holds too.
        return self.path(group) / "lock" if group.startswith("runs/") else self.root / "serving.lock"

    # Runs

    @_reading
    def runs(self) -> Mapping[str, Run]:
        """Returns every run that has a folder."""
        return {path.name: self.run(path.name) for path in children(self.root / "runs") if _is_run(path)}

    @_reading
    def run(self, name: str) -> Run:
        """Returns a run."""
        folder = self.path(f"runs/{name}")
        return Run(
            FileTexts(folder),
            _written_at(folder / "states"),
            _written_at(folder / "teachers"),
            _time(folder / _HISTORY) if (folder / _HISTORY).is_file() else None,
        )

    def take_over(self, run: str, token: int | None) -> Fence:
        """Raises the fence of a run."""
        fences: list[Fence] = []

        def change(texts: Mapping[str, str]) -> Mapping[str, str]:
            fences.append(Fence.after(texts, self._fence(run), run, token))
            return {FENCE: str(fences[-1].token)}

        self.change(f"runs/{run}", change)
        return fences[-1]

    def _fence(self, run: str) -> str:
        return self.place(f"runs/{run}/{FENCE}")

    @contextmanager
    def _held(self, fence: Fence) -> Iterator[Path]:
        """Yields the folder of a run while its lock is held; raises `RunOwnershipLost` if a later owner took over."""
        folder = self.path(f"runs/{fence.run}")
        with locked(folder / "lock"):
            fence.check(FileTexts(folder), self._fence(fence.run))
            yield folder

    @_reading
    def read_history(self, run: str, start: int = 0) -> bytes:
        """Returns the history of a run from a byte on."""
        with self.path(f"runs/{run}/{_HISTORY}").open("rb") as file:
            file.seek(start)
            return file.read()

    def append_history(self, fence: Fence, content: bytes, synced: bool) -> None:
        """Appends to the history of a run with one write."""
        with writing(self.root), self._held(fence) as folder:
            path = folder / _HISTORY
            if content:
                with path.open("ab", buffering=0) as file:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if synced and path.exists():
                sync(path)
                sync(folder)

    def cut_history(self, fence: Fence, size_bytes: int) -> None:
        """Truncates the history of a run."""
        with writing(self.root), self._held(fence) as folder, (folder / _HISTORY).open("r+b", buffering=0) as file:
            file.truncate(size_bytes)

    def remove_history(self, run: str) -> None:
        """Removes the history of a run."""
        with writing(self.root):
            self.path(f"runs/{run}/{_HISTORY}").unlink(missing_ok=True)

    # Folders

    @_reading
    def versions(self) -> Mapping[int, Hashable]:
        """Returns the numbers of the versions, each with the inode of its folder."""
        found: dict[int, Hashable] = {}
        for path in children(self.root / "versions"):
            if (number := number_of(path.name)) is not None:
                try:
                    found[number] = path.stat().st_ino
                except FileNotFoundError:
                    continue  # removed in the meantime
                except OSError:
                    found[number] = None
        return found

    @_reading
    def stamp(self, number: int) -> Hashable:
        """Returns the inode of the folder of a version."""
        return self.path(f"versions/{number}").stat().st_ino

    def manifest(self, name: str) -> bytes:
        """Returns the content of a folder's `manifest.json`."""
        return manifest_of(self.path(name))

    @_reading
    def exists(self, name: str) -> bool:
        """Returns whether there is a folder with this name."""
        return is_there(self.path(name))

    def new_folder(self) -> AbstractContextManager[Path]:
        """Yields an empty folder in `staging`."""
        return self._staging.new()

    def publish(self, fence: Fence, folder: Path, files: Sequence[FileRecord], manifest: Callable[[int], str]) -> int:
        """Makes a folder of `new_folder` the next version."""
        versions = self.root / "versions"
        with writing(self.root):
            make_folder(versions, self.root)
            with locked(self.root / "versions.lock"), self._held(fence):
                number = self._next_version()
                seal(folder, manifest(number))
                reveal(folder, versions / str(number))
        return number

    def _next_version(self) -> int:
        """Takes the next number: writes it before its version is visible, so that it is not given again."""
        path, versions = self.root / "last_version", self.root / "versions"
        text = path.read_text(encoding="utf-8", errors="replace") if is_there(path) else None
        number = next_number(max(whole_number(text, str(path), _HIGHEST), *numbers(versions), 0), str(versions))
        replace_text(path, str(number))
        return number

    def commit(self, fence: Fence, name: str, folder: Path, files: Sequence[FileRecord], manifest: str) -> None:
        """Moves a folder of `new_folder` to its name."""
        final = self.path(name)
        with writing(self.root):
            make_folder(final.parent, self.root)
            seal(folder, manifest)
            with self._held(fence):
                self._staging.remove(final)
                reveal(folder, final)

    def remove(self, name: str, unless: Callable[[], bool] = lambda: False) -> bool:
        """Removes a folder under the lock of decisions and holds."""
        if not self.exists(name):
            return False
        with writing(self.root), locked(self.root / "serving.lock"):
            if unless():
                return False
            self._staging.remove(self.path(name))
        return True

    def remove_teachers(self, run: str) -> None:
        """Removes the folder of the teachers of a run."""
        self._staging.remove(self.path(f"runs/{run}/teachers"))

    def fetch(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns the folder itself."""
        return self.path(name)

    def verified(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns the folder itself."""
        self.check(name, files)
        return self.path(name)

    def check(self, name: str, files: Sequence[FileRecord]) -> None:
        """Compares every file of a folder with its manifest."""
        verify_files(self.path(name), files)

    def lacking(self, name: str, files: Sequence[FileRecord]) -> str:
        """Looks at the names and the sizes of the files."""
        try:
            return lacking(self.path(name), files)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"

    @_reading
    def state(self, name: str) -> str:
        """Returns a hash of the names, sizes and times of the files."""
        return files_state(self.path(name))

    @_reading
    def size_bytes(self, name: str) -> int:
        """Returns the size of the files of a folder, with its manifest."""
        try:
            return sum(path.stat().st_size for path in children(self.path(name)))
        except FileNotFoundError:
            return 0

    @_reading
    def written_at(self, name: str) -> float:
        """Returns the time of a folder, which renaming does not change."""
        return _time(self.path(name))

    # Keeping

    def sweep(self) -> None:
        """Removes what dead processes have left in `staging`."""
        parents = (self.root.glob(f"runs/*/{kind}") for kind in ("states", "teachers"))
        self._staging.sweep(chain([self.root / "versions"], *parents))

    @_reading
    def unknown(self) -> list[str]:
        """Returns the paths among versions, runs, states and teachers with unknown names."""
        runs = children(self.root / "runs")
        kinds = (path / kind for path in runs if _is_run(path) for kind in ("states", "teachers"))
        paths = [path for folder in (self.root / "versions", *kinds) for path in children(folder)]
        paths = [path for path in paths if number_of(path.name) is None]
        paths += [path for path in runs if not _is_run(path)]
        return [str(path) for path in paths if path.name not in IGNORED_NAMES]


def _is_run(path: Path) -> bool:
    return RUN_NAME.fullmatch(path.name) is not None and path.is_dir()


def _written_at(folder: Path) -> dict[int, float]:
    return {number: _time(folder / str(number)) for number in sorted(numbers(folder))}


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
