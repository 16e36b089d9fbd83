"""The runs of a registry in object storage: for each a document, texts/runs/<run>.

texts             the fence and the other texts
states, teachers  the folders of the run: the id of the files and the manifest, by number
hidden            folders that are about to be removed, by kind and number, with the time
owners            the token of each owner, and the highest number of a version when he took over
history           the pieces of the history: see `object_history.py`
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path

from shared.errors import RunOwnershipLost
from shared.registry.bucket import Bucket
from shared.registry.documents import Document, Documents, DocumentTexts, with_texts
from shared.registry.fence import FENCE, Fence
from shared.registry.manifest import FileRecord
from shared.registry.numbering import number_of
from shared.registry.object_files import ObjectFiles, ObjectFolder, described, in_parallel
from shared.registry.store import Run

# A folder that a dead process has hidden is shown again after this time.
HIDDEN_S = 3600.0
_PARENT = "texts/runs"
_KINDS = ("states", "teachers")


def given_numbers(bucket: Bucket) -> list[int]:
    """Returns every number of a version that was given, also those of removed ones."""
    return [number for each in bucket.list("versions") if (number := number_of(each.name.rpartition("/")[2]))]


class ObjectRuns:
    """The runs of one registry. A folder's name is a run, a kind and a number: `run-1/states/5`."""

    def __init__(self, bucket: Bucket, documents: Documents, files: ObjectFiles) -> None:
        self._bucket = bucket
        self._documents = documents
        self._files = files
        # The e_tag and the document of each run at the last look.
        self._known: dict[str, tuple[Hashable, Document]] = {}

    def all(self) -> Mapping[str, Run]:
        """Returns every run; reads only those that have changed."""
        return {name: _run(document) for name, document in self._look().items()}

    def _look(self) -> Mapping[str, Document]:
        stamps = {each.name.rpartition("/")[2]: each.e_tag for each in self._bucket.list(_PARENT)}
        # Other threads may look at the same time, so this works on a copy.
        known = self._known.copy()
        new = [name for name, stamp in stamps.items() if known.get(name, (None, {}))[0] != stamp]
        for name, document in zip(new, in_parallel(self.read, new), strict=True):
            # It may be newer than its e_tag: then it is read once more at the next look.
            known[name] = (stamps[name], document)
        self._known = known = {name: each for name, each in known.items() if name in stamps}
        return {name: document for name, (_, document) in known.items()}

    def read(self, run: str) -> Document:
        """Returns the document of a run as it is now."""
        return self._documents.read(f"{_PARENT}/{run}")

    def change(self, run: str, change: Callable[[Document], Document | None]) -> Document:
        """Changes the document of a run."""
        return self._documents.change(f"{_PARENT}/{run}", change)

    def one(self, run: str) -> Run:
        """Returns a run as it is now."""
        return _run(self.read(run))

    # Owners

    def take_over(self, run: str, token: int | None) -> Fence:
        """Raises the fence of a run, and notes up to which number the versions of earlier owners count."""
        fences: list[Fence] = []

        def change(document: Document) -> Document | None:
            texts = DocumentTexts(document)
            fences.append(fence := Fence.after(texts, self._place(run), run, token))
            if texts.get(FENCE) == str(fence.token):
                return None
            changed = with_texts(document, lambda _: {FENCE: str(fence.token)}) or document
            return changed | {"owners": [*document.get("owners", []), [fence.token, None]]}

        self._settle(run, self.change(run, change))
        return fences[-1]

    def owned(self, run: str, token: int, number: int, known: Document | None = None) -> bool:
        """Returns whether a version that exists counts: whether its writer had not been replaced before.

        `known` is the document of the run if it was read after the version. The answer never changes: whoever takes
        over later finds the version.
        """
        document = self._settle(run, self.read(run) if known is None else known)
        return all(number <= after for later, after in document.get("owners", []) if later > token)

    def _settle(self, run: str, document: Document) -> Document:
        """Notes the highest number for owners who have just taken over."""
        while pending := [token for token, after in document.get("owners", []) if after is None]:
            # Their tokens were there before the numbers are read; those of later owners perhaps not.
            highest = max(given_numbers(self._bucket), default=0)

            def change(document: Document, pending: Sequence[int] = pending, highest: int = highest) -> Document:
                owners = [
                    [token, highest if after is None and token in pending else after]
                    for token, after in document["owners"]
                ]
                return document | {"owners": owners}

            document = self.change(run, change)
        return document

    def check(self, fence: Fence, document: Document | None = None) -> None:
        """Raises `RunOwnershipLost` if a later owner took over."""
        document = self.read(fence.run) if document is None else document
        fence.check(DocumentTexts(document), self._place(fence.run))

    def _place(self, run: str) -> str:
        return f"{self._bucket.address}/{_PARENT}/{run} ({FENCE})"

    # Folders

    def folder(self, name: str) -> ObjectFolder | None:
        """Returns what is known of a folder; None if there is none."""
        run, kind, number = name.split("/")
        document = self.read(run).get(kind, {}).get(number)
        return None if document is None else ObjectFolder.of(document)

    def commit(self, fence: Fence, name: str, folder: Path, files: Sequence[FileRecord], manifest: str) -> None:
        """Writes the files of a folder, then adds it to the document of its run."""
        run, kind, number = name.split("/")
        self.check(fence)
        id = self._files.upload(folder, files)
        replaced: list[str] = []

        def change(document: Document) -> Document | None:
            folders = document.get(kind, {})
            if folders.get(number, {}).get("id") == id:
                return None  # an earlier try took place, although it was not confirmed
            self.check(fence, document)
            replaced[:] = [folders[number]["id"]] if number in folders else []
            return document | {kind: folders | {number: described(id, manifest, files)}}

        try:
            self.change(run, change)
        except RunOwnershipLost:
            self._files.remove(id)
            raise
        self._files.keep(id, folder, manifest)
        for each in replaced:
            self._files.remove(each)

    def remove(self, name: str, unless: Callable[[], bool]) -> bool:
        """Hides a folder, looks whether somebody needs it, and removes it or shows it again."""
        run, kind, number = name.split("/")
        found = self.folder(name)
        if found is None:
            return False
        key = f"{kind}/{number}"
        entry = [found.document(), time.time()]

        def hide(document: Document) -> Document | None:
            folders = document.get(kind, {})
            if folders.get(number, {}).get("id") != found.id:
                return None
            return document | {kind: without(folders, number), "hidden": document.get("hidden", {}) | {key: entry}}

        def is_hidden(document: Document) -> bool:
            return bool(document.get("hidden", {}).get(key) == entry)

        if not is_hidden(self.change(run, hide)):
            return False  # another process removes it
        is_needed = unless()

        def decide(document: Document) -> Document | None:
            # If this process paused for long, another one has shown it again.
            return _unhidden(document, key, show=is_needed) if is_hidden(document) else None

        if found.id in _ids(self.change(run, decide)):
            return False
        self._files.remove(found.id)
        return True

    def remove_teachers(self, run: str) -> None:
        """Removes the teachers from the document of a run, then their files."""
        gone: list[Document] = []

        def change(document: Document) -> Document | None:
            gone[:] = document.get("teachers", {}).values()
            return document | {"teachers": {}} if gone else None

        self.change(run, change)
        for each in gone:
            self._files.remove(each["id"])

    def sweep(self) -> None:
        """Shows again what dead processes have hidden."""
        for run, document in self._look().items():
            if document.get("hidden"):
                self.change(run, _shown_again)

    def ids(self) -> Iterator[str]:
        """Yields the ids of the files of all folders."""
        for document in self._look().values():
            yield from _ids(document)


