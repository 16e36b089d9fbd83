"""The registry: states to resume from and versions to serve, as folders that are whole or absent.

versions/<n>/              model, configuration, tokenizer, held-out windows, manifest
runs/<run>/states/<step>/  weights, optimizer, position, manifest
staging/<process>-<id>/    what is being written
"""

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import CorruptCheckpoint, NotFound
from shared.registry import policy
from shared.registry.commit import locked, reveal, seal, verify_files
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord, StateManifest, VersionManifest

logger = logging.getLogger(__name__)

# Fills an empty folder with a checkpoint's files.
Write = Callable[[Path], None]


class Registry:
    """One registry on disk. Readers need no lock: what they can see is whole and never changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # A version never changes, so its manifest is read once; the inode tells a new registry at the same place.
        self._manifests: dict[int, tuple[int, VersionManifest]] = {}
        self._reported: set[int] = set()

    # Versions.

    def versions(self) -> list[VersionManifest]:
        """Every version whose manifest can be read, by ascending number; the others are logged, once each."""
        manifests = []
        for number in sorted(_numbers(self.root / "versions")):
            try:
                manifests.append(self._manifest(number))
            except FileNotFoundError:
                continue
            except CorruptCheckpoint as error:
                if number not in self._reported:
                    self._reported.add(number)
                    logger.warning("version %d is left out: %s", number, error)
        return manifests

    def version(self, number: int) -> VersionManifest:
        """The manifest of a version; raises `NotFound`, or `CorruptCheckpoint` where it cannot be read."""
        try:
            return self._manifest(number)
        except FileNotFoundError:
            raise NotFound(f"There is no version {number}; {_existing(self.labels())}.") from None

    def _manifest(self, number: int) -> VersionManifest:
        directory = self.version_directory(number)
        inode = directory.stat().st_ino
        if self._manifests.get(number, (None, None))[0] != inode:
            self._manifests[number] = (inode, VersionManifest.read(directory))
        return self._manifests[number][1]

    def version_directory(self, number: int) -> Path:
        """The folder of a version, whether or not it exists."""
        return self.root / "versions" / str(number)

    def verify(self, manifest: VersionManifest) -> None:
        """Compares every file of a version with its manifest; raises `CorruptCheckpoint`."""
        verify_files(self.version_directory(manifest.version), manifest.files)

    def best(self) -> VersionManifest | None:
        """The version with the lowest bits per byte on the newest version's evaluation set."""
        ranking = policy.ranking(self.versions())
        return ranking[0] if ranking else None

    def latest(self) -> VersionManifest | None:
        """The newest version."""
        return policy.latest(self.versions())

    def labels(self) -> dict[str, int]:
        """Every label with the number of the version that it names now."""
        return policy.labels(self.versions())

    def resolve(self, label: str) -> VersionManifest:
        """The version that a label names; raises `NotFound`."""
        labels = self.labels()
        if label not in labels:
            raise NotFound(f"No version has the label {label!r}; {_existing(labels)}.")
        return self.version(labels[label])

    def publish_version(
        self, fence: Fence, write: Write, manifest: Callable[[int, tuple[FileRecord, ...]], VersionManifest]
    ) -> VersionManifest:
        """Writes a new version under the next free number; `manifest` completes it from the number and the files.

        Raises `RunOwnershipLost` where another process took the run over meanwhile; nothing is visible then.
        """
        with self._staging() as staging:
            write(staging)
            with locked(self.root / "versions.lock"), fence.held():
                number = 1 + max(_numbers(self.root / "versions"), default=0)
                seal(staging, lambda files: manifest(number, files).to_json())
                reveal(staging, self.version_directory(number))
        return self.version(number)

    def remove_version(self, number: int) -> None:
        """Takes a version away whole; who has it open keeps what is open."""
        self._remove(self.version_directory(number))
        self._manifests.pop(number, None)

    # States.

    def run_directory(self, run: str) -> Path:
        """The folder of a run, whether or not it exists."""
        return self.root / "runs" / run

    def states(self, run: str) -> list[int]:
        """The steps that have a state, ascending."""
        return sorted(_numbers(self.run_directory(run) / "states"))

    def state_directory(self, run: str, step: int) -> Path:
        """The folder of a state, whether or not it exists."""
        return self.run_directory(run) / "states" / str(step)

    def verified_state(self, run: str, step: int) -> Path:
        """The folder of a state whose files were compared with its manifest; raises `NotFound`, `CorruptCheckpoint`."""
        directory = self.state_directory(run, step)
        if not directory.is_dir():
            kept = ", ".join(map(str, self.states(run))) or "none"
            raise NotFound(f"The run {run} has no state of step {step} any more; its states are of the steps: {kept}.")
        verify_files(directory, StateManifest.read(directory).files)
        return directory

    def write_state(self, fence: Fence, run: str, step: int, write: Write) -> Path:
        """Writes the state of a step; one that is there and whole is kept, as it is the same.

        Raises `RunOwnershipLost` where another process took the run over meanwhile; nothing is visible then.
        """
        final = self.state_directory(run, step)
        try:
            return self.verified_state(run, step)
        except NotFound:
            pass
        except CorruptCheckpoint as error:
            logger.warning("a state is written anew: %s", error)
            self.remove_state(run, step)
        with self._staging() as staging:
            write(staging)
            seal(staging, lambda files: StateManifest(run, step, time.time(), files).to_json())
            with fence.held():
                reveal(staging, final)
        return final

    def remove_state(self, run: str, step: int) -> None:
        """Takes a state away whole."""
        self._remove(self.state_directory(run, step))

    # Staging.

    def sweep(self) -> None:
        """Removes what processes that are gone left half-written."""
        for path in _children(self.root / "staging"):
            process = path.name.partition("-")[0]
            if process.isdigit() and not _is_alive(int(process)):
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        staging = self._staging_path()
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _staging_path(self) -> Path:
        return self.root / "staging" / f"{os.getpid()}-{uuid.uuid4().hex}"

    def _remove(self, directory: Path) -> None:
        grave = self._staging_path()
        grave.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.rename(grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _numbers(directory: Path) -> list[int]:
    return [int(path.name) for path in _children(directory) if path.name.isdigit()]


def _existing(labels: dict[str, int]) -> str:
    if not labels:
        return "the registry is still empty"
    return "the labels are " + ", ".join(f"{label} (version {number})" for label, number in labels.items())


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
