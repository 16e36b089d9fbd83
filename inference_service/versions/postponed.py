"""Versions that could not be read now, and when they are tried again."""

import time
from dataclasses import dataclass

# It is tried again after so long, then after twice as long, and so on.
AGAIN_AFTER_S = 10.0
_AGAIN_AFTER_AT_MOST_S = 600.0


@dataclass(frozen=True)
class _Postponed:
    """A version that could not be read `times` times, and is not tried again before `until` (`time.monotonic`)."""

    times: int
    until: float
    sentence: str


class Postponed:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self._versions: dict[int, _Postponed] = {}

    def add(self, number: int, error: Exception) -> str:
        """Postpones a version that could not be loaded, for lack of memory or because of its disk; a sentence on it."""
        times = self._versions[number].times + 1 if number in self._versions else 1
        until = time.monotonic() + min(AGAIN_AFTER_S * 2 ** (times - 1), _AGAIN_AFTER_AT_MOST_S)
        why = str(error).removesuffix(".") or repr(error)
        sentence = f"Version {number} cannot be loaded now: {why}; it is tried again."
        self._versions[number] = _Postponed(times, until, sentence)
        return sentence

    def sentence(self, number: int) -> str:
        """Why a version is not tried again yet; empty if it may be."""
        postponed = self._versions.get(number)
        return postponed.sentence if postponed is not None and time.monotonic() < postponed.until else ""

    def forget(self, number: int) -> None:
        """A version may be tried again at once."""
        self._versions.pop(number, None)
