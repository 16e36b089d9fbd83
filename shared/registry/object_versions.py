"""The versions of a registry in object storage: the objects versions/<n>, empty once a version is removed.

Such an object is created only if it is absent: this one write is the commit of a version and takes its number. It
names the run and the token of the owner who wrote it. A version that an owner wrote after he was replaced is none, and
its number is lost.
"""

import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from shared.atomic_file import replacing
from shared.errors import CorruptCheckpoint, RunOwnershipLost
from shared.registry.bucket import Bucket, Conflict
from shared.registry.documents import Document, encoded, read_document
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord
from shared.registry.numbering import next_number, number_of
from shared.registry.object_files import ABANDONED_S, ObjectFiles, ObjectFolder, described, in_parallel
from shared.registry.object_runs import HIDDEN_S, ObjectRuns, given_numbers, without

_PARENT = "versions"
# From this number of versions on, what is known of them is kept in a file.
_MANY = 100
# A version whose object cannot be understood.
_UNREADABLE = {"id": "", "manifest": "", "size_bytes": 0, "at": 0.0}


class ObjectVersions:
    """The versions of one registry, each of which is read once."""

    def __init__(self, bucket: Bucket, runs: ObjectRuns, files: ObjectFiles, index: Callable[[], Path]) -> None:
        self._bucket = bucket
        self._runs = runs
        self._files = files
        # The file in which this machine keeps what was read, so that the next process need not read it again.
        self._index = index
        # The e_tag of each object, and the version that it is; None if it is none.
        self._known: dict[int, tuple[str, ObjectFolder | None]] = {}
        self._is_loaded = False

    def all(self) -> Mapping[int, Hashable]:
        """Returns the numbers of the versions, each with its e_tag; reads only those that are new."""
        entries = {
            number: each
            for each in self._bucket.list(_PARENT)
            if (number := number_of(each.name.rpartition("/")[2])) is not None
        }
        # Other threads may replace what is known during this look, so it works on a copy.
        known = self._known.copy()
        if not self._is_loaded and len(entries) >= _MANY:
            known = self._load() | known
        self._is_loaded = True
        new = [number for number, each in entries.items() if known.get(number, ("", None))[0] != each.e_tag]
        known |= {number: (entries[number].e_tag, None) for number in new if not entries[number].size_bytes}
        known |= self._look([number for number in new if entries[number].size_bytes])
        known = {number: each for number, each in known.items() if number in entries}
        self._known = known.copy()
        if len(new) >= _MANY:
            self._save(known)
        return {number: e_tag for number, (e_tag, folder) in known.items() if folder is not None}

    def _load(self) -> dict[int, tuple[str, ObjectFolder | None]]:
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(self._index().read_bytes())
            return {
                int(number): (str(e_tag), None if document is None else ObjectFolder.of(document))
                for number, (e_tag, document) in known.items()
            }
        return {}

    def _save(self, known: Mapping[int, tuple[str, ObjectFolder | None]]) -> None:
        values = {
            number: (e_tag, None if folder is None else folder.document()) for number, (e_tag, folder) in known.items()
        }
        path = self._index()
        with suppress(OSError):  # it only saves time
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(json.dumps(values).encode())

    def stamp(self, number: int) -> Hashable:
        """Returns the e_tag of a version as it is now; None if there is none."""
        e_tag, folder = self._look([number])[number]
        return None if folder is None else e_tag

    def folder(self, number: int) -> ObjectFolder | None:
        """Returns a version; None if there is none."""
        known = self._known.get(number, ("", None))[1]
        return self._look([number])[number][1] if known is None else known

    def _look(self, numbers: Sequence[int]) -> dict[int, tuple[str, ObjectFolder | None]]:
        """Reads versions as they are now. Another thread may replace `_known` meanwhile."""
        looked: dict[int, tuple[str, ObjectFolder | None]] = {}
        found = in_parallel(self._read, numbers)
        # Read after the versions: see `ObjectRuns.owned`.
        runs = {run: self._runs.read(run) for run in {str(each["run"]) for _, each in found if each and "run" in each}}
        for number, (e_tag, document) in zip(numbers, found, strict=True):
            counts = document is not None and (
                "run" not in document
                or self._runs.owned(document["run"], document["token"], number, runs[document["run"]])
            )
            looked[number] = (e_tag, ObjectFolder.of(document) if document is not None and counts else None)
        self._known.update(looked)
        return looked

    def _read(self, number: int) -> tuple[str, Document | None]:
        try:
            document, e_tag = read_document(self._bucket, f"{_PARENT}/{number}")
        except FileNotFoundError:
            return "", None
        except CorruptCheckpoint:
            return "", dict(_UNREADABLE)
        return e_tag, None if not document or "hidden" in document else document

    def publish(self, fence: Fence, folder: Path, files: Sequence[FileRecord], manifest: Callable[[int], str]) -> int:
        """Writes the files of a folder, then creates the object of the first number that is free."""
        self._runs.check(fence)
        id = self._files.upload(folder, files)
        number = max(given_numbers(self._bucket), default=0)
        while True:
            number = next_number(number, f"{self._bucket.address}/{_PARENT}")
            text = manifest(number)
            document = described(id, text, files) | {"run": fence.run, "token": fence.token}
            with suppress(Conflict):
                self._bucket.create(f"{_PARENT}/{number}", encoded(document))
                break
        if not self._runs.owned(fence.run, fence.token, number):
            self._bury(number)
            self._files.remove(id)
            raise RunOwnershipLost(f"Another process took over the run {fence.run}; this one ends.")
        self._files.keep(id, folder, text)
        return number

    def remove(self, number: int, unless: Callable[[], bool]) -> bool:
        """Hides a version, looks whether somebody needs it, and removes it or shows it again."""
        e_tag, document = self._read(number)
        if document is None:
            return False
        try:
            hidden = encoded(document | {"hidden": time.time()})
            self._bucket.replace(f"{_PARENT}/{number}", hidden, e_tag)
            if unless():
                self._show(number)
                return False
            content, e_tag = self._bucket.read(f"{_PARENT}/{number}")
            if content != hidden:
                return False  # this process paused for long, and another one has shown it again
            self._bucket.replace(f"{_PARENT}/{number}", b"", e_tag)
        except Conflict:
            return False  # another process removes it
        self._known.pop(number, None)
        if document["id"]:
            self._files.remove(document["id"])
        return True

    def _show(self, number: int) -> None:
        document, e_tag = read_document(self._bucket, f"{_PARENT}/{number}")
        if "hidden" in document:
            self._bucket.replace(f"{_PARENT}/{number}", encoded(without(document, "hidden")), e_tag)

    def _bury(self, number: int) -> None:
        """Leaves an empty object, so that the number is not given again."""
        content, e_tag = self._bucket.read(f"{_PARENT}/{number}")
        if content:
            self._bucket.replace(f"{_PARENT}/{number}", b"", e_tag)

    def sweep(self) -> None:
        """Removes old empty objects except that of the highest number, and shows what dead processes have hidden."""
        now = time.time()
        entries = [(number_of(each.name.rpartition("/")[2]), each) for each in self._bucket.list(_PARENT)]
        highest = max((number for number, _ in entries if number is not None), default=0)
        shown = self.all()
        for number, each in entries:
            if number is None or number in shown:
                continue
            if each.size_bytes and now - each.written_at > HIDDEN_S:
                with suppress(Conflict, FileNotFoundError):
                    self._show(number)
            elif not each.size_bytes and number != highest and now - each.written_at > ABANDONED_S:
                self._bucket.delete([each.name])

    def ids(self) -> Iterator[str]:
        """Yields the ids of the files of all versions, also of those that are hidden."""
        for number in self.all():
            if (folder := self.folder(number)) is not None:
                yield folder.id
        for number, (_, folder) in self._known.copy().items():
            if folder is None:
                with suppress(FileNotFoundError):
                    document, _ = read_document(self._bucket, f"{_PARENT}/{number}")
                    if "hidden" in document:
                        yield document["id"]

    def unknown(self) -> list[str]:
        """Returns the URLs among the versions whose names are not numbers."""
        names = [each.name for each in self._bucket.list(_PARENT)]
        return [f"{self._bucket.address}/{name}" for name in names if number_of(name.rpartition("/")[2]) is None]
