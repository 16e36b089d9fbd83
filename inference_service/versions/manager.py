"""Lets the version of a label serve, and does what operators ask for.

Everything here belongs to the event loop.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack, suppress

from inference_service.engine.request import FAILURES_WITHIN_S, MAX_FAILURES
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.entry import Entry
from inference_service.versions.failures import Failures
from inference_service.versions.planner import State, Version, candidates, plan
from inference_service.versions.resident import Resident
from inference_service.versions.residents import Residents
from inference_service.versions.status import VersionStatus, status_of, why_none_serves
from shared.errors import FailedPrecondition, GptloopError, NotFound, Unavailable
from shared.registry.decisions import pinned
from shared.service.log_ids import with_ids

logger = logging.getLogger(__name__)


class VersionManager:
    """Looks at the registry, plans, and lets `Residents` carry the plan out.

    A version that must not serve is refused, which stands in the registry until an operator loads it again. A version
    may be worse than the one that it replaces by `margin` nats a token.
    """

    def __init__(self, catalogue: Catalogue, residents: Residents, margin: float) -> None:
        self._catalogue = catalogue
        self._residents = residents
        self._margin = margin
        self._failures = Failures()

    async def run(self, poll_interval_s: float) -> None:
        """Works until it is cancelled."""
        changed = self._residents.changed
        try:
            while True:
                changed.clear()
                await self._catalogue.look()
                self.replan()
                self._residents.settle(self._why_none_serves())
                with suppress(TimeoutError):
                    async with asyncio.timeout(poll_interval_s):
                        await changed.wait()
        finally:
            self._residents.close()

    def replan(self) -> None:
        """Plans, and carries the plan out."""
        residents = self._residents
        seen = self._catalogue.seen(residents.manifests)
        residents.carry_out(plan(seen, residents.memory(), residents.wanted(), time.monotonic(), self._margin))

    @property
    def serving(self) -> Resident | None:
        """The version that answers calls that name none."""
        return self._residents.serving

    def _candidates(self, without: int | None = None) -> list[Version]:
        """The versions that may serve now, the best first; as if a version were refused if `without` names it."""
        seen, memory = self._catalogue.seen(self._residents.manifests, without), self._residents.memory()
        return candidates(seen, memory, memory.serving, time.monotonic())

    def _why_none_serves(self) -> str:
        """Why no version serves, and none is about to; empty otherwise."""
        if self.serving is not None or self._candidates():
            return ""
        return why_none_serves(self._statuses(), self._catalogue.policy)

    # Failures.

    def failed(self, number: int, error: GptloopError) -> None:
        """Counts an error that ended a stream of a version; too many, and the version is rolled back."""
        now = time.monotonic()
        count = self._failures.add(number, error, now)
        entry = self._residents.entries.get(number)
        if count < MAX_FAILURES or entry is None or (resident := entry.resident) is None:
            return
        if self._catalogue.refusal(resident.manifest) is not None:
            return
        sentence = f"{count} failures within {FAILURES_WITHIN_S:g} s, at last: {str(error).removesuffix('.')}"
        blamed = self._failures.blamed(now)
        if resident is self.serving and not self._candidates(without=number):
            logger.error(
                "version %d should not serve any more, but there is no other: %s",
                *(number, sentence),
                extra=with_ids(version=number),
            )
        elif blamed is None:
            self._failures.blame(resident, now)
            self._catalogue.refuse(resident.manifest, resident.loss, "failing", sentence)
            self._replace(resident)
        elif blamed.manifest.version != number:
            # Two versions in a row: the reason is not the version.
            logger.error(
                "version %d fails as the one before it, which may serve again: %s",
                *(number, sentence),
                extra=with_ids(version=number),
            )
            self._catalogue.accept(blamed.manifest, blamed.loss)

    def _replace(self, resident: Resident) -> None:
        """Lets another version serve instead of one that was refused."""
        number = resident.manifest.version
        self._failures.forget(number)
        if self._residents.of(resident.manifest) is resident:
            self._residents.let_go(number)
        self.replan()

    # What operators ask for.

    async def statuses(self) -> list[VersionStatus]:
        """Returns the status of every version, by ascending number."""
        await self._catalogue.look()
        return self._statuses()

    def _statuses(self) -> list[VersionStatus]:
        catalogue, labels, now = self._catalogue, self._catalogue.labels(), time.monotonic()
        # What is in memory may have been removed from the registry.
        manifests = {each.version: each for each in [*catalogue.versions, *self._residents.manifests]}
        statuses = [
            status_of(
                self._residents.entries.get(number) or Entry.of(manifest),
                number in self._residents.without_room,
                catalogue.finding(manifest),
                catalogue.lacking(manifest),
                labels,
                catalogue.evaluation(number),
                now,
            )
            for number, manifest in manifests.items()
        ]
        for number in catalogue.unsealed:
            reason = "it waits for its files: the manifest is missing"
            statuses.append(VersionStatus(number, None, State.WAITING, reason))
        for number, why in catalogue.damaged.items():
            if number not in manifests:
                statuses.append(VersionStatus(number, None, State.REFUSED, f"corrupt: {why}"))
        return sorted(statuses, key=lambda status: status.number)

    async def load(self, number: int) -> None:
        """Loads a version and keeps it in memory, even one that was refused: it is examined again, unless it is in
        memory still."""
        # The examination then counts more than any refusal so far.
        await self._catalogue.look()
        manifest = await self._catalogue.manifest(number)
        self._failures.forget(number)
        resident = self._residents.of(manifest)
        await self._residents.hold(manifest)
        if resident is not None and self._catalogue.refusal(manifest) is not None:
            self._catalogue.accept(manifest, resident.loss)
            self._residents.changed.set()

    async def unload(self, number: int) -> None:
        """Lets a version go once its streams have ended; raises `FailedPrecondition` if it serves."""
        entry = self._residents.entries.get(number)
        if entry is None or entry.resident is None:
            await self._catalogue.manifest(number)
            raise FailedPrecondition(f"Version {number} is not in memory.")
        if entry.state is State.SERVING:
            raise FailedPrecondition(f"Version {number} serves: pin another one, or roll back.")
        self._residents.let_go(number)
        self.replan()

    async def promote(self, number: int) -> None:
        """Makes a version the stable one; raises `NotFound`, and `FailedPrecondition` if it was refused."""
        await self._catalogue.make_stable(number)
        self.replan()

    async def set_policy(self, label: str) -> None:
        """Lets the version of a label serve from now on; raises as `Catalogue.set_policy` does."""
        await self._catalogue.set_policy(label)
        self.replan()

    async def roll_back(self, number: int | None = None) -> int:
        """Refuses the serving version and lets another one serve; returns the number of that version.

        This is the version that is named, which is pinned then; otherwise one that is in memory, or the next one of the
        policy. It is in memory, and the decision in the registry, before the serving one is taken away. Raises
        `FailedPrecondition` if no other version can serve, and as `Residents.secured` and `Catalogue.roll_back` do;
        nothing has changed then.
        """
        bad = self.serving
        if bad is None:
            raise FailedPrecondition("No version serves.")
        if number == bad.manifest.version:
            raise FailedPrecondition(f"Version {number} serves already.")
        await self._catalogue.look()
        async with AsyncExitStack() as secured:
            successor = await self._secure_successor(secured, bad.manifest.version, number)
            sentence, label = "an operator rolled it back", None if number is None else pinned(number)
            await self._catalogue.roll_back(bad.manifest, bad.loss, sentence, label)
            self._replace(bad)
            return successor.manifest.version

    async def _secure_successor(self, stack: AsyncExitStack, before: int, number: int | None) -> Resident:
        """Returns the version that is to serve after another one; it stays in memory until the stack is left."""
        if number is not None:
            manifest = await self._catalogue.manifest(number)
            return await stack.enter_async_context(self._residents.secured(manifest, before))
        why = ""
        manifests = {each.version: each for each in self._catalogue.versions}
        others = [manifests[version.number] for version in self._candidates(without=before)]
        # What is in memory serves at once.
        for manifest in sorted(others, key=lambda each: self._residents.of(each) is None):
            try:
                return await stack.enter_async_context(self._residents.secured(manifest, before))
            except (FailedPrecondition, NotFound, Unavailable) as error:
                why = f" {error}"
        raise FailedPrecondition(f"There is no other version than {before} that could serve, so it serves on.{why}")
