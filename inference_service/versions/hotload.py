"""Which version answers new requests: the one that the policy wants, as soon as it deserves it.

Everything here belongs to the event loop.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from inference_service.engine.request import FAILURES_WITHIN_S, MAX_FAILURES
from inference_service.metrics import InferenceMetrics
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.gate import Judged, Refused, check_progress
from inference_service.versions.resident import Resident
from inference_service.versions.residents import Residents
from inference_service.versions.standing import Standing, State, why_none_serves
from shared.errors import FailedPrecondition, GptloopError, NotFound, Unavailable
from shared.registry.decisions import pinned, run_of
from shared.registry.findings import ROLLED_BACK
from shared.registry.manifest import VersionManifest
from shared.registry.policy import labels_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failure:
    """That of a stream or a step. The error itself would keep its call in memory."""

    version: int
    at: float
    error: weakref.ref[GptloopError]


@dataclass(frozen=True)
class _GivenUp:
    """The version that was refused last because its streams failed; its loss in nats a token."""

    manifest: VersionManifest
    loss: float
    at: float


class HotLoader:
    """Lets the version of a label serve.

    Every version is examined before it serves, while those before it go on. With `Residents` full of busy versions the
    next one waits, and a still newer one takes its place in the wait. A version that must not serve is refused, which
    stands in the registry until somebody asks for it to be loaded again. `margin` is the nats a token by which a
    version may be worse than the one whose place it takes.
    """

    def __init__(self, catalogue: Catalogue, residents: Residents, margin: float, metrics: InferenceMetrics) -> None:
        self._catalogue = catalogue
        self._residents = residents
        self._margin = margin
        self._metrics = metrics
        # Since when versions should serve.
        self._awaited: dict[int, float] = {}
        # The versions that served, the last one last.
        self._served: list[int] = []
        self._failures: list[_Failure] = []
        self._given_up: _GivenUp | None = None
        # Versions whose manifest cannot be read, as far as that was told.
        self._unreadable: frozenset[int] = frozenset()

    async def run(self, poll_interval_s: float) -> None:
        """Works until it is cancelled."""
        changed = self._residents.changed
        try:
            while True:
                changed.clear()
                await self._catalogue.look()
                self._tell_unreadable()
                self.follow()
                self._residents.load_wanted()
                self._residents.settle(self._why_none_serves())
                with suppress(TimeoutError):
                    async with asyncio.timeout(poll_interval_s):
                        await changed.wait()
        finally:
            self._residents.close()

    # What calls ask for.

    @property
    def serving(self) -> Resident | None:
        """The version that answers those who name none."""
        return self._residents.serving

    def failed(self, number: int, error: GptloopError) -> None:
        """A stream of a version ended with an error of the version or of its step: too many, and it is rolled back."""
        if any(error is failure.error() for failure in self._failures):
            return  # one step, several streams
        now = time.monotonic()
        self._failures = [failure for failure in self._failures if now - failure.at < FAILURES_WITHIN_S]
        self._failures.append(_Failure(number, now, weakref.ref(error)))
        count = sum(failure.version == number for failure in self._failures)
        resident = self._residents.get(number)
        if count < MAX_FAILURES or resident is None or self._residents.is_refused(resident):
            return
        last = str(error).removesuffix(".")
        sentence = f"{count} failures within {FAILURES_WITHIN_S:g} s, at last: {last}"
        if resident is self.serving and next(self._candidates(without=number), None) is None:
            logger.error("version %d should not serve any more, but there is no other: %s", number, sentence)
        elif self._given_up is None or now - self._given_up.at > FAILURES_WITHIN_S:
            self._given_up = _GivenUp(resident.manifest, resident.loss, now)
            self._catalogue.note(resident.manifest, resident.loss, "failing", sentence)
            self._give_up(resident, "failing", sentence)
        elif self._given_up.manifest.version != number:
            # Two versions in a row: what fails is not the versions.
            logger.error("version %d fails as the one before it, which may serve again: %s", number, sentence)
            self._catalogue.note(self._given_up.manifest, self._given_up.loss)

    # What operators ask for.

    async def standings(self) -> list[Standing]:
        """How every version stands now, by ascending number."""
        await self._catalogue.look()
        return self._standings()

    def _standings(self) -> list[Standing]:
        labels = self._catalogue.labels()
        # What is in memory may have been removed from the registry.
        manifests = {each.version: each for each in [*self._catalogue.versions, *self._residents.manifests]}
        standings = [self._standing(manifest, labels) for manifest in manifests.values()]
        for number, why in self._catalogue.unreadable.items():
            if number in self._catalogue.unsealed:
                standings.append(
                    Standing(number, None, State.WAITING, "it waits for its files: the manifest is missing")
                )
            elif number not in manifests:
                standings.append(Standing(number, None, State.REFUSED, f"corrupt: {why}"))
        return sorted(standings, key=lambda standing: standing.number)

    async def load(self, number: int) -> None:
        """Brings a version into memory and keeps it there, even one that was refused: it is examined again, unless it
        is in memory still."""
        manifest = await self._catalogue.manifest(number)
        self._failures = [failure for failure in self._failures if failure.version != number]
        resident = self._residents.of(manifest)
        if resident is None:
            await self._residents.hold(manifest)
            return
        resident.held, resident.leaving = True, False
        if self._residents.is_refused(resident):
            self._catalogue.note(manifest, resident.loss)
            self._residents.changed.set()

    async def unload(self, number: int) -> None:
        """Lets a version go once its streams have ended; raises `FailedPrecondition` where it serves."""
        resident = self._residents.get(number)
        if resident is None:
            await self._catalogue.manifest(number)
            raise FailedPrecondition(f"Version {number} is not in memory.")
        if resident is self.serving:
            raise FailedPrecondition(f"Version {number} serves: pin another one, or roll back.")
        self._residents.let_go(resident)

    async def promote(self, number: int) -> None:
        """Makes a version the stable one; raises `NotFound`, and `FailedPrecondition` where it was refused."""
        await self._catalogue.make_stable(number)
        self.follow()

    async def let_serve(self, label: str) -> None:
        """Lets the version of a label serve from now on; raises as `Catalogue.set_policy` does."""
        await self._catalogue.set_policy(label)
        self.follow()

    async def roll_back(self, number: int | None = None) -> int:
        """Refuses the serving version and lets another one serve: one that is named and pinned then, else one that is
        in memory, else the policy's next; the number of that version.

        The other one is in memory, and the decision in the registry, before the serving one is taken away. Raises
        `FailedPrecondition` if there is no other version that can serve, and as `Residents.secured` and
        `Catalogue.roll_back` do; nothing has changed then.
        """
        bad = self.serving
        if bad is None:
            raise FailedPrecondition("No version serves.")
        if number == bad.manifest.version:
            raise FailedPrecondition(f"Version {number} serves already.")
        await self._catalogue.look()
        async with self._successor(bad, number) as successor:
            sentence, label = "an operator rolled it back", None if number is None else pinned(number)
            await self._catalogue.roll_back(bad.manifest, bad.loss, sentence, label)
            self._give_up(bad, ROLLED_BACK, sentence)
            return successor.manifest.version

    @asynccontextmanager
    async def _successor(self, bad: Resident, number: int | None) -> AsyncIterator[Resident]:
        """Keeps in memory what is to serve after a version."""
        async with AsyncExitStack() as stack:
            if number is not None:
                manifest = await self._catalogue.manifest(number)
                yield await stack.enter_async_context(self._residents.secured(manifest, bad.manifest.version))
                return
            others = list(self._candidates(without=bad.manifest.version))
            why = ""
            # What is in memory serves at once.
            for manifest in sorted(others, key=lambda each: self._residents.of(each) is None):
                try:
                    successor = await stack.enter_async_context(self._residents.secured(manifest, bad.manifest.version))
                except (FailedPrecondition, NotFound, Unavailable) as error:
                    why = f" {error}"
                    continue
                yield successor
                return
            raise FailedPrecondition(
                f"There is no other version than {bad.manifest.version} that could serve, so it serves on.{why}"
            )

    # What serves.

    def _candidates(self, without: int | None = None) -> Iterator[VersionManifest]:
        """The versions that may serve now, the one that should first; `without` one of them."""
        serving = self.serving
        stays = serving is not None and serving.manifest.version != without and not self._residents.is_refused(serving)
        for manifest in self._catalogue.candidates(None if stays else self._served, without):
            if not self._residents.postponed(manifest.version):
                yield manifest

    def follow(self) -> None:
        """Lets the first candidate serve that is in memory, and brings in the first one that is not."""
        before = self._awaited
        self._awaited = {number: since for number, since in before.items() if self._residents.is_loading(number)}
        missing: VersionManifest | None = None
        for manifest in self._candidates():
            number = manifest.version
            resident = self._residents.get(number)
            if resident is not None and resident.manifest != manifest:
                # Another registry stands in the place of the one before, and counts from 1 again.
                self._residents.part_with(resident)
                break
            if resident is not None and resident is self.serving:
                break
            if resident is None and missing is not None:
                continue
            self._awaited[number] = before.get(number, time.monotonic())
            if resident is None:
                missing = manifest
            elif self._deserves(resident):
                self._serve(resident)
                break
        # Only now: what was loaded before is not in the way of what comes next, it serves.
        urgent = self.serving is not None and self._residents.is_refused(self.serving)
        self._residents.lacks_room = missing is not None and not self._residents.load(missing, urgent)

    def _deserves(self, resident: Resident) -> bool:
        """Whether a version may take the place of the one that serves, where nobody but the policy asks for it."""
        serving, run = self.serving, run_of(self._catalogue.policy)
        if run is None and self._catalogue.policy not in ("best", "latest"):
            return True
        if run is not None and (serving is None or serving.manifest.run != run):
            return True
        if serving is None:
            # After a restart those count that served before.
            before = self._catalogue.best_found(
                resident.manifest.evaluation_set, lambda number: bool(self._residents.postponed(number))
            )
        elif self._residents.is_refused(serving):
            return True
        else:
            before = Judged(serving.manifest, serving.loss)
        if before is None:
            return True
        try:
            check_progress(Judged(resident.manifest, resident.loss), before, self._margin)
        except Refused as refusal:
            # Somebody who holds it can still pin it.
            if not resident.held:
                self._catalogue.note(resident.manifest, resident.loss, refusal.reason, str(refusal), refusal.stands_on)
                self._residents.refuse(resident.manifest, refusal.reason, str(refusal))
            return False
        return True

    def _serve(self, resident: Resident) -> None:
        manifest, before = resident.manifest, self.serving
        first = manifest.version not in self._served
        self._residents.let_serve(resident)
        self._served = [number for number in self._served if number != manifest.version] + [manifest.version]
        logger.info(
            "version %d serves: step %d, %.4f bits per byte", manifest.version, manifest.step, manifest.bits_per_byte
        )
        seconds = time.monotonic() - self._awaited.pop(manifest.version)
        self._metrics.serves(manifest, seconds, swap=before is not None, first=first)

    def _why_none_serves(self) -> str:
        """Why no version serves, and none is about to; else empty."""
        if self.serving is not None or next(self._candidates(), None) is not None:
            return ""
        return why_none_serves(self._standings(), self._catalogue.policy)

    def _give_up(self, resident: Resident, reason: str, sentence: str) -> None:
        """Lets another version serve than one that serves or served, and whose refusal is noted."""
        number = resident.manifest.version
        resident.held = False
        self._failures = [failure for failure in self._failures if failure.version != number]
        self._residents.refuse(resident.manifest, reason, sentence)
        self.follow()
        self._residents.changed.set()

    def _tell_unreadable(self) -> None:
        """Counts a version with a damaged manifest once as refused: it cannot serve."""
        unreadable = frozenset(self._catalogue.unreadable) - self._catalogue.unsealed
        for _ in unreadable - self._unreadable:
            self._metrics.refused("corrupt")
        self._unreadable = unreadable

    def _standing(self, manifest: VersionManifest, labels: dict[str, int]) -> Standing:
        number = manifest.version
        resident, finding = self._residents.get(number), self._catalogue.finding(manifest)
        reason = ""
        if finding is not None and finding.refusal is not None:
            reason = f"{finding.refusal}: {finding.sentence}"
        if resident is not None and resident is self.serving:
            state = State.SERVING
        elif self._residents.is_loading(number):
            state = State.LOADING
        elif reason:
            state = State.REFUSED
        elif resident is not None:
            state = State.RESIDENT
        elif self._residents.is_wanted(number) or number in self._awaited or self._catalogue.lacking(manifest):
            state = State.WAITING
        else:
            state = State.AVAILABLE
        return Standing(
            number,
            manifest,
            state,
            reason or self._catalogue.lacking(manifest) or self._residents.postponed(number),
            streams=0 if resident is None else resident.streams,
            held=resident is not None and resident.held,
            memory_bytes=0 if resident is None else resident.memory_bytes,
            loss=resident.loss if resident is not None else finding.loss if finding is not None else None,
            labels=labels_of(number, labels),
        )
