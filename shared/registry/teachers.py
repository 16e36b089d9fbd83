"""The versions that teach a run, which the run keeps as long as it has a state.

`runs/<run>/teachers/<n>/` is the whole folder of version n, and `runs/<run>/teachers.json` names the teachers in their
order. The file is written last, so all teachers that it names are there. Its run never takes other teachers.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import CorruptCheckpoint, NotFound
from shared.registry.commit import link, replace_text, reveal, sync, verify_files, writing
from shared.registry.fence import Fence
from shared.registry.manifest import MANIFEST_NAME, RUN_NAME, TeacherRecord, VersionManifest, typed
from shared.registry.numbering import children, number_of
from shared.registry.staging import Staging
from shared.text import excerpt

_NAME = "teachers.json"


@dataclass(frozen=True)
class TeacherVersion:
    """A version that teaches, and the folder with its files."""

    manifest: VersionManifest
    folder: Path


class Teachers:
    """The teachers of the runs of one registry. Methods that write raise `FailedPrecondition` if the disk fails, and
    `RunOwnershipLost` if another process took over the run."""

    def __init__(self, root: Path, staging: Staging) -> None:
        self._root = root
        self._staging = staging

    def runs(self) -> list[str]:
        """Returns every run that keeps teachers, in alphabetical order."""
        found = (path for path in children(self._root / "runs") if RUN_NAME.fullmatch(path.name))
        return sorted(path.name for path in found if (path / _NAME).exists() or self.folder(path.name).is_dir())

    def folder(self, run: str) -> Path:
        """Returns the folder of a run's teachers, which may not exist."""
        return self._root / "runs" / run / "teachers"

    def take(self, fence: Fence, source: Path) -> None:
        """Gives a run the folder of a version: by hard links if the file system allows it, else as a copy.

        An earlier folder, which an attempt has left that died before `keep`, is replaced. Raises `NotFound` if the
        version has been removed.
        """
        if not source.is_dir():
            raise NotFound(f"Version {source.name} has been removed, so it cannot teach.")
        manifest = VersionManifest.read(source)
        final = self.folder(fence.directory.name) / str(manifest.version)
        with self._staging.new(final.parent) as staging:
            for name in (*(record.name for record in manifest.files), MANIFEST_NAME):
                link(source / name, staging / name)
            sync(staging)
            with fence.held():
                self._staging.remove(final)
                reveal(staging, final)

    def keep(self, fence: Fence, numbers: Sequence[int]) -> None:
        """Makes versions that the run has taken its teachers, in this order.

        Raises `CorruptCheckpoint`, which names the file, if one of them does not match its manifest.
        """
        run = fence.directory.name
        manifests = [VersionManifest.read(self.folder(run) / str(number)) for number in numbers]
        for manifest in manifests:
            verify_files(self.folder(run) / str(manifest.version), manifest.files)
        records = [asdict(TeacherRecord(manifest.version, manifest.digest)) for manifest in manifests]
        with writing(self._root), fence.held():
            replace_text(fence.directory / _NAME, json.dumps({"teachers": records}, indent=2))

    def of(self, run: str) -> list[TeacherVersion]:
        """Returns the teachers of a run in their order; none if it has not kept any yet. Reads only manifests.

        Raises `CorruptCheckpoint` if one of them is absent or cannot be read.
        """
        return [self._teacher(run, record) for record in self._records(run)]

    def verify(self, run: str) -> None:
        """Compares every file of the teachers of a run with its manifest; raises `CorruptCheckpoint`."""
        for teacher in self.of(run):
            verify_files(teacher.folder, teacher.manifest.files)

    def taught_by(self, run: str, number: int, digest: str) -> TeacherVersion | None:
        """Returns the version with a number and a digest if it teaches a run."""
        record = TeacherRecord(number, digest)
        return self._teacher(run, record) if record in self._records(run) else None

    def age_s(self, run: str) -> float:
        """Returns the seconds since the run has taken a teacher; 0 if it has none."""
        try:
            return time.time() - self.folder(run).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def remove(self, run: str) -> None:
        """Removes the teachers of a run: first their names, then all of them at once."""
        with writing(self._root):
            path = self._root / "runs" / run / _NAME
            if path.exists():
                path.unlink(missing_ok=True)
                sync(path.parent)
            self._staging.remove(self.folder(run))

    def unknown_paths(self) -> list[Path]:
        """Returns the paths among the teachers whose names are not numbers."""
        return [path for run in self.runs() for path in children(self.folder(run)) if number_of(path) is None]

    def _teacher(self, run: str, record: TeacherRecord) -> TeacherVersion:
        folder = self.folder(run) / str(record.version)
        manifest = VersionManifest.read(folder)
        if manifest.digest != record.digest:
            raise CorruptCheckpoint(f"{folder} contains another version than the teacher that run {run} began with.")
        return TeacherVersion(manifest, folder)

    def _records(self, run: str) -> list[TeacherRecord]:
        path = self._root / "runs" / run / _NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return [TeacherRecord(**typed(TeacherRecord, each)) for each in values["teachers"]]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CorruptCheckpoint(f"{path} cannot be understood: {excerpt(error, 120)}.") from error
