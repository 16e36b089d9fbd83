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
from inference_service.versions.catalogue import Catalogue, as_version, refused
from inference_service.versions.entry import Entry, Waiter
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
    StoreFailed,
    Unavailable,
    UnreadableCheckpoint,
)
from shared.registry.manifest import VersionManifest
from shared.service import traces
from shared.service.log_ids import about, with_ids

logger = logging.getLogger(__name__)

# When a call may be made again that found too many others waiting.
_RETRY_AFTER_S = 5.0
# The states that may follow one.
_NEXT = {
    State.AVAILABLE: {State.LOADING},
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
        # The versions that wait for room, and since when (`time.monotonic`) versions that were chosen should serve.
        self._without_room: frozenset[int] = frozenset()
        self._awaited: dict[int, float] = {}
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
    def without_room(self) -> frozenset[int]:
        """The versions that wait for room. As long as there are any, only the serving version gets new streams."""
        return self._without_room

    def of(self, manifest: VersionManifest) -> Resident | None:
        """Returns a version in memory, and not one of another registry with the same number."""
        entry = self._entries.get(manifest.version)
        return entry.resident if entry is not None and entry.manifest == manifest else None

    def memory(self) -> Memory:
        """Returns what the planner knows of memory."""
        return Memory(self._limit, tuple(self._entries.values()))

    def wanted(self) -> list[Wanted]:
        """Returns what the planner knows of the calls that wait, in their order."""
        entries = [entry for entry in self._entries.values() if entry.waiting]
        wanted = []
        for entry in sorted(entries, key=lambda entry: entry.waiting[0].order):
            manifest = entry.waiting[0].manifest
            is_refused = self._catalogue.refusal(manifest, entry.instead_of) is not None
            wanted.append(Wanted(as_version(manifest), entry.hold, entry.instead_of is not None, is_refused))
        return wanted

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
        if self.of(manifest) is not None and (self._entries[number].state is State.SERVING or not self._without_room):
            return self._join(number)
        if (entry := self._entries.get(number)) is not None and time.monotonic() < entry.retry_at:
            raise Unavailable(entry.retry_sentence)
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
        self._change(number, waiters=(*self._entry(manifest).waiters, waiter))
        if hold or instead_of is not None:
            # What an operator asks for does not wait for another attempt.
            self._change(number, attempts=0, retry_at=0.0)
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
        if entry.state is not State.RESIDENT or entry.streams:
            return
        in_the_way = self._without_room or any(other.waiters for other in self._entries.values())
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
            manifest, loss = self._entries[refusal.version.number].manifest, refusal.version.loss
            self._catalogue.refuse(manifest, loss, refusal.reason, refusal.sentence, refusal.stands_on)
        self._serve(plan.serve)
        for number in plan.drop:
            self._free(number)
        for version in plan.load:
            manifest = self._manifest(version)
            self._entry(manifest)
            with about(version=version.number, run=manifest.run):
                loading = asyncio.create_task(self._load(manifest))
            self._move(version.number, State.LOADING, loading=loading)
        for number in plan.admit:
            self._hand_over(number)
        for number in plan.reject:
            waiter = self._entries[number].waiting[0]
            finding = self._catalogue.refusal(waiter.manifest, self._entries[number].instead_of)
            self._fail(number, refused(number, "" if finding is None else finding.sentence))
        self._without_room = frozenset(plan.wait)
        self._note_awaited(plan.awaited)
        self._forget()

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
            logger.info(
                "version %d serves: step %d, %.4f bits per byte",
                *(number, manifest.step, manifest.bits_per_byte),
                extra=with_ids(version=number, run=manifest.run),
            )
            now = time.monotonic()
            seconds = now - self._awaited.get(number, now)
            self._metrics.serves(manifest, seconds, swap=before is not None, first=not entry.served)
        self._report()

    def _note_awaited(self, awaited: Version | None) -> None:
        """Notes since when versions should serve, until they are in memory."""
        loading = {number for number, entry in self._entries.items() if entry.state is State.LOADING}
        chosen = (self._awaited.keys() & loading) | ({awaited.number} if awaited is not None else set())
        now = time.monotonic()
        self._awaited = {number: self._awaited.get(number, now) for number in chosen}

    def _free(self, number: int) -> None:
        self._move(number, State.AVAILABLE, resident=None, held=False, leaving=False)
        self._loader.free(number)
        self._report()
        self.changed.set()
        logger.info("version %d is freed", number, extra=with_ids(version=number))

    async def _load(self, manifest: VersionManifest) -> None:
        """Loads a version and hands it to the calls that wait for it, or fails them."""
        number, begin = manifest.version, time.monotonic()
        try:
            entry = self._entries[number]
            with traces.span("load version", {"gptloop.version": number, "gptloop.run": manifest.run}):
                resident = await self._loader.load(manifest, again=entry.hold, instead_of=entry.instead_of)
        except Refused as refusal:
            self._catalogue.refuse(manifest, refusal.loss, refusal.reason, str(refusal), refusal.stands_on)
            self._give_up(number, refused(number, str(refusal)))
        except (IncompleteCheckpoint, StoreFailed, UnreadableCheckpoint) as error:
            logger.warning("version %d cannot be loaded now: %s", number, error)
            self._postpone(number, error)
        except (NotFound, FailedPrecondition) as error:
            self._give_up(number, error)
        except Exception as error:
            # As far as anybody can tell, the version is not to blame.
            logger.exception("version %d cannot be loaded now", number)
            self._postpone(number, error)
        else:
            logger.info("version %d is ready after %.2f s", number, time.monotonic() - begin)
            self._move(number, State.RESIDENT, version=as_version(manifest, resident.loss), resident=resident)
            self._change(number, loading=None, attempts=0, retry_at=0.0, used=next(self._order))
            self._report()
            self._hand_over(number)
        finally:
            self.changed.set()

    def _give_up(self, number: int, error: GptloopError) -> None:
        self._move(number, State.AVAILABLE, loading=None)
        self._fail(number, error)

    def _postpone(self, number: int, error: Exception) -> None:
        entry = self._entries[number] = self._entries[number].postponed(error, time.monotonic())
        self._give_up(number, Unavailable(entry.retry_sentence))

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
        if entry is None or (entry.manifest != manifest and entry.state is State.AVAILABLE):
            entry = self._entries[number] = Entry.of(manifest, () if entry is None else entry.waiters)
        return entry

    def _move(self, number: int, state: State, **changes: Any) -> Entry:
        assert state in _NEXT[self._entries[number].state], (number, self._entries[number].state, state)
        return self._change(number, state=state, **changes)

    def _change(self, number: int, **changes: Any) -> Entry:
        entry = self._entries[number] = replace(self._entries[number], **changes)
        return entry

    def _forget(self) -> None:
        """Forgets versions that nothing is done with, and of which nothing is worth remembering."""
        known = {manifest.version for manifest in self._catalogue.versions}
        for number, entry in list(self._entries.items()):
            if entry.is_unused and (number not in known or not (entry.attempts or entry.served)):
                del self._entries[number]

    def _manifest(self, version: Version) -> VersionManifest:
        entry = self._entries.get(version.number)
        waiting = [] if entry is None else [waiter.manifest for waiter in entry.waiting]
        return next(each for each in (*waiting, *self._catalogue.versions) if each.digest == version.digest)

    def _report(self) -> None:
        """Shows in the metrics which versions are in memory."""
        serving = self.serving
        in_memory = [entry.resident for entry in self._entries.values() if entry.resident is not None]
        self._metrics.resident(in_memory, None if serving is None else serving.manifest.version)
