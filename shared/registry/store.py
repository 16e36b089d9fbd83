"""What a registry needs of the place where it is kept: a folder on a disk, or a bucket of object storage.

*Texts* are small and stand in groups, whose texts change together. *Folders* are checkpoints: whole or absent, and they
never change. A *history* is a file that grows. Every write on behalf of a run carries a `Fence`, and does nothing once
another process has taken over the run.

group                 texts
serving               policy, stable, findings/<n>.<device>.json: see `decisions.py`
holds                 <job>: see `holds.py`
evaluations/<n>       <method digest>.json: see `evaluations.py`
runs/<run>            fence, ended, teachers.json

folder
versions/<n>
runs/<run>/states/<step>
runs/<run>/teachers/<n>
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord


class Texts(Mapping[str, str]):
    """The texts of a group by their names.

    To read one raises `CorruptCheckpoint` if it is none, `UnreadableCheckpoint` if it cannot be read, and `StoreFailed`
    if their place cannot be reached.
    """

    def written_at(self, name: str) -> float:
        """Returns when a text was written, in seconds since the epoch; 0 if there is none."""
        raise NotImplementedError


# Returns the texts of a group to write, with None for those to remove. It may be called again with newer texts.
Change = Callable[[Texts], Mapping[str, str | None]]


@dataclass(frozen=True)
class Run:
    """What the registry has of a run: its texts, its states and teachers, each with the time when it was written, in
    seconds since the epoch, and the time of the last line of its history, None if it has no history."""

    texts: Texts
    states: Mapping[int, float]
    teachers: Mapping[int, float]
    history_written_at: float | None


class Store(Protocol):
    """The place of one registry.

    Methods that write raise `FailedPrecondition`, which names the place and says what to do, if it fails; nothing is
    visible then. Methods that read raise `StoreFailed`. Those with a fence raise `RunOwnershipLost` if another process
    took over the run.
    """

    @property
    def address(self) -> str:
        """The folder or the URL."""

    def id(self) -> str:
        """Returns the unique id of the registry; the first call gives it one."""

    def place(self, name: str) -> str:
        """Returns where a folder or a text is, for a sentence: its path or its URL."""

    # Texts

    def read(self, group: str) -> Texts:
        """Returns the texts of a group as they are now; none if there is no such group."""

    def change(self, group: str, change: Change) -> None:
        """Changes the texts of a group, one change at a time: all of them or none is visible after an error."""

    def drop(self, group: str) -> None:
        """Removes a group."""

    def stamps(self, parent: str) -> Mapping[str, Hashable]:
        """Returns the groups below a name, each with a value that changes whenever the group does."""

    # Runs

    def runs(self) -> Mapping[str, Run]:
        """Returns every run, by its name."""

    def run(self, name: str) -> Run:
        """Returns a run as it is now, which is empty if there is no such run."""

    def take_over(self, run: str, token: int | None) -> Fence:
        """Makes this process the owner of a run, by default with a token that is one higher than the last one.

        Raises `RunOwnershipLost` if a higher token owns the run.
        """

    def read_history(self, run: str, start: int = 0) -> bytes:
        """Returns the history of a run from a byte on; raises `FileNotFoundError` if there is none."""

    def append_history(self, fence: Fence, content: bytes, synced: bool) -> None:
        """Appends to the history of a run; a failure may leave the beginning of the content.

        A power failure may cost what is not `synced`; the end of this process, too, if the store is not on a disk.
        """

    def cut_history(self, fence: Fence, size_bytes: int) -> None:
        """Cuts the history of a run back to its first bytes, which needs no space."""

    def remove_history(self, run: str) -> None:
        """Removes the history of a run, if there is one."""

    # Folders

    def versions(self) -> Mapping[int, Hashable]:
        """Returns the number of every version, each with a value that changes if another version takes its place."""

    def stamp(self, number: int) -> Hashable:
        """Returns the value of one version; raises `FileNotFoundError` if there is none."""

    def manifest(self, name: str) -> bytes:
        """Returns the manifest of a folder; raises `FileNotFoundError` if there is no such folder or no manifest."""

    def exists(self, name: str) -> bool:
        """Returns whether there is a folder with this name."""

    def new_folder(self) -> AbstractContextManager[Path]:
        """Yields an empty local folder for the files of a checkpoint, and removes it at the end."""

    def publish(self, fence: Fence, folder: Path, files: Sequence[FileRecord], manifest: Callable[[int], str]) -> int:
        """Makes a local folder the next version, and returns its number; `manifest` gets the number.

        No number is given twice, even if versions are removed. Raises `FailedPrecondition` if no number is left.
        """

    def commit(self, fence: Fence, name: str, folder: Path, files: Sequence[FileRecord], manifest: str) -> None:
        """Makes a local folder a state or a teacher, and replaces one that is there."""

    def remove(self, name: str, unless: Callable[[], bool] = lambda: False) -> bool:
        """Removes a folder, and returns whether it did; processes that have its files open can still read them.

        `unless` says whether somebody needs it, from the texts as they are then. Whoever writes there that he needs a
        folder, and sees the folder afterwards, has it for good.
        """

    def remove_teachers(self, run: str) -> None:
        """Removes all teachers of a run at once."""

    def fetch(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Returns a local folder with the files of a folder.

        Raises `CorruptCheckpoint` if a store that is not on a disk does not have what the manifest says.
        """

    def verified(self, name: str, files: Sequence[FileRecord]) -> Path:
        """Does the same, and compares every file there with the manifest; raises `CorruptCheckpoint`."""

    def check(self, name: str, files: Sequence[FileRecord]) -> None:
        """Compares every file in the store with the manifest; raises `CorruptCheckpoint`."""

    def lacking(self, name: str, files: Sequence[FileRecord]) -> str:
        """Describes a file of a folder that is missing, too short or unreadable; an empty text if there is none."""

    def state(self, name: str) -> str:
        """Returns a hash that changes if any file of a folder does, without reading them."""

    def size_bytes(self, name: str) -> int:
        """Returns the size of the files of a folder; 0 if there is none."""

    def written_at(self, name: str) -> float:
        """Returns when a folder was written, in seconds since the epoch; 0 if there is none."""

    # Keeping

    def sweep(self) -> None:
        """Removes what dead processes have left half-written or half-removed."""

    def unknown(self) -> list[str]:
        """Returns the places of what is among the folders but has an unknown name, so that nothing reads it."""
