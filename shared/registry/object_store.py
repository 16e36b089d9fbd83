"""A registry in object storage.

id                        the id of the registry
versions/<n>              a version: its manifest, and the id of its files; empty once it is removed
texts/<group>             the texts of a group; that of a run also lists its states, its teachers and its history
files/<id>/<SHA-256>      the files of a folder
history/<run>/<id>        a piece of a history
staging/<id>              names files that are being written or removed

Every object that changes does so by compare-and-swap. `versions/<n>` is created only if it is absent: this one write
is the commit of a version and takes its number. The folders of a run are committed by a change of its document, which
compares the fence.

A version names the token of the run's owner who wrote it. The document of the run lists, for each later owner, the
highest number when it took over: a version of an earlier owner with a higher number is none. So a replaced process
publishes nothing, although the number and the fence are in two objects.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CorruptCheckpoint, FailedPrecondition, RunOwnershipLost, shown
from shared.registry.bucket import Bucket, Conflict
from shared.registry.commit import verify_files
from shared.registry.documents import Document, Documents, DocumentTexts, encoded, read_document, with_texts
from shared.registry.fence import FENCE, Fence
from shared.registry.manifest import MANIFEST_NAME, FileRecord
from shared.registry.numbering import next_number, number_of
from shared.registry.object_cache import ObjectCache
from shared.registry.object_history import ObjectHistories
from shared.registry.store import Change, Run

# Requests at the same time.
_REQUESTS = 16
# How often a file that arrives altered is fetched again.
_FETCHES = 3
# What was staged or hidden longer ago has no living process, and a number that old is not given again.
_ABANDONED_S = 24 * 3600.0
# A folder that a dead process has hidden is shown again after this time.
_HIDDEN_S = 3600.0
# A version whose object cannot be understood.
_UNREADABLE = {"id": "", "manifest": "", "size_bytes": 0, "at": 0.0}


@dataclass(frozen=True)
class _Folder:
    """What the store knows of a folder: the id of its files, its manifest, its size and its time."""

    id: str
    manifest: bytes
    size_bytes: int
    written_at: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "_Folder":
        manifest = str(values["manifest"]).encode()
        return cls(str(values["id"]), manifest, int(values["size_bytes"]), float(values["at"]))


class ObjectStore:
    """A `Store` below the prefix of a URL, with local copies in a folder of at most `cache_bytes`.

    Raises as `Bucket` does.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        self._bucket = Bucket(url.rstrip("/"))
        self._documents = Documents(self._bucket)
        self._histories = ObjectHistories(self._bucket, self._documents)
        self._cache_place, self._cache_bytes = cache, cache_bytes
        self._id: str | None = None
        self._copies: ObjectCache | None = None
        # The versions that were read, by number: the e_tag, and the folder, None for one that is not there.
        self._versions: dict[int, tuple[str, _Folder | None]] = {}
        self._runs: dict[str, tuple[str, Document]] = {}

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

    @property
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
        return {_last(each.name): each.e_tag for each in self._bucket.list(f"texts/{parent}")}

    # Runs

    def runs(self) -> Mapping[str, Run]:
        """Returns every run; reads only those that have changed."""
        stamps = self.stamps("runs")
        names = [name for name, stamp in stamps.items() if self._runs.get(name, ("", {}))[0] != stamp]
        documents = _parallel(lambda name: self._documents.read(_of_run(name)), names)
        for name, document in zip(names, documents, strict=True):
            # It may be newer than the list: then it is read once more the next time.
            self._runs[name] = (str(stamps[name]), document)
        self._runs = {name: self._runs[name] for name in stamps if name in self._runs}
        return {name: _run(document) for name, (_, document) in self._runs.items()}

    def run(self, name: str) -> Run:
        """Returns a run."""
        return _run(self._documents.read(_of_run(name)))

    def take_over(self, run: str, token: int | None) -> Fence:
        """Raises the fence of a run, and notes up to which number the versions of earlier owners count."""
        fences: list[Fence] = []

        def change(document: Document) -> Document | None:
            texts = DocumentTexts(document)
            fences.append(fence := Fence.after(texts, self._fence(run), run, token))
            if texts.get(FENCE) == str(fence.token):
                return None
            changed = with_texts(document, lambda _: {FENCE: str(fence.token)}) or document
            return changed | {"owners": [*document.get("owners", []), [fence.token, None]]}

        self._settle(run, self._documents.change(_of_run(run), change))
        return fences[-1]

    def _settle(self, run: str, document: Document) -> Document:
        """Notes the highest number for owners who have just taken over, after their tokens are there."""
        while pending := [token for token, after in document.get("owners", []) if after is None]:
            # Only for those whose tokens were there before the numbers are read.
            highest = max(self._numbers(), default=0)

            def change(document: Document, pending: Sequence[int] = pending, highest: int = highest) -> Document:
                owners = [
                    [token, highest if after is None and token in pending else after]
                    for token, after in document["owners"]
                ]
                return document | {"owners": owners}

            document = self._documents.change(_of_run(run), change)
        return document

    def _fence(self, run: str) -> str:
        return self.place(f"{_of_run(run)} ({FENCE})")

    def _check(self, fence: Fence) -> None:
        fence.check(self.read(f"runs/{fence.run}"), self._fence(fence.run))

    def read_history(self, run: str, start: int = 0) -> bytes:
        """Returns the pieces of a history from a byte on."""
        return self._histories.read(run, start)

    def append_history(self, fence: Fence, content: bytes, synced: bool) -> None:
        """Appends to a history: at once if `synced`, otherwise within a minute."""
        self._histories.append(fence, content, synced, self._fence(fence.run))

    def cut_history(self, fence: Fence, size_bytes: int) -> None:
        """Cuts a history back."""
        self._histories.cut(fence, size_bytes, self._fence(fence.run))

    def remove_history(self, run: str) -> None:
        """Removes a history."""
        self._histories.remove(run)

    # Folders

    def versions(self) -> Mapping[int, Hashable]:
        """Returns the numbers of the versions, each with its e_tag; reads only those that are new."""
        entries = {number: each for each in self._bucket.list("versions") if (number := number_of(_last(each.name)))}
        new = [number for number, each in entries.items() if self._versions.get(number, ("", None))[0] != each.e_tag]
        self._look([number for number in new if entries[number].size_bytes])
        for number in new:
            if not entries[number].size_bytes:
                self._versions[number] = (entries[number].e_tag, None)
        self._versions = {number: known for number, known in self._versions.copy().items() if number in entries}
        return {number: e_tag for number, (e_tag, folder) in self._versions.items() if folder is not None}

    def _look(self, numbers: Sequence[int]) -> None:
        """Reads versions. Whether one counts is settled at the first look: see the top of this file."""
        found = _parallel(self._read_version, numbers)
        documents: dict[str, Document] = {}
        for number, (e_tag, values) in zip(numbers, found, strict=True):
            if values is not None and not self._counts(number, values, documents):
                values = None
            self._versions[number] = (e_tag, None if values is None else _Folder.of(values))

    def _read_version(self, number: int) -> tuple[str, Document | None]:
        try:
            values, e_tag = read_document(self._bucket, f"versions/{number}")
        except FileNotFoundError:
            return "", None
        except CorruptCheckpoint:
            return "", dict(_UNREADABLE)
        return e_tag, None if not values or "hidden" in values else values

    def _counts(self, number: int, values: Document, documents: dict[str, Document]) -> bool:
        """Whether the writer of a version owned its run; `documents` are those of runs that were read after it."""
        run, token = values.get("run", ""), values.get("token", 0)
        if run and run not in documents:
            documents[run] = self._settle(run, self._documents.read(_of_run(run)))
        owners = documents.get(run, {}).get("owners", [])
        return all(number <= after for later, after in owners if later > token)

    def stamp(self, number: int) -> Hashable:
        """Returns the e_tag of a version."""
        self._look([number])
        e_tag, folder = self._versions[number]
        if folder is None:
            raise FileNotFoundError(2, "No such version", self.place(f"versions/{number}"))
        return e_tag

    def _folder(self, name: str) -> _Folder:
        """Returns what is known of a folder; a version never changes, so it is read once."""
        parent, _, last = name.rpartition("/")
        if parent == "versions":
            number = int(last)
            if self._versions.get(number, ("", None))[1] is None:
                self.stamp(number)
            folder = self._versions[number][1]
        else:
            group, _, kind = parent.rpartition("/")
            values = self._documents.read(f"texts/{group}").get(kind, {}).get(last)
            folder = None if values is None else _Folder.of(values)
        if folder is None:
            raise FileNotFoundError(2, "No such folder", self.place(name))
        return folder

    def manifest(self, name: str) -> bytes:
        """Returns the manifest of a folder."""
        return self._folder(name).manifest

    def exists(self, name: str) -> bool:
        """Returns whether there is a folder with this name now."""
        try:
            if name.startswith("versions/"):
                self.stamp(int(name.rpartition("/")[2]))
            self._folder(name)
        except FileNotFoundError:
            return False
        return True

    def new_folder(self) -> AbstractContextManager[Path]:
        """Yields an empty folder beside the local copies."""
        return self._cache.new_folder()

    def publish(self, fence: Fence, folder: Path, files: Sequence[FileRecord], manifest: Callable[[int], str]) -> int:
        """Writes the files, then creates the object of the first number that is free."""
        self._check(fence)
        id = self._upload(folder, files)
        number = max(self._numbers(), default=0)
        while True:
            number = next_number(number, self.place("versions"))
            text = manifest(number)
            values = _values(id, text, files) | {"run": fence.run, "token": fence.token}
            try:
                self._bucket.create(f"versions/{number}", encoded(values))
                break
            except Conflict:
                continue
        if not self._counts(number, values, {}):
            self._bury(number)
            self._delete_files(id, files)
            raise RunOwnershipLost(f"Another process took over the run {fence.run}; this one ends.")
        self._bucket.delete([f"staging/{id}"])
        self._keep_copy(id, folder, text)
        return number

    def _numbers(self) -> list[int]:
        """Returns every number that was given, also those of removed versions."""
        return [number for each in self._bucket.list("versions") if (number := number_of(_last(each.name)))]

    def commit(self, fence: Fence, name: str, folder: Path, files: Sequence[FileRecord], manifest: str) -> None:
        """Writes the files, then adds the folder to the document of its run."""
        self._check(fence)
        id = self._upload(folder, files)
        kind, number = name.split("/")[-2:]
        replaced: list[Document] = []

        def change(document: Document) -> Document:
            fence.check(DocumentTexts(document), self._fence(fence.run))
            folders = document.get(kind, {})
            replaced[:] = [folders[number]] if number in folders else []
            return document | {kind: folders | {number: _values(id, manifest, files)}}

        try:
            self._documents.change(_of_run(fence.run), change)
        except RunOwnershipLost:
            self._delete_files(id, files)
            raise
        self._bucket.delete([f"staging/{id}"])
        self._keep_copy(id, folder, manifest)
        for values in replaced:
            self._delete_listed(values["id"])

    def _upload(self, folder: Path, files: Sequence[FileRecord]) -> str:
        id = secrets.token_hex(16)
        self._bucket.upload(f"staging/{id}", b"files that are being written")
        _parallel(lambda each: self._bucket.upload(f"files/{id}/{each.sha256}", folder / each.name), files)
        return id

    def _keep_copy(self, id: str, folder: Path, manifest: str) -> None:
        # Without a copy it is fetched when it is needed.
        with suppress(OSError):
            (folder / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
            self._cache.put(id, folder)

    def remove(self, name: str, unless: Callable[[], bool] = lambda: False) -> bool:
        """Hides a folder, looks whether somebody needs it, and removes it or shows it again."""
        parent, _, last = name.rpartition("/")
        return self._remove_version(int(last), unless) if parent == "versions" else self._remove_listed(name, unless)

    def _remove_version(self, number: int, unless: Callable[[], bool]) -> bool:
        name = f"versions/{number}"
        e_tag, values = self._read_version(number)
        if values is None:
            return False
        try:
            self._bucket.replace(name, encoded(values | {"hidden": time.time()}), e_tag)
            if unless():
                self._show_version(number)
                return False
            self._bury(number)
        except Conflict:
            return False  # another process removes it
        self._versions.pop(number, None)
        if values["id"]:
            self._delete_listed(values["id"])
        return True

    def _show_version(self, number: int) -> None:
        values, e_tag = read_document(self._bucket, f"versions/{number}")
        self._bucket.replace(f"versions/{number}", encoded(_without(values, "hidden")), e_tag)

    def _bury(self, number: int) -> None:
        """Leaves an empty object, so that the number is not given again."""
        content, e_tag = self._bucket.read(f"versions/{number}")
        if content:
            self._bucket.replace(f"versions/{number}", b"", e_tag)

    def _remove_listed(self, name: str, unless: Callable[[], bool]) -> bool:
        run, kind, number = name.split("/")[-3:]
        values = self._documents.read(_of_run(run)).get(kind, {}).get(number)
        if values is None:
            return False
        key = f"{kind}/{number}"

        def hide(document: Document) -> Document:
            hidden = document.get("hidden", {}) | {key: [values, time.time()]}
            return document | {kind: _without(document.get(kind, {}), number), "hidden": hidden}

        self._documents.change(_of_run(run), hide)
        is_needed = unless()
        self._documents.change(_of_run(run), lambda document: _unhidden(document, key, show=is_needed))
        if not is_needed:
            self._delete_listed(values["id"])
        return not is_needed

    def remove_teachers(self, run: str) -> None:
        """Removes the teachers from the document of a run, then their files."""
        gone: list[Document] = []

        def change(document: Document) -> Document | None:
            gone[:] = document.get("teachers", {}).values()
            return document | {"teachers": {}} if gone else None

        self._documents.change(_of_run(run), change)
        for values in gone:
            self._delete_listed(values["id"])

    def _delete_files(self, id: str, files: Iterable[FileRecord]) -> None:
        self._bucket.delete(f"files/{id}/{each.sha256}" for each in files)
        self._bucket.delete([f"staging/{id}"])

    def _delete_listed(self, id: str) -> None:
        """Removes the files of a folder that is gone; a process that dies meanwhile leaves them to `sweep`."""
        self._bucket.upload(f"staging/{id}", b"files that are being removed")
        self._bucket.delete(each.name for each in self._bucket.list(f"files/{id}"))
        self._bucket.delete([f"staging/{id}"])

    def fetch(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns the local copy of a folder, each file of which was compared with the manifest when it arrived."""
        try:
            found = self._folder(name)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{self.place(name)} cannot be read: {error.strerror}.") from error

        def download(folder: Path) -> None:
            _parallel(lambda each: self._download(found.id, each, folder / each.name), files)
            (folder / MANIFEST_NAME).write_bytes(found.manifest)

        return self._cache.fetch(found.id, download)

    def _download(self, id: str, record: FileRecord, path: Path) -> None:
        name = f"files/{id}/{record.sha256}"
        for _ in range(_FETCHES):
            try:
                with path.open("wb") as file:
                    digest = hashlib.sha256()
                    for part in self._bucket.parts(name, record.size_bytes):
                        digest.update(part)
                        file.write(part)
            except FileNotFoundError:
                raise CorruptCheckpoint(f"{self.place(name)} ({record.name}) is missing.") from None
            if digest.hexdigest() == record.sha256:
                return
        raise CorruptCheckpoint(f"{self.place(name)} ({record.name}) has changed: its SHA-256 is not that of its name.")

    def verified(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns the local copy of a folder; one that has changed is fetched again."""
        folder = self.fetch(name, files)
        try:
            verify_files(folder, files)
        except CorruptCheckpoint:
            self._cache.discard(folder.name)
            folder = self.fetch(name, files)
            verify_files(folder, files)
        return folder

    def check(self, name: str, files: Sequence[FileRecord]) -> None:
        """Reads every file of a folder in the bucket, and compares it with the manifest."""
        with self.new_folder() as folder:
            try:
                id = self._folder(name).id
            except FileNotFoundError as error:
                raise CorruptCheckpoint(f"{self.place(name)} cannot be read: {error.strerror}.") from error
            for each in files:
                self._download(id, each, folder / each.name)
                (folder / each.name).unlink()

    def lacking(self, name: str, files: Sequence[FileRecord]) -> str:
        """Returns an empty text: the files are written before the folder is visible."""
        return ""

    def state(self, name: str) -> str:
        """Returns the id of the files of a folder, which never change."""
        try:
            return self._folder(name).id
        except FileNotFoundError:
            return ""

    def size_bytes(self, name: str) -> int:
        """Returns the size of the files of a folder."""
        try:
            return self._folder(name).size_bytes
        except FileNotFoundError:
            return 0

    def written_at(self, name: str) -> float:
        """Returns when a folder was written."""
        try:
            return self._folder(name).written_at
        except FileNotFoundError:
            return 0.0

    # Keeping

    def sweep(self) -> None:
        """Removes what dead processes have left a day ago, and shows again what one has hidden an hour ago."""
        self._cache.sweep()
        now = time.time()
        versions = self._bucket.list("versions")
        highest = max((number_of(_last(each.name)) or 0 for each in versions), default=0)
        for each in versions:
            number = number_of(_last(each.name))
            if not each.size_bytes and number != highest and now - each.written_at > _ABANDONED_S:
                self._bucket.delete([each.name])
            elif each.size_bytes and number and now - each.written_at > _HIDDEN_S and self._is_hidden(number):
                with suppress(Conflict, FileNotFoundError):
                    self._show_version(number)
        for run in self.stamps("runs"):
            self._documents.change(_of_run(run), _shown_again)
        abandoned = [each for each in self._bucket.list("staging") if now - each.written_at > _ABANDONED_S]
        if abandoned:
            self._finish([_last(each.name) for each in abandoned])

    def _is_hidden(self, number: int) -> bool:
        known = self._versions.get(number)
        return (known is None or known[1] is None) and self._read_version(number)[1] is None

    def _finish(self, ids: Sequence[str]) -> None:
        """Removes staged files unless a folder has them after all."""
        self.versions()
        kept = {folder.id for _, folder in self._versions.values() if folder is not None}
        self.runs()
        for _, document in self._runs.values():
            kept |= {each["id"] for kind in ("states", "teachers") for each in document.get(kind, {}).values()}
        for id in ids:
            if id in kept:
                self._bucket.delete([f"staging/{id}"])
            else:
                self._delete_listed(id)

    def unknown(self) -> list[str]:
        """Returns the URLs among the versions whose names are not numbers."""
        return [self.place(each.name) for each in self._bucket.list("versions") if number_of(_last(each.name)) is None]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _of_run(run: str) -> str:
    return f"texts/runs/{run}"


def _values(id: str, manifest: str, files: Sequence[FileRecord]) -> Document:
    size_bytes = sum(each.size_bytes for each in files) + len(manifest)
    return {"id": id, "manifest": manifest, "size_bytes": size_bytes, "at": time.time()}


def _run(document: Document) -> Run:
    def written_at(kind: str) -> dict[int, float]:
        return {int(number): float(values["at"]) for number, values in document.get(kind, {}).items()}

    history = document.get("history")
    at = None if history is None else float(history["at"])
    return Run(DocumentTexts(document), written_at("states"), written_at("teachers"), at)


def _without(values: Document, name: str) -> Document:
    return {each: value for each, value in values.items() if each != name}


def _unhidden(document: Document, key: str, show: bool) -> Document:
    """Returns the document of a run without what is hidden under a key, shown again or not."""
    hidden = document.get("hidden", {})
    kind, _, number = key.partition("/")
    shown = {number: hidden[key][0]} if show and key in hidden else {}
    return document | {kind: document.get(kind, {}) | shown, "hidden": _without(hidden, key)}


def _shown_again(document: Document) -> Document | None:
    """Returns the document of a run with what was hidden too long ago; None if there is nothing."""
    keys = [key for key, (_, at) in document.get("hidden", {}).items() if time.time() - at > _HIDDEN_S]
    for key in keys:
        document = _unhidden(document, key, show=True)
    return document if keys else None


def _parallel(act: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    if len(items) < 2:
        return [act(each) for each in items]
    with ThreadPoolExecutor(min(_REQUESTS, len(items))) as threads:
        return list(threads.map(act, items))
