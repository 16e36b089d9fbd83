"""Ownership of a run: whoever raised the fence last may write, and nobody before."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import RunOwnershipLost
from shared.registry.commit import locked, write_synced


@dataclass(frozen=True)
class Fence:
    """A token of a run, higher than all before it."""

    directory: Path
    token: int

    @classmethod
    def raise_for(cls, run_directory: Path) -> "Fence":
        """Takes the run over: from now on every earlier owner's writes are refused."""
        with locked(run_directory / "lock"):
            path = run_directory / "fence"
            token = _read(path) + 1
            replacement = run_directory / "fence.new"
            write_synced(replacement, str(token))
            replacement.replace(path)
            return cls(run_directory, token)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run's lock, in which the owner may write; raises `RunOwnershipLost` where the fence was raised since."""
        with locked(self.directory / "lock"):
            if _read(self.directory / "fence") != self.token:
                raise RunOwnershipLost(f"Another process took over the run {self.directory.name}; this one ends.")
            yield


def _read(path: Path) -> int:
    return int(path.read_text(encoding="utf-8")) if path.exists() else 0
