"""What `Residents` keeps about one version."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Self

from inference_service.versions.catalogue import as_version
from inference_service.versions.planner import Residency, State
from inference_service.versions.resident import Resident
from shared.registry.manifest import VersionManifest

# A version that could not be read is tried again after this time, then after twice as long, and so on.
RETRY_AFTER_S = 10.0
_RETRY_AFTER_AT_MOST_S = 600.0


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
class Entry(Residency):
    """A version that this server does something with, and what the planner need not know of it.

    `resident` is what is in memory, None if nothing is. The version could not be read `attempts` times in a row, the
    last time for the reason in `retry_sentence`.
    """

    manifest: VersionManifest = field(kw_only=True)
    resident: Resident | None = None
    attempts: int = 0
    retry_sentence: str = ""
    waiters: tuple[Waiter, ...] = ()
    loading: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, manifest: VersionManifest, waiters: tuple[Waiter, ...] = ()) -> Self:
        """Returns the entry of a version that nothing was done with yet."""
        return cls(as_version(manifest), manifest=manifest, waiters=waiters)

    def postponed(self, error: Exception, now: float) -> Self:
        """Returns the entry after an error, which may be a lack of memory or one of the disk."""
        why = str(error).removesuffix(".") or repr(error)
        return replace(
            self,
            attempts=self.attempts + 1,
            retry_at=now + min(RETRY_AFTER_S * 2**self.attempts, _RETRY_AFTER_AT_MOST_S),
            retry_sentence=f"Version {self.version.number} cannot be loaded now: {why}; it is tried again.",
        )

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
    def is_unused(self) -> bool:
        """Whether nothing is done with the version."""
        return self.state is State.AVAILABLE and not self.waiters