def _run(document: Document) -> Run:
    def written_at(kind: str) -> dict[int, float]:
        return {int(number): float(each["at"]) for number, each in document.get(kind, {}).items()}

    history = document.get("history")
    at = None if history is None else float(history["at"])
    return Run(DocumentTexts(document), written_at("states"), written_at("teachers"), at)


def _ids(document: Document) -> Iterator[str]:
    """Yields the ids of the folders of a run, also of those that are hidden."""
    for kind in _KINDS:
        yield from (str(each["id"]) for each in document.get(kind, {}).values())
    yield from (str(each["id"]) for each, _ in document.get("hidden", {}).values())


def without(document: Document, name: str) -> Document:
    """Returns a document without a name."""
    return {each: value for each, value in document.items() if each != name}


def _unhidden(document: Document, key: str, show: bool) -> Document:
    """Returns the document of a run without what is hidden under a key, shown again or not."""
    hidden = document.get("hidden", {})
    kind, _, number = key.partition("/")
    shown = {number: hidden[key][0]} if show and key in hidden else {}
    return document | {kind: document.get(kind, {}) | shown, "hidden": without(hidden, key)}


def _shown_again(document: Document) -> Document | None:
    """Returns the document of a run with what was hidden too long ago; None if there is nothing."""
    keys = [key for key, (_, at) in document.get("hidden", {}).items() if time.time() - at > HIDDEN_S]
    for key in keys:
        document = _unhidden(document, key, show=True)
    return document if keys else None
