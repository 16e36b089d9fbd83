"""The versions in memory: carries out the plans that say which are loaded, serve and are freed.

Everything here belongs to the event loop.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from inference_service.metrics import InferenceMetrics
from inference_service.versions.catalogue import Catalogue, refused
from inference_service.versions.entry import Entry, Retry, Waiter
from inference_service.versions.gate import Refused
from inference_service.versions.loader import Loader
from inference_service.versions.planner import Memory, Plan, State, Version, Wanted
from inference_service.versions.resident import Resident
from shared.errors import (
    FailedPrecondition,
    GptloopError,
    IncompleteCheckpoint,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from shared.registry.manifest import VersionManifest

logger = logging.getLogger(__name__)

# When a call may be made again that found too many others waiting.
_RETRY_AFTER_S = 5.0
# The states that may follow one.
_NEXT = {
    State.AVAILABLE: {State.WAITING, State.LOADING},
    State.WAITING: {State.AVAILABLE, State.LOADING},
    State.LOADING: {State.AVAILABLE, State.RESIDENT},
    State.RESIDENT: {State.AVAILABLE, State.SERVING},
    State.SERVING: {State.RESIDENT},
}


class Residents:
    """Holds about `limit` versions in memory, each examined on its way in; the planner says which.

    At most `max_waiting` calls wait for versions that are not in memory. `changed` is set when there may be something
    to plan.
    """

    def __init__(
        self, catalogue: Catalogue, loader: Loader, *, limit: int, max_waiting: int, metrics: InferenceMetrics
    ) -> None:
        self.changed = asyncio.Event()
        self._catalogue = catalogue
        self._loader = loader
        self._limit = limit
        self._max_waiting = max_waiting
        self._metrics = metrics
        # The versions that this server does something with, by number.
        self._entries: dict[int, Entry] = {}
        # Calls that wait until some version serves.
        self._unserved: list[asyncio.Future[None]] = []
        # Orders uses and calls.
        self._order = itertools.count(1)

    def close(self) -> None:
        """Gives up loads."""
        for entry in self._entries.values():
            if entry.loading is not None:
                entry.loading.cancel()
        self._loader.close()

    # The versions now.

    @property
    def entries(self) -> Mapping[int, Entry]:
        """The versions that this server does something with, by number."""
        return self._entries

    @property
    def serving(self) -> Resident | None:
        """The version that answers calls that name none."""
        return next((entry.resident for entry in self._entries.values() if entry.state is State.SERVING), None)

    @property
    def manifests(self) -> list[VersionManifest]:
        """The manifests of the versions in memory."""
        return [entry.manifest for entry in self._entries.values() if entry.resident is not None]

    @property
    def lacks_room(self) -> bool:
        """Whether a version waits for room; only the serving version gets new streams then."""
        return any(entry.state is State.WAITING for entry in self._entries.values())

    def of(self, manifest: VersionManifest) -> Resident | None:
        """Returns a version in memory, and not one of another registry with the same number."""
        entry = self._entries.get(manifest.version)
        return entry.resident if entry is not None and entry.manifest == manifest else None

    def memory(self) -> Memory:
        """Returns what the planner knows of memory."""
        return Memory(self._limit, tuple(entry.residency() for entry in self._entries.values()))

    def wanted(self) -> list[Wanted]:
        """Returns what the planner knows of the calls that wait, in their order."""
        entries = sorted(
            (entry for entry in self._entries.values() if entry.waiting), key=lambda entry: entry.waiting[0].order
        )
        return [
            entry.wanted(self._catalogue.refusal(entry.waiting[0].manifest, entry.instead_of) is not None)
            for entry in entries
        ]

    # Calls that use versions.

    @asynccontextmanager
    async def stream(self, manifest: VersionManifest | None) -> AsyncIterator[Resident]:
        """Keeps a version in memory meanwhile, the serving one for None; waits until it is loaded.

        Raises `FailedPrecondition` if it must not serve, `Unavailable` if it cannot be loaded now, and
        `ResourceExhausted` if too many calls wait.
        """
        resident = await self._acquire(manifest)
        try:
            yield resident
        finally:
            self._release(resident)

    async def await_serving(self) -> Resident:
        """Returns the version that answers calls that name none, once one serves; raises `Unavailable` with the reason
        if none is on its way, and `ResourceExhausted` if too many calls wait."""
        if self.serving is None:
            # It may have been published since the last look.
            await self._catalogue.look()
        while (serving := self.serving) is None:
            self._check_waiting()
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._unserved.append(turn)
            self.changed.set()
            await turn
        return serving

    def settle(self, why_none_serves: str) -> None:
        """Ends the wait of the calls that name no version, if one serves, or none will for a reason, which is empty
        otherwise."""
        if self.serving is None and not why_none_serves:
            return
        waiting, self._unserved = self._unserved, []
        for turn in waiting:
            if turn.done():
                continue
            if self.serving is None:
                turn.set_exception(Unavailable(why_none_serves))
            else:
                turn.set_result(None)

    async def hold(self, manifest: VersionManifest) -> None:
        """Loads a version, even if it was refused or could not be read just now, and keeps it until its room is
        needed."""
        if self.of(manifest) is not None:
            self._change(manifest.version, held=True, leaving=False)
        else:
            self._release(await self._wait_for(manifest, hold=True))

    @asynccontextmanager
    async def secured(self, manifest: VersionManifest, instead_of: int) -> AsyncIterator[Resident]:
        """Keeps a version in memory that is to serve instead of one that is to be refused; loads it at once, whether or
        not there is room.

        Raises `FailedPrecondition` if it must not serve, and `Unavailable` if it cannot be loaded now.
        """
        self._catalogue.check_may_serve(manifest, instead_of)
        if self.of(manifest) is not None:
            resident = self._join(manifest.version)
        else:
            resident = await self._wait_for(manifest, instead_of=instead_of)
        try:
            yield resident
        finally:
            self._release(resident)

    def let_go(self, number: int) -> None:
        """Lets a version in memory go with its last stream."""
        self._change(number, held=False, leaving=True)
        self.changed.set()

    async def _acquire(self, manifest: VersionManifest | None) -> Resident:
        if manifest is None:
            return self._join((await self.await_serving()).manifest.version)
        self._catalogue.check_may_serve(manifest)
        number = manifest.version
        if self.of(manifest) is not None and (self._entries[number].state is State.SERVING or not self.lacks_room):
            return self._join(number)
        if number in self._entries and (sentence := self._entries[number].retry_sentence(time.monotonic())):
            raise Unavailable(sentence)
        self._check_waiting()
        return await self._wait_for(manifest)

    def _check_waiting(self) -> None:
        waiting = sum(len(entry.waiting) for entry in self._entries.values())
        waiting += sum(not turn.done() for turn in self._unserved)
        if waiting >= self._max_waiting:
            raise ResourceExhausted(
                f"{waiting} requests wait for versions already, which is the limit.", _RETRY_AFTER_S
            )

    async def _wait_for(
        self, manifest: VersionManifest, *, hold: bool = False, instead_of: int | None = None
    ) -> Resident:
        number = manifest.version
        waiter = Waiter(
            manifest, asyncio.get_running_loop().create_future(), next(self._order), hold=hold, instead_of=instead_of
        )
        entry = self._entry(manifest)
        # What holds it, or is to serve, does not wait for another attempt.
        retry = None if hold or instead_of is not None else entry.retry
        self._change(number, waiters=(*entry.waiters, waiter), retry=retry)
        self.changed.set()
        try:
            return await waiter.ready
        except asyncio.CancelledError:
            # It can have been handed over in the very turn in which the call was cancelled.
            if not waiter.ready.cancelled() and waiter.ready.exception() is None:
                self._release(waiter.ready.result())
            raise
        finally:
            # Waiting calls keep an entry.
            others = tuple(other for other in self._entries[number].waiters if other is not waiter)
            self._change(number, waiters=others)

    def _join(self, number: int) -> Resident:
        entry = self._count(number, +1)
        assert entry.resident is not None
        return entry.resident

    def _release(self, resident: Resident) -> None:
        entry = self._count(resident.manifest.version, -1)
        if not entry.is_idle:
            return
        in_the_way = self.lacks_room or any(other.waiters for other in self._entries.values())
        crowded = len(self.manifests) > self._limit
        if in_the_way or crowded or entry.leaving or self._catalogue.refusal(entry.manifest) is not None:
            self.changed.set()

    def _count(self, number: int, change: int) -> Entry:
        entry = self._change(number, streams=self._entries[number].streams + change, used=next(self._order))
        self._metrics.streams(number, entry.streams)
        return entry

    # How a plan is carried out.

    def carry_out(self, plan: Plan) -> None:
        """Does what a plan says."""
        for refusal in plan.refuse:
            entry = self._entries[refusal.number]
            loss = None if entry.resident is None else entry.resident.loss
            self._catalogue.refuse(entry.manifest, loss, refusal.reason, refusal.sentence, refusal.stands_on)
        self._serve(plan.serve)
        for number in plan.drop:
            self._free(number)
        for version in plan.load:
            manifest = self._manifest(version)
            self._entry(manifest)
            self._move(version.number, State.LOADING, loading=asyncio.create_task(self._load(manifest)))
        for number in plan.admit:
            self._hand_over(number)
        for number in plan.reject:
            waiter = self._entries[number].waiting[0]
            finding = self._catalogue.refusal(waiter.manifest, self._entries[number].instead_of)
            self._fail(number, refused(number, "" if finding is None else finding.sentence))
        self._note_waiting(plan)

    def _serve(self, number: int | None) -> None:
        before = next((each for each, entry in self._entries.items() if entry.state is State.SERVING), None)
        if number == before:
            return
        if before is not None:
            self._move(before, State.RESIDENT, used=next(self._order))
        if number is not None:
            entry = self._entries[number]
            self._move(number, State.SERVING, served=next(self._order), leaving=False)
            manifest = entry.manifest
            logger.info("version %d serves: step %d, %.4f bits per byte", number, manifest.step, manifest.bits_per_byte)
            seconds = 0.0 if entry.awaited_since is None else time.monotonic() - entry.awaited_since
            self._metrics.serves(manifest, seconds, swap=before is not None, first=not entry.served)
        self._report()

    def _note_waiting(self, plan: Plan) -> None:
        """Notes which versions wait for room, and since when one should serve; forgets idle versions."""
        waiting = {version.number for version in plan.wait}
        for version in plan.wait if plan.awaited is None else (*plan.wait, plan.awaited):
            self._entry(self._manifest(version))
        awaited = None if plan.awaited is None else plan.awaited.number
        known = {manifest.version for manifest in self._catalogue.versions}
        for number, entry in list(self._entries.items()):
            if entry.state is State.AVAILABLE and number in waiting:
                self._move(number, State.WAITING)
            elif entry.state is State.WAITING and number not in waiting:
                self._move(number, State.AVAILABLE)
            if number == awaited:
                self._change(number, awaited_since=entry.awaited_since or time.monotonic())
            elif entry.awaited_since is not None and entry.state is not State.LOADING:
                self._change(number, awaited_since=None)
            if number != awaited and (number not in known or entry.is_blank):
                self._forget(number)

    def _free(self, number: int) -> None:
        self._move(number, State.AVAILABLE, resident=None, held=False, leaving=False)
        self._loader.free(number)
        self._report()
        self.changed.set()
        logger.info("version %d is freed", number)

    async def _load(self, manifest: VersionManifest) -> None:
        """Loads a version and hands it to the calls that wait for it, or fails them."""
        number, begin = manifest.version, time.monotonic()
        try:
            entry = self._entries[number]
            resident = await self._loader.load(manifest, again=entry.hold, instead_of=entry.instead_of)
        except Refused as refusal:
            self._catalogue.refuse(manifest, refusal.loss, refusal.reason, str(refusal), refusal.stands_on)
            self._give_up(number, refused(number, str(refusal)))
        except (NotFound, FailedPrecondition) as error:
            self._give_up(number, error)
        except IncompleteCheckpoint as error:
            logger.warning("version %d lacks files: %s", number, error)
            self._give_up(number, self._postpone(number, error))
        except Exception as error:
            # As far as anybody can tell, the version is not to blame.
            logger.exception("version %d cannot be loaded now", number)
            self._give_up(number, self._postpone(number, error))
        else:
            logger.info("version %d is ready after %.2f s", number, time.monotonic() - begin)
            self._move(number, State.RESIDENT, resident=resident, loading=None, retry=None, used=next(self._order))
            self._report()
            self._hand_over(number)
        finally:
            self.changed.set()

    def _give_up(self, number: int, error: GptloopError) -> None:
        self._move(number, State.AVAILABLE, loading=None)
        self._fail(number, error)

    def _postpone(self, number: int, error: Exception) -> Unavailable:
        retry = Retry.after(self._entries[number].retry, number, error, time.monotonic())
        self._change(number, retry=retry)
        return Unavailable(retry.sentence)

    def _hand_over(self, number: int) -> None:
        """Gives a version to the calls that wait for it."""
        entry = self._entries[number]
        if entry.hold:
            self._change(number, held=True, leaving=False)
        for waiter in entry.waiting:
            if waiter.manifest == entry.manifest:
                waiter.ready.set_result(self._join(number))

    def _fail(self, number: int, error: GptloopError) -> None:
        """Fails the calls that wait for a version."""
        for waiter in self._entries[number].waiting:
            waiter.ready.set_exception(error)

    # Entries: they change here, and nowhere else.

    def _entry(self, manifest: VersionManifest) -> Entry:
        """Returns the entry of a version; makes a new one unless there is one, or one of another registry in use."""
        number = manifest.version
        entry = self._entries.get(number)
        if entry is None or (entry.manifest != manifest and entry.state in (State.AVAILABLE, State.WAITING)):
            entry = self._entries[number] = Entry(manifest, waiters=() if entry is None else entry.waiters)
        return entry

    def _move(self, number: int, state: State, **changes: Any) -> Entry:
        assert state in _NEXT[self._entries[number].state], (number, self._entries[number].state, state)
        return self._change(number, state=state, **changes)

    def _change(self, number: int, **changes: Any) -> Entry:
        entry = self._entries[number] = replace(self._entries[number], **changes)
        return entry

    def _forget(self, number: int) -> None:
        """Forgets a version that nothing is done with."""
        entry = self._entries[number]
        if entry.state is State.AVAILABLE and not entry.waiters:
            del self._entries[number]

    def _manifest(self, version: Version) -> VersionManifest:
        entry = self._entries.get(version.number)
        waiting = [] if entry is None else [waiter.manifest for waiter in entry.waiting]
        return next(each for each in (*waiting, *self._catalogue.versions) if each.digest == version.digest)

    def _report(self) -> None:
        """Shows in the metrics which versions are in memory."""
        serving = self.serving
        self._metrics.resident(self.manifests, None if serving is None else serving.manifest.version)
