"""Counts the failures of versions."""

import weakref
from dataclasses import dataclass

from inference_service.engine.request import FAILURES_WITHIN_S
from inference_service.versions.resident import Resident
from shared.errors import GptloopError


@dataclass(frozen=True)
class _Failure:
    """A failure of a stream or a step. The error itself would keep its call in memory."""

    version: int
    at: float
    error: weakref.ref[GptloopError]


class Failures:
    """Failures of the last `FAILURES_WITHIN_S` seconds. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._failures: list[_Failure] = []
        self._blamed: tuple[Resident, float] | None = None

    def add(self, number: int, error: GptloopError, now: float) -> int:
        """Counts a failure of a version; returns how many it has now, or 0 if the error was counted already, for one
        step fails several streams."""
        if any(error is failure.error() for failure in self._failures):
            return 0
        self._failures = [failure for failure in self._failures if now - failure.at < FAILURES_WITHIN_S]
        self._failures.append(_Failure(number, now, weakref.ref(error)))
        return sum(failure.version == number for failure in self._failures)

    def forget(self, number: int) -> None:
        """Forgets the failures of a version."""
        self._failures = [failure for failure in self._failures if failure.version != number]

    def blame(self, resident: Resident, now: float) -> None:
        """Notes that a version is rolled back for its failures."""
        self._blamed = resident, now

    def blamed(self, now: float) -> Resident | None:
        """Returns the version that was blamed just now, if there is one. If another one fails too often as well, the
        reason is not the version."""
        if self._blamed is None or now - self._blamed[1] > FAILURES_WITHIN_S:
            return None
        return self._blamed[0]
