"""A version that is not in memory, and the calls that wait for it."""

import asyncio
from dataclasses import dataclass, field

from inference_service.versions.resident import Resident
from shared.registry.manifest import VersionManifest


@dataclass
class Wanted:
    """A version that calls wait for; one of them may hold it then.

    One that is to serve at once, `instead_of` a version that is to be refused, does not wait for room.
    """

    manifest: VersionManifest
    waiters: list[asyncio.Future[Resident]] = field(default_factory=list)
    hold: bool = False
    instead_of: int | None = None
