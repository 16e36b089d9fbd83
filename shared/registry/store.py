"""The registry: states to resume from and versions to serve, as folders that are whole or absent.

versions/<n>/              model, configuration, tokenizer, held-out windows, manifest
runs/<run>/states/<step>/  weights, optimizer, position, manifest
runs/<run>/ended           marks a finished run
runs/<run>/history.jsonl   what it has reported: see `history.py`
runs/<run>/teachers/<n>/   versions that teach it, which `teachers.json` names: see `teachers.py`
evaluations/<n>/           records of evaluations of a version: see `evaluations.py`
serving/                   decisions and findings: see `decisions.py`
staging/<id>/              checkpoints that are being written or removed: see `staging.py`
holds/                     versions that jobs wait for: see `holds.py`
last_version               the highest number that any version ever had: see `numbering.py`
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from shared.errors import CorruptCheckpoint, NewerFormat, NotFound
from shared.registry import policy
from shared.registry.commit import (
    IGNORED_NAMES,
    lacking,
    locked,
    record_files,
    replace_text,
    reveal,
    seal,
    verify_files,
    writing,
)
from shared.registry.decisions import BestBy, Decided, Decisions, check_label
from shared.registry.evaluations import Evaluations, Figures
from shared.registry.fence import Fence
from shared.registry.history import Histories
from shared.registry.holds import Holds
from shared.registry.manifest import RUN_NAME, FileRecord, StateManifest, VersionManifest
from shared.registry.numbering import children, is_number, next_version, number_of, numbers
from shared.registry.staging import Staging
from shared.registry.teachers import Teachers
from shared.text import excerpt

logger = logging.getLogger(__name__)

# A file in the folder of a finished run.
_ENDED = "ended"

# Writes the files of a checkpoint into an empty folder.
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """The name of a version (its number), or of a state (its step and its run)."""

    number: int
    run: str | None = None

    def __str__(self) -> str:
        return f"version {self.number}" if self.run is None else f"state {self.number} of {self.run}"


class Registry:
    """One registry on disk. Readers need no lock, because every visible checkpoint is whole and never changes.

    `best_by` is what the label `best` compares.

    Methods that write raise `FailedPrecondition` if the disk is full or the folder cannot be written; no part of the
    checkpoint is visible then.
    """

    def __init__(self, root: Path, best_by: BestBy = BestBy.TRAINING) -> None:
        self.root = root
        self.best_by = best_by
        self.decisions = Decisions(root)
        self.holds = Holds(root)
        self.evaluations = Evaluations(root)
        self.histories = Histories(root)
        self._staging = Staging(root)
        self.teachers = Teachers(root, self._staging)
        # A version never changes, so its manifest is read once; the inode shows if the whole registry was replaced.
        self._manifests: dict[int, tuple[int, VersionManifest]] = {}
        # The versions whose manifest could not be read at the last attempt, with the reason.
        self.unreadable: dict[int, str] = {}

    # Versions

    def versions(self) -> list[VersionManifest]:
        """Returns every version with a readable manifest, by ascending number; puts the others into `unreadable`."""
        manifests = []
        unreadable: dict[int, str] = {}
        present = numbers(self.root / "versions")
        for number in sorted(present):
            try:
                manifests.append(self._manifest(number))
            except FileNotFoundError:
                continue
            except (CorruptCheckpoint, NewerFormat, OSError) as error:
                unreadable[number] = str(error)
                if number not in self.unreadable:
                    logger.warning("version %d is ignored: %s", number, error)
        self.unreadable = unreadable
        # Another process may have removed versions.
        for gone in self._manifests.keys() - present:
            self._manifests.pop(gone, None)
        return manifests

    def version(self, number: int) -> VersionManifest:
        """Returns the manifest of a version; raises `NotFound`, or `CorruptCheckpoint` if it cannot be read."""
        try:
            return self._manifest(number)
        except FileNotFoundError:
            raise NotFound(f"There is no version {number}; {policy.describe_labels(self.labels())}.") from None

    def _manifest(self, number: int) -> VersionManifest:
        directory = self.version_directory(number)
        try:
            inode = directory.stat().st_ino
            if self._manifests.get(number, (None, None))[0] != inode:
                manifest = VersionManifest.read(directory)
                if manifest.version != number:
                    raise CorruptCheckpoint(f"{directory} contains the manifest of version {manifest.version}.")
                self._manifests[number] = (inode, manifest)
            return self._manifests[number][1]
        except CorruptCheckpoint:
            # Another process may have removed it in the meantime.
            directory.stat()
            raise

    def version_directory(self, number: int) -> Path:
        """Returns the folder of a version, which may not exist."""
        return self.root / "versions" / str(number)

    def verify(self, manifest: VersionManifest) -> None:
        """Compares every file of a version with its manifest.

        Raises `CorruptCheckpoint`, or `NotFound` if the version was removed in the meantime.
        """
        directory = self.version_directory(manifest.version)
        try:
            verify_files(directory, manifest.files)
        except CorruptCheckpoint:
            if directory.exists():
                raise
            raise NotFound(f"Version {manifest.version} was removed from the registry.") from None

    def lacking(self, manifest: VersionManifest) -> str:
        """Describes a missing or unreadable file of a version; returns an empty text if there is none."""
        try:
            return lacking(self.version_directory(manifest.version), manifest.files)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"

    def labels(self) -> dict[str, int]:
        """Returns every label with the number of its version; without labels whose files cannot be read."""
        versions = self.versions()
        return policy.labels(versions, self.known(versions))

    def known(self, versions: Sequence[VersionManifest]) -> Decided:
        """Returns the decisions and refusals, without decisions that cannot be read."""
        try:
            return self.decided(versions)
        except CorruptCheckpoint as error:
            logger.warning("only labels that follow from the manifests are known: %s", error)
            return Decided(self._refused(versions), best_by=self.best_by, figures=self._figures(versions))

    def decided(self, versions: Sequence[VersionManifest]) -> Decided:
        """Returns the decisions and refusals; raises `CorruptCheckpoint` if a decision cannot be read."""
        stable, label = self.decisions.stable(), self.decisions.policy()
        return Decided(self._refused(versions), stable, label, self.best_by, self._figures(versions))

    def _figures(self, versions: Sequence[VersionManifest]) -> Mapping[int, Sequence[Figures]]:
        return self.evaluations.of(versions) if self.best_by is BestBy.EVALUATION else {}

    def _refused(self, versions: Sequence[VersionManifest]) -> frozenset[int]:
        found = self.decisions.found(versions, self.decisions.findings())
        return frozenset(
            version.version
            for version in versions
            if found.refused_everywhere(version.version, version.digest) or self.lacking(version)
        )

    def resolve(self, label: str) -> VersionManifest:
        """Returns the version that a label names; raises `InvalidArgument` if it is not a label, or `NotFound`."""
        versions = self.versions()
        number = policy.number_of(check_label(label), versions, self.known(versions))
        if number is None:
            raise NotFound(f"No version has the label {label!r}; {policy.describe_labels(self.labels())}.")
        return self.version(number)

    def named(self, name: str) -> VersionManifest:
        """Returns the version with a number or a label; raises as `version` and `resolve` do."""
        return self.version(int(name)) if is_number(name) else self.resolve(name)

    def publish_version(
        self, fence: Fence, write: Write, manifest: Callable[[int, tuple[FileRecord, ...]], VersionManifest]
    ) -> VersionManifest:
        """Writes a new version under the next number; `manifest` creates its manifest from the number and the files.

        Raises `RunOwnershipLost` if another process took over the run in the meantime; nothing is visible then.
        """
        with self._staging.new(self.root / "versions") as staging:
            write(staging)
            files = record_files(staging)
            with locked(self.root / "versions.lock"), fence.held():
                number = next_version(self.root)
                version = manifest(number, files)
                seal(staging, version.to_json())
                reveal(staging, self.version_directory(number))
        return version

    def remove_version(self, number: int) -> None:
        """Removes a version atomically, and its evaluations; processes that have its files open can still read them."""
        self.decisions.forget(number)
        self._staging.remove(self.version_directory(number))
        self._staging.remove(self.evaluations.folder(number))
        self._manifests.pop(number, None)

    # States

    def run_directory(self, run: str) -> Path:
        """Returns the folder of a run, which may not exist."""
        return self.root / "runs" / run

    def runs(self) -> list[str]:
        """Returns every run that has a folder, in alphabetical order."""
        return sorted(path.name for path in children(self.root / "runs") if _is_run(path))

    def has_begun(self, run: str) -> bool:
        """Returns whether a run has begun, so that no other one can have its name.

        One that failed before its first step leaves only its fence, which a later run of one attempt can raise again.
        """
        if self.states(run) or self.has_ended(run) or run in self.histories.runs():
            return True
        return Fence.last(self.run_directory(run)) > 1 or any(each.run == run for each in self.versions())

    def end_run(self, run: str) -> None:
        """Marks a run as finished, so that only its last state is kept."""
        with writing(self.root):
            replace_text(self.run_directory(run) / _ENDED, "")

    def has_ended(self, run: str) -> bool:
        """Returns whether a run is finished."""
        return (self.run_directory(run) / _ENDED).exists()

    def states(self, run: str) -> list[int]:
        """Returns the steps that have a state, in ascending order."""
        return sorted(numbers(self.run_directory(run) / "states"))

    def state_directory(self, run: str, step: int) -> Path:
        """Returns the folder of a state, which may not exist."""
        return self.run_directory(run) / "states" / str(step)

    def verified_state(self, run: str, step: int) -> Path:
        """Verifies a state and returns its folder; raises `NotFound` or `CorruptCheckpoint`."""
        directory = self.state_directory(run, step)
        try:
            manifest = StateManifest.read(directory)
            if (manifest.run, manifest.step) != (run, step):
                raise CorruptCheckpoint(f"{directory} contains the state of step {manifest.step} of {manifest.run}.")
            verify_files(directory, manifest.files)
        except CorruptCheckpoint:
            if directory.exists():
                raise
            kept = excerpt(", ".join(map(str, self.states(run))) or "none")
            raise NotFound(
                f"The run {run} no longer has a state of step {step}; it has states of these steps: {kept}."
            ) from None
        return directory

    def write_state(self, fence: Fence, run: str, step: int, write: Write) -> Path:
        """Writes the state of a step and returns its folder; keeps an existing valid state, because it is the same.

        Raises `RunOwnershipLost` if another process took over the run in the meantime; nothing is visible then.
        """
        final = self.state_directory(run, step)
        with writing(self.root):
            try:
                return self.verified_state(run, step)
            except NotFound:
                pass
            except CorruptCheckpoint as error:
                logger.warning("a damaged state is replaced: %s", error)
            with self._staging.new(final.parent) as staging:
                write(staging)
                seal(staging, StateManifest(run, step, time.time(), record_files(staging)).to_json())
                with fence.held():
                    self._staging.remove(final)
                    reveal(staging, final)
        return final

    # Both kinds

    def checkpoints(self) -> list[Checkpoint]:
        """Returns every version and every state, valid or not."""
        versions = [Checkpoint(number) for number in sorted(numbers(self.root / "versions"))]
        return versions + [Checkpoint(step, run) for run in self.runs() for step in self.states(run)]

    def unknown_paths(self) -> list[Path]:
        """Returns the paths among versions, runs, states and teachers with unknown names, which nothing reads."""
        folders = (self.root / "versions", *(self.run_directory(run) / "states" for run in self.runs()))
        paths = [path for folder in folders for path in children(folder) if number_of(path) is None]
        paths += [path for path in children(self.root / "runs") if not _is_run(path)]
        paths += self.teachers.unknown_paths()
        return [path for path in paths if path.name not in IGNORED_NAMES]

    def directory(self, checkpoint: Checkpoint) -> Path:
        """Returns the folder of a checkpoint, which may not exist."""
        if checkpoint.run is None:
            return self.version_directory(checkpoint.number)
        return self.state_directory(checkpoint.run, checkpoint.number)

    def size_bytes(self, checkpoint: Checkpoint) -> int:
        """Returns the size of a checkpoint's files; 0 if it does not exist."""
        try:
            return sum(path.stat().st_size for path in children(self.directory(checkpoint)))
        except FileNotFoundError:
            return 0

    def written_at(self, checkpoint: Checkpoint) -> float:
        """Returns when a checkpoint was written, in seconds since the epoch; 0 if it does not exist."""
        try:
            # Renaming the folder does not change this time.
            return self.directory(checkpoint).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def check(self, checkpoint: Checkpoint) -> None:
        """Compares a checkpoint's files with its manifest; raises `CorruptCheckpoint` or `NotFound`."""
        if checkpoint.run is None:
            self.verify(self.version(checkpoint.number))
        else:
            self.verified_state(checkpoint.run, checkpoint.number)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint atomically; processes that have its files open can still read them."""
        if checkpoint.run is None:
            self.remove_version(checkpoint.number)
        else:
            self._staging.remove(self.directory(checkpoint))

    def sweep(self) -> None:
        """Removes what dead processes left half-written or half-removed."""
        parents = (self.root.glob(f"runs/*/{kind}") for kind in ("states", "teachers"))
        self._staging.sweep(chain([self.root / "versions"], *parents))


def _is_run(path: Path) -> bool:
    return RUN_NAME.fullmatch(path.name) is not None and path.is_dir()
