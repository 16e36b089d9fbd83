"""A registry in object storage.

id                 the id of the registry
versions/<n>       a version: see `object_versions.py`
texts/runs/<run>   a run, with its states and teachers: see `object_runs.py`
texts/<group>      the texts of another group
files/<id>/        the files of a version, a state or a teacher: see `object_files.py`
history/<run>/     the pieces of a history: see `object_history.py`

Every object that changes does so by compare-and-swap, and files never change. A process reads from local copies, which
it shares with others: see `object_cache.py`.
"""

import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from shared.errors import CorruptCheckpoint, FailedPrecondition, shown
from shared.registry.bucket import Bucket, Conflict
from shared.registry.documents import Documents, DocumentTexts, with_texts
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord
from shared.registry.object_cache import ObjectCache
from shared.registry.object_files import ObjectFiles, ObjectFolder
from shared.registry.object_history import ObjectHistories
from shared.registry.object_runs import ObjectRuns
from shared.registry.object_versions import ObjectVersions
from shared.registry.store import Change, Run


class ObjectStore:
    """A `Store` below the prefix of a URL, with local copies in a folder of at most `cache_bytes`.

    Raises as `Bucket` does.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        self._bucket = Bucket(url.rstrip("/"))
        self._documents = Documents(self._bucket)
        self._cache_place, self._cache_bytes = cache, cache_bytes
        self._copies: ObjectCache | None = None
        self._files = ObjectFiles(self._bucket, self._cache)
        self._runs = ObjectRuns(self._bucket, self._documents, self._files)
        self._versions = ObjectVersions(self._bucket, self._runs, self._files, lambda: self._cache().versions)
        self._histories = ObjectHistories(self._bucket, self._runs)
        self._id: str | None = None

    @property
    def address(self) -> str:
        """The URL."""
        return self._bucket.address

    def id(self) -> str:
        """Returns the content of the object `id`, which is read once; creates it if it does not exist."""
        if self._id is None:
            with suppress(Conflict):
                try:
                    self._bucket.read("id")
                except FileNotFoundError:
                    self._bucket.create("id", secrets.token_hex(8).encode())
            text = self._bucket.read("id")[0].decode(errors="replace").strip()
            if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
                raise FailedPrecondition(
                    f"{self.place('id')} contains {shown(text, 40)}, but must contain 16 hexadecimal digits."
                )
            self._id = text
        return self._id

    def place(self, name: str) -> str:
        """Returns its URL."""
        return f"{self.address}/{name}"

    def _cache(self) -> ObjectCache:
        if self._copies is None:
            self._copies = ObjectCache(self._cache_place / self.id(), self._cache_bytes)
        return self._copies

    # Texts

    def read(self, group: str) -> DocumentTexts:
        """Returns the texts of a group, all of one moment."""
        return DocumentTexts(self._documents.read(f"texts/{group}"))

    def change(self, group: str, change: Change) -> None:
        """Changes the texts of a group in one write."""
        self._documents.change(f"texts/{group}", lambda document: with_texts(document, change))

    def drop(self, group: str) -> None:
        """Removes the object of a group."""
        self._bucket.delete([f"texts/{group}"])

    def stamps(self, parent: str) -> Mapping[str, Hashable]:
        """Returns the groups below a name, each with its e_tag."""
        return {each.name.rpartition("/")[2]: each.e_tag for each in self._bucket.list(f"texts/{parent}")}

    # Runs

    def runs(self) -> Mapping[str, Run]:
        """Returns every run; reads only those that have changed."""
        return self._runs.all()

    def run(self, name: str) -> Run:
        """Returns a run."""
        return self._runs.one(name)

    def take_over(self, run: str, token: int | None) -> Fence:
        """Raises the fence of a run."""
        return self._runs.take_over(run, token)

    def read_history(self, run: str, start: int = 0) -> bytes:
        """Returns the pieces of a history from a byte on."""
        return self._histories.read(run, start)

    def append_history(self, fence: Fence, content: bytes, synced: bool) -> None:
        """Appends to a history: at once if `synced`, otherwise within a minute."""
        self._histories.append(fence, content, synced)

    def cut_history(self, fence: Fence, size_bytes: int) -> None:
        """Cuts a history back."""
        self._histories.cut(fence, size_bytes)

    def remove_history(self, run: str) -> None:
        """Removes a history."""
        self._histories.remove(run)

    # Folders

    def versions(self) -> Mapping[int, Hashable]:
        """Returns the numbers of the versions, each with its e_tag; reads only those that are new."""
        return self._versions.all()

    def stamp(self, number: int) -> Hashable:
        """Returns the e_tag of a version."""
        stamp = self._versions.stamp(number)
        if stamp is None:
            raise FileNotFoundError(2, "No such version", self.place(f"versions/{number}"))
        return stamp

    def _find(self, name: str) -> ObjectFolder | None:
        parent, _, rest = name.partition("/")
        return self._versions.folder(int(rest)) if parent == "versions" else self._runs.folder(rest)

    def _folder(self, name: str) -> ObjectFolder:
        folder = self._find(name)
        if folder is None:
            raise CorruptCheckpoint(f"{self.place(name)} is missing.")
        return folder

    def manifest(self, name: str) -> bytes:
        """Returns the manifest of a folder."""
        folder = self._find(name)
        if folder is None:
            raise FileNotFoundError(2, "No such folder", self.place(name))
        return folder.manifest

    def exists(self, name: str) -> bool:
        """Returns whether there is a folder with this name now."""
        parent, _, rest = name.partition("/")
        found = self._versions.stamp(int(rest)) if parent == "versions" else self._runs.folder(rest)
        return found is not None

    def new_folder(self) -> AbstractContextManager[Path]:
        """Yields an empty folder beside the local copies."""
        return self._files.new_folder()

    def publish(self, fence: Fence, folder: Path, files: Sequence[FileRecord], manifest: Callable[[int], str]) -> int:
        """Writes the files, then creates the object of the next number."""
        return self._versions.publish(fence, folder, files, manifest)

    def commit(self, fence: Fence, name: str, folder: Path, files: Sequence[FileRecord], manifest: str) -> None:
        """Writes the files, then adds the folder to the document of its run."""
        self._runs.commit(fence, name.partition("/")[2], folder, files, manifest)

    def remove(self, name: str, unless: Callable[[], bool] = lambda: False) -> bool:
        """Hides a folder, looks whether somebody needs it, and removes it or shows it again."""
        parent, _, rest = name.partition("/")
        return self._versions.remove(int(rest), unless) if parent == "versions" else self._runs.remove(rest, unless)

    def remove_teachers(self, run: str) -> None:
        """Removes the teachers of a run."""
        self._runs.remove_teachers(run)

    def fetch(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns the local copy of a folder, each file of which was compared with the manifest when it arrived."""
        return self._files.fetch(self._folder(name), files)

    def verified(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns the local copy of a folder; one that has changed is fetched again."""
        return self._files.verified(self._folder(name), files)

    def check(self, name: str, files: Sequence[FileRecord]) -> None:
        """Reads every file of a folder in the bucket."""
        self._files.check(self._folder(name), files)

    def lacking(self, name: str, files: Sequence[FileRecord]) -> str:
        """Returns an empty text: the files are written before the folder is visible."""
        return ""

    def state(self, name: str) -> str:
        """Returns the id of the files of a folder, which never change."""
        folder = self._find(name)
        return "" if folder is None else folder.id

    def size_bytes(self, name: str) -> int:
        """Returns the size of the files of a folder."""
        folder = self._find(name)
        return 0 if folder is None else folder.size_bytes

    def written_at(self, name: str) -> float:
        """Returns when a folder was written."""
        folder = self._find(name)
        return 0.0 if folder is None else folder.written_at

    # Keeping

    def sweep(self) -> None:
        """Removes what dead processes have left a day ago, and shows again what one has hidden an hour ago."""
        self._versions.sweep()
        self._runs.sweep()
        self._files.sweep(self._ids)

    def _ids(self) -> Iterator[str]:
        yield from self._versions.ids()
        yield from self._runs.ids()

    def unknown(self) -> list[str]:
        """Returns the URLs among the versions whose names are not numbers."""
        return self._versions.unknown()
