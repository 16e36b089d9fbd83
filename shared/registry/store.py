"""The registry: states to resume from and versions to serve, as folders that are whole or absent.

versions/<n>/              model, configuration, tokenizer, held-out windows, manifest
runs/<run>/states/<step>/  weights, optimizer, position, manifest
runs/<run>/ended           there once the run has come to its end
evaluations/<n>/           what later evaluations of a version found
serving/                   what servers found out and operators decided, as `decisions.py` has it
staging/<id>/              what is being written or removed, as `staging.py` has it
holds/                     what jobs wait for, as `holds.py` has it
last_version               the highest number that a version ever had, as `numbering.py` has it
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from shared.errors import CorruptCheckpoint, NotFound
from shared.registry import policy
from shared.registry.commit import (
    IGNORED_NAMES,
    lacking,
    locked,
    make_folder,
    record_files,
    replace_text,
    reveal,
    seal,
    verify_files,
    writing,
)
from shared.registry.decisions import LABELS, Decided, Decisions, check_label
from shared.registry.fence import Fence
from shared.registry.holds import Holds
from shared.registry.manifest import RUN_NAME, FileRecord, StateManifest, VersionManifest
from shared.registry.numbering import HighestVersion, children, number_of, numbers
from shared.registry.staging import Staging
from shared.text import excerpt

logger = logging.getLogger(__name__)

# In the folder of a run that has come to its end.
_ENDED = "ended"

# Fills an empty folder with a checkpoint's files.
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """Names a version by its number, or a state by its step and its run."""

    number: int
    run: str | None = None

    def __str__(self) -> str:
        return f"version {self.number}" if self.run is None else f"state {self.number} of {self.run}"


class Registry:
    """One registry on disk. Readers need no lock: what they can see is whole and never changes.

    What writes raises `FailedPrecondition` where the disk is full or the folder cannot be written; nothing is visible
    of a checkpoint then.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.decisions = Decisions(root)
        self.holds = Holds(root)
        self._staging = Staging(root)
        self._highest = HighestVersion(root)
        # A version never changes, so its manifest is read once; the inode tells a new registry at the same place.
        self._manifests: dict[int, tuple[int, VersionManifest]] = {}
        # Versions whose manifest could not be read when it was looked at last, and why.
        self.unreadable: dict[int, str] = {}

    # Versions.

    def versions(self) -> list[VersionManifest]:
        """Every version whose manifest can be read, by ascending number; the others are in `unreadable` then."""
        manifests = []
        unreadable: dict[int, str] = {}
        present = numbers(self.root / "versions")
        for number in sorted(present):
            try:
                manifests.append(self._manifest(number))
            except FileNotFoundError:
                continue
            except (CorruptCheckpoint, OSError) as error:
                unreadable[number] = str(error)
                if number not in self.unreadable:
                    logger.warning("version %d is left out: %s", number, error)
        self.unreadable = unreadable
        # Another process may have removed some.
        for gone in self._manifests.keys() - present:
            self._manifests.pop(gone, None)
        return manifests

    def version(self, number: int) -> VersionManifest:
        """The manifest of a version; raises `NotFound`, or `CorruptCheckpoint` where it cannot be read."""
        try:
            return self._manifest(number)
        except FileNotFoundError:
            raise NotFound(f"There is no version {number}; {policy.describe_labels(self.labels())}.") from None

    def _manifest(self, number: int) -> VersionManifest:
        directory = self.version_directory(number)
        try:
            inode = directory.stat().st_ino
            if self._manifests.get(number, (None, None))[0] != inode:
                self._manifests[number] = (inode, self._read_manifest(number))
            return self._manifests[number][1]
        except CorruptCheckpoint:
            # It can have been removed meanwhile.
            directory.stat()
            raise

    def _read_manifest(self, number: int) -> VersionManifest:
        directory = self.version_directory(number)
        manifest = VersionManifest.read(directory)
        if manifest.version != number:
            raise CorruptCheckpoint(f"{directory} holds the manifest of version {manifest.version}.")
        return manifest

    def version_directory(self, number: int) -> Path:
        """The folder of a version, whether or not it exists."""
        return self.root / "versions" / str(number)

    def verify(self, manifest: VersionManifest) -> None:
        """Compares every file of a version with its manifest; raises `CorruptCheckpoint`, or `NotFound` where the
        version was removed meanwhile."""
        directory = self.version_directory(manifest.version)
        try:
            verify_files(directory, manifest.files)
        except CorruptCheckpoint:
            if directory.exists():
                raise
            raise NotFound(f"Version {manifest.version} was removed from the registry.") from None

    def lacking(self, manifest: VersionManifest) -> str:
        """What a version lacks of its files, as while it is copied, in a few words; empty if they are all there."""
        try:
            return lacking(self.version_directory(manifest.version), manifest.files)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"

    def labels(self) -> dict[str, int]:
        """Every label with the number of the version that it names now; without those of files that cannot be read."""
        versions = self.versions()
        return policy.labels(versions, self.known(versions))

    def known(self, versions: Sequence[VersionManifest]) -> Decided:
        """What was decided and found out about versions, without the decisions that cannot be read."""
        try:
            return self.decided(versions)
        except CorruptCheckpoint as error:
            logger.warning("only the labels that follow from the manifests are known: %s", error)
            return Decided(self._refused(versions))

    def decided(self, versions: Sequence[VersionManifest]) -> Decided:
        """What was decided and found out about versions; raises `CorruptCheckpoint` where some decision cannot be
        read."""
        return Decided(self._refused(versions), self.decisions.stable(), self.decisions.policy())

    def _refused(self, versions: Sequence[VersionManifest]) -> frozenset[int]:
        found = self.decisions.found(versions, self.decisions.findings())
        return frozenset(
            version.version
            for version in versions
            if found.refused_everywhere(version.version, version.digest) or self.lacking(version)
        )

    def resolve(self, label: str) -> VersionManifest:
        """The version that a label names; raises `InvalidArgument` on what is no label, and `NotFound`."""
        check_label(label)
        labels = self.labels()
        number = labels.get(label)
        if number is None and label not in LABELS:
            versions = self.versions()
            number = policy.number_of(label, versions, self.decided(versions))
        if number is None:
            raise NotFound(f"No version has the label {label!r}; {policy.describe_labels(labels)}.")
        return self.version(number)

    def publish_version(
        self, fence: Fence, write: Write, manifest: Callable[[int, tuple[FileRecord, ...]], VersionManifest]
    ) -> VersionManifest:
        """Writes a new version under a number that none had before; `manifest` completes it from number and files.

        Raises `RunOwnershipLost` where another process took the run over meanwhile; nothing is visible then.
        """
        with self._staging.new(self.root / "versions") as staging:
            write(staging)
            files = record_files(staging)
            with locked(self.root / "versions.lock"), fence.held():
                number = self._highest.next()
                version = manifest(number, files)
                seal(staging, version.to_json())
                reveal(staging, self.version_directory(number))
        return version

    def keep_evaluation(self, number: int, evaluation_set: str, text: str) -> None:
        """Keeps what an evaluation of a version on a set found, beside the version, which never changes."""
        folder = self._evaluations(number)
        if not self.version_directory(number).is_dir():
            return  # it was removed meanwhile
        with writing(self.root):
            make_folder(folder, self.root)
            replace_text(folder / f"{evaluation_set}.json", text)

    def _evaluations(self, number: int) -> Path:
        return self.root / "evaluations" / str(number)

    def remove_version(self, number: int) -> None:
        """Takes a version away whole, and its evaluations; who has it open keeps what is open."""
        self.decisions.forget(number)
        self._staging.remove(self.version_directory(number))
        self._staging.remove(self._evaluations(number))
        self._manifests.pop(number, None)

    # States.

    def run_directory(self, run: str) -> Path:
        """The folder of a run, whether or not it exists."""
        return self.root / "runs" / run

    def runs(self) -> list[str]:
        """Every run that has a folder, in alphabetical order."""
        return sorted(path.name for path in children(self.root / "runs") if _is_run(path))

    def end_run(self, run: str) -> None:
        """Remembers that a run has come to its end, so that only a later run needs its states."""
        with writing(self.root):
            replace_text(self.run_directory(run) / _ENDED, "")

    def has_ended(self, run: str) -> bool:
        """Whether a run has come to its end."""
        return (self.run_directory(run) / _ENDED).exists()

    def states(self, run: str) -> list[int]:
        """The steps that have a state, ascending."""
        return sorted(numbers(self.run_directory(run) / "states"))

    def state_directory(self, run: str, step: int) -> Path:
        """The folder of a state, whether or not it exists."""
        return self.run_directory(run) / "states" / str(step)

    def verified_state(self, run: str, step: int) -> Path:
        """The folder of a state whose files were compared with its manifest; raises `NotFound`, `CorruptCheckpoint`."""
        directory = self.state_directory(run, step)
        try:
            manifest = StateManifest.read(directory)
            if (manifest.run, manifest.step) != (run, step):
                raise CorruptCheckpoint(f"{directory} holds the state of step {manifest.step} of {manifest.run}.")
            verify_files(directory, manifest.files)
        except CorruptCheckpoint:
            if directory.exists():
                raise
            kept = excerpt(", ".join(map(str, self.states(run))) or "none")
            raise NotFound(
                f"The run {run} has no state of step {step} any more; its states are of the steps: {kept}."
            ) from None
        return directory

    def write_state(self, fence: Fence, run: str, step: int, write: Write) -> Path:
        """Writes the state of a step; one that is there and whole is kept, as it is the same.

        Raises `RunOwnershipLost` where another process took the run over meanwhile; nothing is visible then.
        """
        final = self.state_directory(run, step)
        with writing(self.root):
            try:
                return self.verified_state(run, step)
            except NotFound:
                pass
            except CorruptCheckpoint as error:
                logger.warning("a state is written anew: %s", error)
            with self._staging.new(final.parent) as staging:
                write(staging)
                seal(staging, StateManifest(run, step, time.time(), record_files(staging)).to_json())
                with fence.held():
                    self._staging.remove(final)
                    reveal(staging, final)
        return final

    def remove_state(self, run: str, step: int) -> None:
        """Takes a state away whole."""
        self._staging.remove(self.state_directory(run, step))

    # Both kinds.

    def checkpoints(self) -> list[Checkpoint]:
        """Every version and every state, whole or not."""
        versions = [Checkpoint(number) for number in sorted(numbers(self.root / "versions"))]
        return versions + [Checkpoint(step, run) for run in self.runs() for step in self.states(run)]

    def strangers(self) -> list[Path]:
        """What stands among versions, runs and states under a name that the registry gives none; nothing reads it."""
        folders = (self.root / "versions", *(self.run_directory(run) / "states" for run in self.runs()))
        paths = [path for folder in folders for path in children(folder) if number_of(path) is None]
        paths += [path for path in children(self.root / "runs") if not _is_run(path)]
        return [path for path in paths if path.name not in IGNORED_NAMES]

    def directory(self, checkpoint: Checkpoint) -> Path:
        """The folder of a checkpoint, whether or not it exists."""
        if checkpoint.run is None:
            return self.version_directory(checkpoint.number)
        return self.state_directory(checkpoint.run, checkpoint.number)

    def size_bytes(self, checkpoint: Checkpoint) -> int:
        """The size of a checkpoint's files; 0 where it is gone."""
        try:
            return sum(path.stat().st_size for path in children(self.directory(checkpoint)))
        except FileNotFoundError:
            return 0

    def written_at(self, checkpoint: Checkpoint) -> float:
        """When a checkpoint was written, in seconds since the epoch; 0 where it is gone."""
        try:
            # A rename of the folder leaves it as it was.
            return self.directory(checkpoint).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def check(self, checkpoint: Checkpoint) -> None:
        """Compares a checkpoint's files with its manifest; raises `CorruptCheckpoint`, or `NotFound` where it is
        gone."""
        if checkpoint.run is None:
            self.verify(self.version(checkpoint.number))
        else:
            self.verified_state(checkpoint.run, checkpoint.number)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Takes a checkpoint away whole; who has it open keeps what is open."""
        if checkpoint.run is None:
            self.remove_version(checkpoint.number)
        else:
            self.remove_state(checkpoint.run, checkpoint.number)

    def sweep(self) -> None:
        """Removes what processes that are gone left half-written or half-removed."""
        self._staging.sweep(chain([self.root / "versions"], self.root.glob("runs/*/states")))


def _is_run(path: Path) -> bool:
    return RUN_NAME.fullmatch(path.name) is not None and path.is_dir()
