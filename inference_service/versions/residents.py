"""The versions in memory: how they come in, who keeps them there, and when they go.

Everything here belongs to the event loop; only files are read on other threads.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager

from inference_service.engine.engine import Engine
from inference_service.metrics import InferenceMetrics
from inference_service.versions.catalogue import Catalogue, refused
from inference_service.versions.gate import Refused, check_loss, read_content
from inference_service.versions.postponed import Postponed
from inference_service.versions.resident import Resident
from inference_service.versions.wanted import Wanted
from shared.decoding.decoder import Decoder
from shared.errors import (
    FailedPrecondition,
    GptloopError,
    IncompleteCheckpoint,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from shared.gpt.model import GPT
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry

logger = logging.getLogger(__name__)

# When those may ask again who find too many waiting for versions.
_ASK_AGAIN_S = 5.0


class Residents:
    """At most `limit` versions in memory, each examined on its way in. One that serves or has streams stays; others
    stay while there is room. If room is needed, the one that was used longest ago goes first, and those that are held
    for an operator go last. At most `max_waiting` calls wait for versions that are not in memory.

    `serving` is the one that answers those who name none; `HotLoader` decides which one that is. `lacks_room` says
    whether a version waits for room: then none that is to leave gets new streams. `changed` is set when there may be
    something to do.
    """

    def __init__(
        self,
        registry: Registry,
        catalogue: Catalogue,
        engine: Engine,
        make_decoder: Callable[[GPT], Decoder],
        *,
        limit: int,
        max_waiting: int,
        metrics: InferenceMetrics,
    ) -> None:
        self.serving: Resident | None = None
        self.lacks_room = False
        self.changed = asyncio.Event()
        self._registry = registry
        self._catalogue = catalogue
        self._engine = engine
        self._make_decoder = make_decoder
        self._limit = limit
        self._max_waiting = max_waiting
        self._metrics = metrics
        # The one that was used longest ago is the first.
        self._residents: dict[int, Resident] = {}
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._leaving: set[Future[None]] = set()
        self._wanted: dict[int, Wanted] = {}
        self._postponed = Postponed()
        # Calls that wait until some version serves.
        self._unserved: list[asyncio.Future[None]] = []
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="residents")

    def close(self) -> None:
        """Gives up what is being loaded."""
        for load in self._loads.values():
            load.cancel()
        self._helper.shutdown(wait=False, cancel_futures=True)

    # Who is in memory.

    def get(self, number: int) -> Resident | None:
        """A version that is in memory."""
        return self._residents.get(number)

    async def await_serving(self) -> Resident:
        """The version that answers those who name none, once one serves; raises `Unavailable` with the reason if none
        is on its way, and `ResourceExhausted` if too many wait."""
        if self.serving is None:
            # It may have been published since the last look.
            await self._catalogue.look()
        while self.serving is None:
            self._check_waiting()
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._unserved.append(turn)
            self.changed.set()
            await turn
        return self.serving

    def settle(self, why_none_serves: str) -> None:
        """Ends the wait of calls for a version that serves: one does, or none will, for a reason; empty while one is on
        its way."""
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

    def of(self, manifest: VersionManifest) -> Resident | None:
        """A version in memory, and not one of another registry with the same number."""
        resident = self._residents.get(manifest.version)
        return resident if resident is not None and resident.manifest == manifest else None

    @property
    def manifests(self) -> list[VersionManifest]:
        """Of every version in memory."""
        return [resident.manifest for resident in self._residents.values()]

    def is_loading(self, number: int) -> bool:
        """Whether a version is being brought in."""
        return number in self._loads

    def is_wanted(self, number: int) -> bool:
        """Whether calls wait for a version."""
        return number in self._wanted

    def postponed(self, number: int) -> str:
        """Why a version that could not be read is not tried again yet; empty where it may be."""
        return self._postponed.sentence(number)

    def is_refused(self, resident: Resident) -> bool:
        """Whether a version must not serve any more."""
        return self._catalogue.refusal(resident.manifest) is not None

    # Who keeps it there.

    @asynccontextmanager
    async def stream(self, manifest: VersionManifest | None) -> AsyncIterator[Resident]:
        """Keeps a version in memory meanwhile, the serving one for None; waits until it is loaded.

        Raises `Unavailable` where nothing serves yet, `FailedPrecondition` where the version was refused, and
        `ResourceExhausted` where too many wait.
        """
        resident = await self._acquire(manifest)
        try:
            yield resident
        finally:
            self._release(resident)

    async def hold(self, manifest: VersionManifest) -> None:
        """Brings a version in, at once even where it was postponed, and keeps it until its room is needed."""
        self._postponed.forget(manifest.version)
        self._release(await self._wait_for(manifest, hold=True))

    @asynccontextmanager
    async def secured(self, manifest: VersionManifest, instead_of: int) -> AsyncIterator[Resident]:
        """Keeps a version in memory that is to serve instead of one that is to be refused; brings it in at once,
        whether or not there is room.

        Raises `FailedPrecondition` if it must not serve, and `Unavailable` if it cannot be loaded now.
        """
        self._catalogue.check_may_serve(manifest, instead_of)
        self._postponed.forget(manifest.version)
        resident = self.of(manifest)
        if resident is not None:
            self._join(resident)
        else:
            resident = await self._wait_for(manifest, instead_of=instead_of)
        try:
            yield resident
        finally:
            self._release(resident)

    def let_go(self, resident: Resident) -> None:
        """Lets a version go with its last stream."""
        resident.held, resident.leaving = False, True
        self._tidy()

    def part_with(self, resident: Resident) -> None:
        """Lets a version go whose registry is gone, even where it serves."""
        if resident is self.serving:
            self.serving = None
        self.report()
        self.let_go(resident)

    def _idle(self) -> list[Resident]:
        """What nothing uses, the one that was used longest ago first, and what is held last."""
        idle = [each for each in self._residents.values() if not each.streams and each is not self.serving]
        return sorted(idle, key=lambda each: each.held)

    def _tidy(self) -> None:
        """Frees what nothing uses and nobody can ask for any more, or for which there is no room."""
        known = {each.version: each.digest for each in self._catalogue.versions}
        for resident in self._idle():
            removed = known.get(resident.manifest.version) != resident.manifest.digest
            if resident.leaving or removed or self.is_refused(resident) or self._excess() > 0:
                self._free(resident)

    def _excess(self) -> int:
        """How many versions are in memory, or on their way, beyond the limit."""
        return len(self._residents) + len(self._loads) - self._limit

    def _free(self, resident: Resident) -> None:
        number = resident.manifest.version
        del self._residents[number]
        gone = self._engine.remove_version(number)
        self._leaving.add(gone)
        gone.add_done_callback(self._leaving.discard)
        self.report()
        self.changed.set()
        logger.info("version %d is freed", number)

    async def _acquire(self, manifest: VersionManifest | None) -> Resident:
        if manifest is None:
            return self._join(await self.await_serving())
        self._catalogue.check_may_serve(manifest)
        resident = self.of(manifest)
        if resident is not None and (resident is self.serving or not self.lacks_room):
            return self._join(resident)
        if sentence := self.postponed(manifest.version):
            raise Unavailable(sentence)
        self._check_waiting()
        return await self._wait_for(manifest)

    def _check_waiting(self) -> None:
        waiting = sum(len(wanted.waiters) for wanted in self._wanted.values())
        waiting += sum(not turn.done() for turn in self._unserved)
        if waiting >= self._max_waiting:
            raise ResourceExhausted(f"{waiting} requests wait for versions already, which is the limit.", _ASK_AGAIN_S)

    async def _wait_for(
        self, manifest: VersionManifest, *, hold: bool = False, instead_of: int | None = None
    ) -> Resident:
        waiter: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        wanted = self._wanted.setdefault(manifest.version, Wanted(manifest))
        wanted.waiters.append(waiter)
        wanted.hold = wanted.hold or hold
        wanted.instead_of = wanted.instead_of or instead_of
        self.changed.set()
        try:
            return await waiter
        except asyncio.CancelledError:
            # It can have been handed over in the very turn in which the call was cancelled.
            if not waiter.cancelled() and waiter.exception() is None:
                self._release(waiter.result())
            raise

    def _join(self, resident: Resident) -> Resident:
        self._count(resident, +1)
        return resident

    def _release(self, resident: Resident) -> None:
        self._count(resident, -1)
        self._tidy()
        if self.lacks_room or self._wanted:
            self.changed.set()

    def _count(self, resident: Resident, change: int) -> None:
        number = resident.manifest.version
        resident.streams += change
        self._metrics.streams(number, resident.streams)
        self._use(resident)

    def _use(self, resident: Resident) -> None:
        """Notes that a version is used now."""
        if self.of(resident.manifest) is resident:
            self._residents[resident.manifest.version] = self._residents.pop(resident.manifest.version)

    # How it comes in.

    def load_wanted(self) -> None:
        """Brings in, or hands over, what calls wait for; drops what nothing keeps."""
        for number, wanted in list(self._wanted.items()):
            wanted.waiters = [waiter for waiter in wanted.waiters if not waiter.done()]
            if not wanted.waiters:
                del self._wanted[number]
            elif self.lacks_room and wanted.instead_of is None:
                continue
            elif not wanted.hold and (finding := self._catalogue.refusal(wanted.manifest, wanted.instead_of)):
                self._disappoint(number, refused(number, finding.sentence))
            elif (resident := self.of(wanted.manifest)) is not None:
                self._hand_over(resident)
            elif not self.load(wanted.manifest, urgent=wanted.instead_of is not None):
                self.lacks_room = True
        self._tidy()

    def load(self, manifest: VersionManifest, urgent: bool = False) -> bool:
        """Begins to bring a version in if there is room, or if it is urgent; whether it is on its way."""
        number = manifest.version
        if number not in self._loads and number not in self._residents:
            for resident in self._idle():
                if self._excess() >= 0:
                    self._free(resident)
            if urgent or self._excess() < 0:
                self._loads[number] = asyncio.create_task(self._load(manifest))
        return number in self._loads

    def refuse(self, manifest: VersionManifest, reason: str, sentence: str) -> None:
        """Tells that a version must not serve, which is noted, and those who wait for it."""
        self._metrics.refused(reason)
        logger.error("version %d is refused, as %s: %s", manifest.version, reason, sentence)
        self._disappoint(manifest.version, refused(manifest.version, sentence))

    def let_serve(self, resident: Resident) -> None:
        """Lets a version that is in memory answer those who name none."""
        before, self.serving = self.serving, resident
        if before is not None:
            self._use(before)
        self.report()

    def report(self) -> None:
        """Says in the metrics which versions are in memory."""
        self._metrics.resident(self.manifests, None if self.serving is None else self.serving.manifest.version)

    async def _load(self, manifest: VersionManifest) -> None:
        """Brings a version into memory and hands it to those who wait for it, or tells them why it cannot be."""
        number, begin = manifest.version, time.monotonic()
        try:
            resident = await self._bring_in(manifest)
        except Refused as refusal:
            self._catalogue.note(manifest, refusal.loss, refusal.reason, str(refusal), refusal.stands_on)
            self.refuse(manifest, refusal.reason, str(refusal))
        except (NotFound, FailedPrecondition) as error:
            self._disappoint(number, error)
        except IncompleteCheckpoint as error:
            logger.warning("version %d lacks files: %s", number, error)
            self._disappoint(number, Unavailable(self._postponed.add(number, error)))
        except Exception as error:
            # Nothing that the version is to blame for, as far as anybody can tell.
            logger.exception("version %d cannot be loaded now", number)
            self._disappoint(number, Unavailable(self._postponed.add(number, error)))
        else:
            self._postponed.forget(number)
            logger.info("version %d is ready after %.2f s", number, time.monotonic() - begin)
            self._residents[number] = resident
            self.report()
            self._hand_over(resident)
        finally:
            del self._loads[number]
            self.changed.set()

    async def _bring_in(self, manifest: VersionManifest) -> Resident:
        number = manifest.version
        if leaving := [asyncio.wrap_future(gone) for gone in tuple(self._leaving)]:
            await asyncio.wait(leaving)
        wanted = self._wanted.get(number)
        known = self._catalogue.finding(manifest, None if wanted is None else wanted.instead_of)
        if known is not None and known.refusal is not None:
            if wanted is None or not wanted.hold:
                raise refused(number, known.sentence)
            known = None  # somebody asks for another examination
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self._helper, read_content, self._registry, manifest)
        decoder = await loop.run_in_executor(self._helper, self._make_decoder, content.model)
        windows = content.windows if known is None else ()
        tokenizer, context_length = content.tokenizer, content.model.config.context_length
        del content
        memory_bytes = decoder.memory_bytes
        ready = self._engine.add_version(number, decoder, tokenizer, context_length, windows)
        # It holds the weights.
        del decoder
        loss = await asyncio.wrap_future(ready)
        if known is not None and known.loss is not None:
            return Resident(manifest, tokenizer, known.loss, memory_bytes)
        try:
            check_loss(manifest, loss)
        except Refused:
            await asyncio.wrap_future(self._engine.remove_version(number))
            raise
        self._catalogue.note(manifest, loss)
        return Resident(manifest, tokenizer, loss, memory_bytes)

    def _hand_over(self, resident: Resident) -> None:
        wanted = self._wanted.pop(resident.manifest.version, None)
        if wanted is not None:
            if wanted.hold:
                resident.held, resident.leaving = True, False
            for waiter in wanted.waiters:
                if not waiter.done():
                    waiter.set_result(self._join(resident))

    def _disappoint(self, number: int, error: GptloopError) -> None:
        wanted = self._wanted.pop(number, None)
        for waiter in wanted.waiters if wanted is not None else ():
            if not waiter.done():
                waiter.set_exception(error)
