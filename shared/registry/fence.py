"""Ownership of a run: only the process that raised the fence last may write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import RunOwnershipLost
from shared.registry.commit import locked, make_folder, replace_text, writing
from shared.registry.numbering import read_number


@dataclass(frozen=True)
class Fence:
    """The token of one owner of a run, which is at least as high as every earlier one."""

    directory: Path
    token: int

    @classmethod
    def raise_for(cls, run_directory: Path, token: int | None = None) -> "Fence":
        """Takes over the run in `<registry>/runs/<run>`, so that the writes of every earlier owner are rejected.

        `token` is by default one more than the last one. Raises `RunOwnershipLost` if a higher token owns the run, and
        `FailedPrecondition` if the folder cannot be written.
        """
        root = run_directory.parents[1]
        with writing(root):
            make_folder(run_directory, root)
            with locked(run_directory / "lock"):
                path = run_directory / "fence"
                last = _read(path)
                token = last + 1 if token is None else token
                if token < last:
                    raise _lost(run_directory)
                replace_text(path, str(token))
        return cls(run_directory, token)

    @staticmethod
    def last(run_directory: Path) -> int:
        """Returns the highest token so far; 0 if no process has owned the run."""
        return _read(run_directory / "fence")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock of the run, for writing to it; raises `RunOwnershipLost` if a later owner took over."""
        with locked(self.directory / "lock"):
            if _read(self.directory / "fence") != self.token:
                raise _lost(self.directory)
            yield


def _lost(run_directory: Path) -> RunOwnershipLost:
    return RunOwnershipLost(f"Another process took over the run {run_directory.name}; this one ends.")


def _read(path: Path) -> int:
    return read_number(path, "a whole number; write 1 into it while no process trains this run")
