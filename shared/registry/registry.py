"""The registry: states to resume from and versions to serve, each whole or absent.

It stands on a `Store`: see `store.py`, and `Directories.open_registry`, which opens one.
"""

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shared.errors import CorruptCheckpoint, NewerFormat, NotFound
from shared.registry import policy
from shared.registry.commit import record_files, writing
from shared.registry.decisions import BestBy, Decided, Decisions, check_label
from shared.registry.evaluations import Evaluations, Figures
from shared.registry.fence import FENCE, Fence, last_token
from shared.registry.history import Histories
from shared.registry.holds import Holds
from shared.registry.manifest import MANIFEST_NAME, FileRecord, StateManifest, VersionManifest
from shared.registry.numbering import is_number
from shared.registry.store import Store
from shared.registry.teachers import Teachers
from shared.text import excerpt

logger = logging.getLogger(__name__)

# The text of a finished run.
ENDED = "ended"

Result = TypeVar("Result")

# Writes the files of a checkpoint into an empty folder.
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """The name of a version (its number), or of a state (its step and its run)."""

    number: int
    run: str | None = None

    @property
    def name(self) -> str:
        """The name of its folder in the store."""
        return f"versions/{self.number}" if self.run is None else f"runs/{self.run}/states/{self.number}"

    def __str__(self) -> str:
        return f"version {self.number}" if self.run is None else f"state {self.number} of {self.run}"


