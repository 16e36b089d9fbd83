"""What `Residents` keeps about one version."""

import asyncio
from dataclasses import dataclass
from typing import Self

from inference_service.versions.catalogue import as_version
from inference_service.versions.planner import Residency, State, Wanted
from inference_service.versions.resident import Resident
from shared.registry.manifest import VersionManifest

# A version that could not be read is tried again after this time, then after twice as long, and so on.
RETRY_AFTER_S = 10.0
_RETRY_AFTER_AT_MOST_S = 600.0


@dataclass(frozen=True)
class Retry:
    """A version could not be read `attempts` times, and is not tried again before `at` (`time.monotonic`)."""

    attempts: int
    at: float
    sentence: str

    @classmethod
    def after(cls, last: Self | None, number: int, error: Exception, now: float) -> Self:
        """Returns the next attempt after an error, which may be a lack of memory or one of the disk."""
        attempts = 1 if last is None else last.attempts + 1
        why = str(error).removesuffix(".") or repr(error)
        return cls(
            attempts,
            now + min(RETRY_AFTER_S * 2 ** (attempts - 1), _RETRY_AFTER_AT_MOST_S),
            f"Version {number} cannot be loaded now: {why}; it is tried again.",
        )


@dataclass(frozen=True, eq=False)
class Waiter:
    """A call that waits for a version; it may `hold` it then, or want it at once, `instead_of` a version that is to be
    refused. `order` is that in which calls came."""

    manifest: VersionManifest
    ready: asyncio.Future[Resident]
    order: int
    hold: bool = False
    instead_of: int | None = None


@dataclass(frozen=True)
class Entry:
    """A version that this server does something with; the fields of the same name are as in `Residency`.

    `resident` is what is in memory, None if nothing is. `awaited_since` is the time (`time.monotonic`) since when the
    version should serve, None if it should not.
    """

    manifest: VersionManifest
    state: State = State.AVAILABLE
    resident: Resident | None = None
    streams: int = 0
    held: bool = False
    leaving: bool = False
    used: int = 0
    served: int = 0
    retry: Retry | None = None
    awaited_since: float | None = None
    waiters: tuple[Waiter, ...] = ()
    loading: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> list[Waiter]:
        """The calls that still wait."""
        return [waiter for waiter in self.waiters if not waiter.ready.done()]

    @property
    def hold(self) -> bool:
        """Whether one of these calls holds the version."""
        return any(waiter.hold for waiter in self.waiting)

    @property
    def instead_of(self) -> int | None:
        """The version that is to be refused for this one, if one of these calls wants that."""
        return next((waiter.instead_of for waiter in self.waiting if waiter.instead_of is not None), None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing uses the version, which is in memory."""
        return self.state is State.RESIDENT and not self.streams

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to remember of the version once nothing is done with it."""
        return self.retry is None and not self.served

    def retry_sentence(self, now: float) -> str:
        """Returns why the version is not tried again yet; empty if it may be."""
        return self.retry.sentence if self.retry is not None and now < self.retry.at else ""

    def residency(self) -> Residency:
        """Returns what the planner knows of the version."""
        return Residency(
            version=as_version(self.manifest, None if self.resident is None else self.resident.loss),
            state=self.state,
            streams=self.streams,
            held=self.held,
            leaving=self.leaving,
            used=self.used,
            served=self.served,
            retry_at=0.0 if self.retry is None else self.retry.at,
        )

    def wanted(self, refused: bool) -> Wanted:
        """Returns what the planner knows of the calls that wait, if there are any; `refused` as in `Wanted`."""
        return Wanted(as_version(self.waiting[0].manifest), self.hold, self.instead_of is not None, refused)
