"""Ownership of a run: only the process that raised the fence last may write."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import CorruptCheckpoint, FailedPrecondition, RunOwnershipLost, StoreFailed, UnreadableCheckpoint
from shared.registry.numbering import whole_number

# The name of the text in the group of a run.
FENCE = "fence"
_RIGHT = "a whole number; write 1 into it while no process trains this run"


@dataclass(frozen=True)
class Fence:
    """The token of one owner of a run, which is at least as high as every earlier one."""

    run: str
    token: int

    def check(self, texts: Mapping[str, str], place: str) -> None:
        """Raises `RunOwnershipLost` if a later owner took over, as the texts of the run say; `place` is the fence's."""
        if last_token(texts, place) != self.token:
            raise _lost(self.run)

    @classmethod
    def after(cls, texts: Mapping[str, str], place: str, run: str, token: int | None) -> "Fence":
        """Returns the fence that follows on the texts of a run; raises `RunOwnershipLost` if `token` is too low."""
        last = last_token(texts, place)
        if token is not None and token < last:
            raise _lost(run)
        return cls(run, last + 1 if token is None else token)


def last_token(texts: Mapping[str, str], place: str) -> int:
    """Returns the highest token so far; 0 if no process has owned the run.

    Raises `StoreFailed` if the fence cannot be read now, and `FailedPrecondition` if it is damaged.
    """
    try:
        text = texts.get(FENCE)
    except UnreadableCheckpoint as error:
        raise StoreFailed(f"{str(error).removesuffix('.')}; check its disk, and that it is mounted.") from error
    except CorruptCheckpoint as error:
        raise FailedPrecondition(f"{str(error).removesuffix('.')}; it must contain {_RIGHT}.") from error
    return whole_number(text, place, _RIGHT)


def _lost(run: str) -> RunOwnershipLost:
    return RunOwnershipLost(f"Another process took over the run {run}; this one ends.")