class Registry:
    """The registry in a store. Every visible checkpoint is whole and never changes.

    `best_by` is what the label `best` compares.

    Methods that write raise `FailedPrecondition` if the store fails; no part of the checkpoint is visible then. Methods
    that read raise `StoreFailed`.
    """

    def __init__(self, store: Store, best_by: BestBy = BestBy.TRAINING) -> None:
        self.store = store
        self.best_by = best_by
        self.decisions = Decisions(store)
        self.holds = Holds(store)
        self.evaluations = Evaluations(store)
        self.histories = Histories(store)
        self.teachers = Teachers(store)
        # A version never changes, so its manifest is read once, and again if another one takes its place.
        self._manifests: dict[int, tuple[Hashable, VersionManifest]] = {}
        # The versions whose manifest could not be read at the last attempt, with the reason; those that have no
        # manifest yet, as while they are copied, stand in `unsealed` too.
        self.unreadable: dict[int, str] = {}
        self.unsealed: frozenset[int] = frozenset()

    # Versions

    def versions(self) -> list[VersionManifest]:
        """Returns every version with a readable manifest, by ascending number; puts the others into `unreadable`."""
        manifests = []
        unreadable: dict[int, str] = {}
        unsealed = set()
        stamps = self.store.versions()
        for number in sorted(stamps):
            try:
                manifests.append(self._manifest(number, stamps[number]))
            except (CorruptCheckpoint, NewerFormat) as error:
                if not self.store.exists(f"versions/{number}"):
                    continue  # removed in the meantime
                unreadable[number] = str(error)
                if isinstance(error.__cause__, FileNotFoundError):
                    unsealed.add(number)
                if number not in self.unreadable:
                    logger.warning("version %d is ignored: %s", number, error)
        self.unreadable, self.unsealed = unreadable, frozenset(unsealed)
        # Another process may have removed versions.
        for gone in self._manifests.keys() - stamps.keys():
            self._manifests.pop(gone, None)
        return manifests

    def version(self, number: int) -> VersionManifest:
        """Returns the manifest of a version; raises `NotFound`, or `CorruptCheckpoint` if it cannot be read."""
        try:
            return self._manifest(number, self.store.stamp(number))
        except (CorruptCheckpoint, FileNotFoundError):
            if self.store.exists(f"versions/{number}"):
                raise
            raise NotFound(f"There is no version {number}; {policy.describe_labels(self.labels())}.") from None

    def _manifest(self, number: int, stamp: Hashable) -> VersionManifest:
        known = self._manifests.get(number)
        if known is None or known[0] != stamp:
            name = f"versions/{number}"
            place = self.store.place(f"{name}/{MANIFEST_NAME}")
            manifest = VersionManifest.load(lambda: self.store.manifest(name), place)
            if manifest.version != number:
                raise CorruptCheckpoint(
                    f"{self.store.place(name)} contains the manifest of version {manifest.version}."
                )
            known = self._manifests[number] = (stamp, manifest)
        return known[1]

    def fetch(self, version: VersionManifest) -> Path:
        """Returns a local folder with the files of a version; raises `CorruptCheckpoint`, or `NotFound` if the version
        was removed in the meantime."""
        return self._of_version(version, self.store.fetch)

    def verified(self, version: VersionManifest) -> Path:
        """Does the same, and compares every file in the folder with the manifest."""
        return self._of_version(version, self.store.verified)

    def verify(self, version: VersionManifest) -> None:
        """Compares every file of a version in the store with its manifest; raises as `fetch` does."""
        self._of_version(version, self.store.check)

    def _of_version(self, version: VersionManifest, act: Callable[[str, Sequence[FileRecord]], Result]) -> Result:
        name = f"versions/{version.version}"
        try:
            return act(name, version.files)
        except CorruptCheckpoint:
            if self.store.exists(name):
                raise
            raise NotFound(f"Version {version.version} was removed from the registry.") from None

    def lacking(self, version: VersionManifest) -> str:
        """Describes a missing or unreadable file of a version; returns an empty text if there is none."""
        return self.store.lacking(f"versions/{version.version}", version.files)

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
        made: dict[int, VersionManifest] = {}
        with self.store.new_folder() as folder:
            write(folder)
            files = record_files(folder)

            def text(number: int) -> str:
                made[number] = manifest(number, files)
                return made[number].to_json()

            return made[self.store.publish(fence, folder, files, text)]

    # States

    def take_over(self, run: str, token: int | None = None) -> Fence:
        """Makes this process the owner of a run, so that the writes of every earlier owner are rejected.

        `token` is by default one more than the last one. Raises `RunOwnershipLost` if a higher token owns the run.
        """
        return self.store.take_over(run, token)

    def runs(self) -> list[str]:
        """Returns every run, in alphabetical order."""
        return sorted(self.store.runs())

    def has_begun(self, run: str) -> bool:
        """Returns whether a run has begun, so that no other one can have its name.

        One that failed before its first step leaves only its fence, which a later run of one attempt can raise again.
        """
        found = self.store.run(run)
        if found.states or ENDED in found.texts or found.history_written_at is not None:
            return True
        fence = self.store.place(f"runs/{run}/{FENCE}")
        return last_token(found.texts, fence) > 1 or any(each.run == run for each in self.versions())

    def end_run(self, run: str) -> None:
        """Marks a run as finished, so that only its last state is kept."""
        self.store.change(f"runs/{run}", lambda _: {ENDED: ""})

    def has_ended(self, run: str) -> bool:
        """Returns whether a run is finished."""
        return ENDED in self.store.read(f"runs/{run}")

    def ended(self) -> frozenset[str]:
        """Returns the runs that are finished."""
        return frozenset(name for name, run in self.store.runs().items() if ENDED in run.texts)

    def states(self, run: str) -> list[int]:
        """Returns the steps that have a state, in ascending order."""
        return sorted(self.store.run(run).states)

    def verified_state(self, run: str, step: int) -> Path:
        """Verifies a state and returns a local folder with its files; raises `NotFound` or `CorruptCheckpoint`."""
        return self._of_state(run, step, self.store.verified)

    def _of_state(self, run: str, step: int, act: Callable[[str, Sequence[FileRecord]], Result]) -> Result:
        name = Checkpoint(step, run).name
        try:
            place = self.store.place(f"{name}/{MANIFEST_NAME}")
            manifest = StateManifest.load(lambda: self.store.manifest(name), place)
            if (manifest.run, manifest.step) != (run, step):
                place = self.store.place(name)
                raise CorruptCheckpoint(f"{place} contains the state of step {manifest.step} of {manifest.run}.")
            return act(name, manifest.files)
        except CorruptCheckpoint:
            if self.store.exists(name):
                raise
            kept = excerpt(", ".join(map(str, self.states(run))) or "none")
            raise NotFound(
                f"The run {run} no longer has a state of step {step}; it has states of these steps: {kept}."
            ) from None

    def write_state(self, fence: Fence, step: int, write: Write) -> None:
        """Writes the state of a step of the fence's run; keeps an existing valid state, because it is the same.

        Raises `RunOwnershipLost` if another process took over the run in the meantime; nothing is visible then.
        """
        run = fence.run
        with writing(self.store.address):
            try:
                self.verified_state(run, step)
                return
            except NotFound:
                pass
            except CorruptCheckpoint as error:
                logger.warning("a damaged state is replaced: %s", error)
            with self.store.new_folder() as folder:
                write(folder)
                files = record_files(folder)
                manifest = StateManifest(run, step, time.time(), files)
                self.store.commit(fence, Checkpoint(step, run).name, folder, files, manifest.to_json())

    # Both kinds

    def checkpoints(self) -> list[Checkpoint]:
        """Returns every version and every state, valid or not."""
        versions = [Checkpoint(number) for number in sorted(self.store.versions())]
        runs = self.store.runs()
        return versions + [Checkpoint(step, run) for run in sorted(runs) for step in sorted(runs[run].states)]

    def place(self, checkpoint: Checkpoint) -> str:
        """Returns where a checkpoint is, for a sentence: its path or its URL."""
        return self.store.place(checkpoint.name)

    def size_bytes(self, checkpoint: Checkpoint) -> int:
        """Returns the size of a checkpoint's files; 0 if it does not exist."""
        return self.store.size_bytes(checkpoint.name)

    def written_at(self, checkpoint: Checkpoint) -> float:
        """Returns when a checkpoint was written, in seconds since the epoch; 0 if it does not exist."""
        return self.store.written_at(checkpoint.name)

    def check(self, checkpoint: Checkpoint) -> None:
        """Compares a checkpoint's files with its manifest; raises `CorruptCheckpoint` or `NotFound`."""
        if checkpoint.run is None:
            self.verify(self.version(checkpoint.number))
        else:
            self._of_state(checkpoint.run, checkpoint.number, self.store.check)

    def remove(self, checkpoint: Checkpoint, unless: Callable[[], bool] = lambda: False) -> bool:
        """Removes a checkpoint atomically, with the evaluations of a version, and returns whether it did.

        `unless` says whether somebody needs it now. Processes that have its files open can still read them.
        """
        if not self.store.remove(checkpoint.name, unless):
            return False
        if checkpoint.run is None:
            self.decisions.forget(checkpoint.number)
            self.evaluations.remove(checkpoint.number)
            self._manifests.pop(checkpoint.number, None)
        return True

    def sweep(self) -> None:
        """Removes what dead processes left half-written or half-removed."""
        self.store.sweep()
