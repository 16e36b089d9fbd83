"""The files of folders in object storage: files/<id>/<SHA-256>, each under an id that is never used again.

While they are written or removed, `staging/<id>` names them, so that nothing is left behind by a process that dies.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from shared.errors import CorruptCheckpoint
from shared.registry.bucket import Bucket
from shared.registry.commit import verify_files
from shared.registry.documents import Document
from shared.registry.manifest import MANIFEST_NAME, FileRecord
from shared.registry.object_cache import ObjectCache

Item = TypeVar("Item")
Result = TypeVar("Result")

# What was staged or removed longer ago has no living process.
ABANDONED_S = 24 * 3600.0
# Requests at the same time.
_REQUESTS = 16
# How often a file that arrives altered is fetched again.
_FETCHES = 3


@dataclass(frozen=True)
class ObjectFolder:
    """What the store knows of a folder: the id of its files, its manifest, its size and its time."""

    id: str
    manifest: bytes
    size_bytes: int
    written_at: float

    @classmethod
    def of(cls, document: Document) -> Self:
        """Returns the folder that a document describes."""
        manifest = str(document["manifest"]).encode()
        return cls(str(document["id"]), manifest, int(document["size_bytes"]), float(document["at"]))

    def document(self) -> Document:
        """Returns the document that describes it."""
        manifest = self.manifest.decode()
        return {"id": self.id, "manifest": manifest, "size_bytes": self.size_bytes, "at": self.written_at}


def described(id: str, manifest: str, files: Sequence[FileRecord]) -> Document:
    """Returns the document that describes a folder which is written now."""
    content = manifest.encode()
    return ObjectFolder(id, content, sum(each.size_bytes for each in files) + len(content), time.time()).document()


def in_parallel(act: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Returns the result of each item, in their order, with several requests at the same time."""
    if len(items) < 2:
        return [act(each) for each in items]
    with ThreadPoolExecutor(min(_REQUESTS, len(items))) as threads:
        return list(threads.map(act, items))


class ObjectFiles:
    """The files of one registry, and the local copies of them."""

    def __init__(self, bucket: Bucket, cache: Callable[[], ObjectCache]) -> None:
        self._bucket = bucket
        self._cache = cache

    def new_folder(self) -> AbstractContextManager[Path]:
        """Yields an empty folder beside the local copies."""
        return self._cache().new_folder()

    def upload(self, folder: Path, files: Sequence[FileRecord]) -> str:
        """Writes the files of a local folder, and returns their id; `keep` or `remove` follows."""
        id = secrets.token_hex(16)
        self._bucket.upload(f"staging/{id}", b"files that are being written")
        in_parallel(lambda each: self._bucket.upload(f"files/{id}/{each.sha256}", folder / each.name), files)
        return id

    def keep(self, id: str, folder: Path, manifest: str) -> None:
        """Notes that a folder has its files for good, and keeps the local folder as a copy."""
        self._bucket.delete([f"staging/{id}"])
        # Without a copy the files are fetched when they are needed.
        with suppress(OSError):
            (folder / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
            self._cache().put(id, folder)

    def remove(self, id: str) -> None:
        """Removes the files of a folder that is gone; if this process dies meanwhile, `sweep` removes the rest."""
        self._bucket.upload(f"staging/{id}", b"files that are being removed")
        self._bucket.delete(each.name for each in self._bucket.list(f"files/{id}"))
        self._bucket.delete([f"staging/{id}"])

    def sweep(self, kept: Callable[[], Iterable[str]]) -> None:
        """Removes what dead processes have left; `kept` returns the ids of all folders."""
        self._cache().sweep()
        now = time.time()
        staged = [each.name for each in self._bucket.list("staging") if now - each.written_at > ABANDONED_S]
        ids = set(kept()) if staged else set()
        for name in staged:
            if (id := name.rpartition("/")[2]) in ids:
                self._bucket.delete([name])
            else:
                self.remove(id)

    def fetch(self, found: ObjectFolder, files: Sequence[FileRecord]) -> Path:
        """Returns the local copy of a folder, each file of which is compared with its record when it arrives."""

        def download(folder: Path) -> None:
            in_parallel(lambda each: self._download(found.id, each, folder / each.name), files)
            (folder / MANIFEST_NAME).write_bytes(found.manifest)

        return self._cache().fetch(found.id, download)

    def verified(self, found: ObjectFolder, files: Sequence[FileRecord]) -> Path:
        """Returns the local copy of a folder, compared with its records now; one that has changed is fetched again."""
        folder = self.fetch(found, files)
        try:
            verify_files(folder, files)
        except CorruptCheckpoint:
            self._cache().discard(found.id)
            folder = self.fetch(found, files)
            verify_files(folder, files)
        return folder

    def check(self, found: ObjectFolder, files: Sequence[FileRecord]) -> None:
        """Reads every file in the bucket, and compares it with its record."""
        with self.new_folder() as folder:
            for each in files:
                self._download(found.id, each, folder / each.name)
                (folder / each.name).unlink()

    def _download(self, id: str, record: FileRecord, path: Path) -> None:
        name = f"files/{id}/{record.sha256}"
        place = f"{self._bucket.address}/{name} ({record.name})"
        for _ in range(_FETCHES):
            digest = hashlib.sha256()
            try:
                with path.open("wb") as file:
                    for part in self._bucket.parts(name, record.size_bytes):
                        digest.update(part)
                        file.write(part)
            except FileNotFoundError:
                raise CorruptCheckpoint(f"{place} is missing.") from None
            if digest.hexdigest() == record.sha256:
                return
        raise CorruptCheckpoint(f"{place} has changed: its SHA-256 is not that of its name.")
