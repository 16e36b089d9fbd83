"""Ownership of a run: whoever raised the fence last may write, and nobody before."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import FailedPrecondition, RunOwnershipLost
from shared.registry.commit import locked, make_folder, replace_text, writing


@dataclass(frozen=True)
class Fence:
    """A token of a run, higher than all before it."""

    directory: Path
    token: int

    @classmethod
    def raise_for(cls, run_directory: Path) -> "Fence":
        """Takes the run over: from now on every earlier owner's writes are refused.

        Raises `FailedPrecondition` where the run's folder, `<registry>/runs/<run>`, cannot be written.
        """
        root = run_directory.parents[1]
        with writing(root):
            make_folder(run_directory, root)
            with locked(run_directory / "lock"):
                path = run_directory / "fence"
                token = _read(path) + 1
                replace_text(path, str(token))
        return cls(run_directory, token)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run's lock, in which the owner may write; raises `RunOwnershipLost` where the fence was raised since."""
        with locked(self.directory / "lock"):
            if _read(self.directory / "fence") != self.token:
                raise RunOwnershipLost(f"Another process took over the run {self.directory.name}; this one ends.")
            yield


def _read(path: Path) -> int:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "0"
    if not (text.isascii() and text.isdecimal()):
        raise FailedPrecondition(
            f"{path} holds {text[:20]!r}, but must hold a whole number; write 1 into it while nobody trains this run."
        )
    return int(text)
