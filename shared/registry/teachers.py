"""The versions that teach a run, which the run keeps as long as it has a state.

`runs/<run>/teachers/<n>/` is the whole folder of version n, and `runs/<run>/teachers.json` names the teachers in their
order. The text is written last, so all teachers that it names are there. Its run never takes other teachers.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import CorruptCheckpoint, FailedPrecondition, NotFound
from shared.registry.commit import link
from shared.registry.fence import FENCE, Fence
from shared.registry.manifest import MANIFEST_NAME, TeacherRecord, VersionManifest, typed
from shared.registry.store import Store, Texts
from shared.text import excerpt

_NAME = "teachers.json"


@dataclass(frozen=True)
class TeacherVersion:
    """A version that teaches, and the folder with its files."""

    manifest: VersionManifest
    folder: Path


class Teachers:
    """The teachers of the runs of one registry. Methods that write raise `FailedPrecondition` if the store fails, and
    `RunOwnershipLost` if another process took over the run."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def runs(self) -> list[str]:
        """Returns every run that keeps teachers, in alphabetical order."""
        return sorted(name for name, run in self._store.runs().items() if _NAME in run.texts or run.teachers)

    def place(self, run: str) -> str:
        """Returns where the teachers of a run are, for a sentence."""
        return self._store.place(f"runs/{run}/teachers")

    def take(self, fence: Fence, source: Path) -> None:
        """Gives a run the local folder of a version: on a disk by hard links if the file system allows it.

        An earlier folder, which an attempt has left that died before `keep`, is replaced. Raises `NotFound` if the
        version has been removed.
        """
        try:
            manifest = VersionManifest.read(source)
            with self._store.new_folder() as folder:
                for record in manifest.files:
                    link(source / record.name, folder / record.name)
                text = (source / MANIFEST_NAME).read_text(encoding="utf-8")
                self._store.commit(fence, _name(fence.run, manifest.version), folder, manifest.files, text)
        except (CorruptCheckpoint, FailedPrecondition):
            if source.is_dir():
                raise
            raise NotFound(f"Version {source.name} has been removed, so it cannot teach.") from None

    def keep(self, fence: Fence, numbers: Sequence[int]) -> None:
        """Makes versions that the run has taken its teachers, in this order.

        Raises `CorruptCheckpoint`, which names the file, if one of them does not match its manifest.
        """
        manifests = [self._manifest(fence.run, number) for number in numbers]
        for manifest in manifests:
            self._store.verified(_name(fence.run, manifest.version), manifest.files)
        records = [asdict(TeacherRecord(manifest.version, manifest.digest)) for manifest in manifests]
        text = json.dumps({"teachers": records}, indent=2)

        def change(texts: Texts) -> Mapping[str, str]:
            fence.check(texts, self._store.place(f"runs/{fence.run}/{FENCE}"))
            return {_NAME: text}

        self._store.change(f"runs/{fence.run}", change)

    def of(self, run: str) -> list[TeacherVersion]:
        """Returns the teachers of a run in their order; none if it has not kept any yet. Reads only manifests.

        Raises `CorruptCheckpoint` if one of them is absent or cannot be read.
        """
        return [self._teacher(run, record) for record in self._records(run)]

    def verify(self, run: str) -> None:
        """Compares every file of the teachers of a run with its manifest; raises `CorruptCheckpoint`."""
        for record in self._records(run):
            self._store.check(_name(run, record.version), self._taught(run, record).files)

    def taught_by(self, run: str, number: int, digest: str) -> TeacherVersion | None:
        """Returns the version with a number and a digest if it teaches a run."""
        record = TeacherRecord(number, digest)
        return self._teacher(run, record) if record in self._records(run) else None

    def age_s(self, run: str) -> float:
        """Returns the seconds since the run has taken a teacher; 0 if it has none."""
        taken_at = self._store.run(run).teachers.values()
        return time.time() - max(taken_at) if taken_at else 0.0

    def remove(self, run: str) -> None:
        """Removes the teachers of a run: first their names, then all of them at once."""
        if _NAME in self._store.read(f"runs/{run}"):
            self._store.change(f"runs/{run}", lambda _: {_NAME: None})
        self._store.remove_teachers(run)

    def _teacher(self, run: str, record: TeacherRecord) -> TeacherVersion:
        manifest = self._taught(run, record)
        return TeacherVersion(manifest, self._store.fetch(_name(run, record.version), manifest.files))

    def _taught(self, run: str, record: TeacherRecord) -> VersionManifest:
        manifest = self._manifest(run, record.version)
        if manifest.digest != record.digest:
            place = self._store.place(_name(run, record.version))
            raise CorruptCheckpoint(f"{place} contains another version than the teacher that run {run} began with.")
        return manifest

    def _manifest(self, run: str, number: int) -> VersionManifest:
        name = _name(run, number)
        return VersionManifest.load(lambda: self._store.manifest(name), self._store.place(f"{name}/{MANIFEST_NAME}"))

    def _records(self, run: str) -> list[TeacherRecord]:
        texts = self._store.read(f"runs/{run}")
        try:
            if (text := texts.get(_NAME)) is None:
                return []
            return [TeacherRecord(**typed(TeacherRecord, each)) for each in json.loads(text)["teachers"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            place = self._store.place(f"runs/{run}/{_NAME}")
            raise CorruptCheckpoint(f"{place} cannot be understood: {excerpt(error, 120)}.") from error


def _name(run: str, number: int) -> str:
    return f"runs/{run}/teachers/{number}"
