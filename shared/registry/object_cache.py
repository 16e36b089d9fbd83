"""Local copies of folders of object storage, which processes of one machine share."""

import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from shared.errors import StoreFailed
from shared.registry.commit import is_locked, locked, sync
from shared.registry.numbering import children
from shared.registry.staging import Staging

# A process keeps its newest copies from being removed, so that it can open their files later.
_HELD = 8


class ObjectCache:
    """Copies in the folder `root`, each under its id, which never change, and together have at most `limit_bytes`.

    The copy that was used longest ago goes first; never one that this process or another one has fetched last.
    Methods raise `StoreFailed` if the disk fails.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._staging = Staging(root)
        # The open lock files of the newest copies.
        self._held: OrderedDict[str, int] = OrderedDict()
        self._guard = threading.Lock()

    @property
    def versions(self) -> Path:
        """A file for what is known of the versions."""
        return self._root / "versions.json"

    def new_folder(self) -> AbstractContextManager[Path]:
        """Yields an empty folder, and removes it at the end unless it was moved."""
        return self._staging.new()

    def sweep(self) -> None:
        """Removes what dead processes have left."""
        self._staging.sweep([])

    def fetch(self, id: str, download: Callable[[Path], None]) -> Path:
        """Returns the copy with an id; if there is none, `download` fills an empty folder."""
        with self._disk():
            entry = self._root / id
            self._hold(id)
            if not entry.exists():
                with locked(self._lock(id, "filling")):  # two processes need not download the same
                    if not entry.exists():
                        with self.new_folder() as folder:
                            download(folder)
                            self._move(folder, entry)
            with suppress(FileNotFoundError):
                os.utime(entry)
            self._shrink()
            return entry

    def put(self, id: str, folder: Path) -> None:
        """Makes a folder of `new_folder` the copy with an id."""
        with self._disk():
            self._hold(id)
            self._move(folder, self._root / id)
            self._shrink()

    def discard(self, id: str) -> None:
        """Removes a copy."""
        # Others add up the sizes of copies under this lock.
        with self._disk(), locked(self._root / "lock"):
            self._staging.remove(self._root / id)

    def _move(self, folder: Path, entry: Path) -> None:
        for path in folder.iterdir():
            sync(path)
        sync(folder)
        try:
            folder.rename(entry)
        except OSError:
            if not entry.exists():  # another process may have put it there
                raise

    def _hold(self, id: str) -> None:
        """Keeps a copy until this process has fetched several others."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._guard, locked(self._root / "lock"):
            if id not in self._held:
                path = self._lock(id, "held")
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                self._held[id] = descriptor
            self._held.move_to_end(id)
            while len(self._held) > _HELD:
                os.close(self._held.popitem(last=False)[1])

    def _shrink(self) -> None:
        with locked(self._root / "lock"):
            copies = [path for path in children(self._root) if path.is_dir() and path.name not in ("staging", "locks")]
            sizes = {path: sum(each.stat().st_size for each in children(path)) for path in copies}
            total = sum(sizes.values())
            for path in sorted(copies, key=lambda each: each.stat().st_mtime):
                if total <= self._limit_bytes:
                    return
                if not is_locked(self._lock(path.name, "held")):
                    self._staging.remove(path)
                    for kind in ("held", "filling"):
                        self._lock(path.name, kind).unlink(missing_ok=True)
                    total -= sizes[path]

    def _lock(self, id: str, kind: str) -> Path:
        folder = self._root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{id}.{kind}"

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except StoreFailed:
            raise
        except OSError as error:
            raise StoreFailed(
                f"The local copies in {self._root} cannot be written: {error.strerror or error}; free space on the "
                "disk, or name another folder in GPTLOOP_VAR."
            ) from error
