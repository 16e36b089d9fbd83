"""Ownership of a run: whoever has raised the fence highest may write, and nobody before."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import FailedPrecondition, RunOwnershipLost, shown
from shared.registry.commit import locked, make_folder, replace_text, writing

_MOST_DIGITS = 18


@dataclass(frozen=True)
class Fence:
    """A token of a run, no lower than any before it."""

    directory: Path
    token: int

    @classmethod
    def raise_for(cls, run_directory: Path, token: int | None = None) -> "Fence":
        """Takes the run over: from now on every earlier owner's writes are refused.

        `token` is the number of an owner who has one among others, else it is one more than the last. Raises
        `RunOwnershipLost` where a later one has the run, and `FailedPrecondition` where its folder,
        `<registry>/runs/<run>`, cannot be written.
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

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run's lock, in which the owner may write; raises `RunOwnershipLost` where the fence was raised since."""
        with locked(self.directory / "lock"):
            if _read(self.directory / "fence") != self.token:
                raise _lost(self.directory)
            yield


def _lost(run_directory: Path) -> RunOwnershipLost:
    return RunOwnershipLost(f"Another process took over the run {run_directory.name}; this one ends.")


def _read(path: Path) -> int:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "0"
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise FailedPrecondition(
            f"{path} holds {shown(text, 20)}, but must hold a whole number; write 1 into it while nobody trains this "
            "run."
        )
    return int(text)
