"""The versions in memory: how they come in, who keeps them there, and when they go.

Everything here belongs to the event loop; only files are read on other threads.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from inference_service.catalogue import Catalogue, refused
from inference_service.engine.engine import Engine
from inference_service.gate import Refused, check_loss, read_content
from inference_service.metrics import InferenceMetrics
from shared.errors import FailedPrecondition, GptloopError, NotFound, ResourceExhausted, Unavailable
from shared.gpt.decoder import Decoder
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry

logger = logging.getLogger(__name__)

# A version that could not be read, for lack of memory or because of its disk, is tried again after so long, then after
# twice as long, and so on.
_AGAIN_AFTER_S = 10.0
_AGAIN_AFTER_AT_MOST_S = 600.0
# When those may ask again who find too many waiting for versions.
_ASK_AGAIN_S = 5.0


@dataclass(eq=False)
class Resident:
    """A version in memory, and how many streams run on it. A held one stays without any."""

    manifest: VersionManifest
    tokenizer: Tokenizer
    loss: float
    memory_bytes: int
    streams: int = 0
    held: bool = False

    @property
    def context_length(self) -> int:
        """The length of its context, in tokens."""
        return int(self.manifest.model["context_length"])


@dataclass
class _Wanted:
    """A version that calls wait for; one of them may hold it then."""

    manifest: VersionManifest
    waiters: list[asyncio.Future[Resident]] = field(default_factory=list)
    hold: bool = False


@dataclass(frozen=True)
class _Postponed:
    """A version that could not be read so many times, and is tried again at a time of `time.monotonic`."""

    times: int
    until: float
    sentence: str


class Residents:
    """At most `limit` versions in memory, each examined on its way in and kept as long as it serves, has streams, or is
    held for an operator. At most `max_waiting` calls wait for versions that are not.

    `serving` is the one that answers those who name none; who decides that, `HotLoader`, sets it. `lacks_room` says
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
        self._residents: dict[int, Resident] = {}
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._leaving: set[Future[None]] = set()
        self._wanted: dict[int, _Wanted] = {}
        self._postponed: dict[int, _Postponed] = {}
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

    def require_serving(self) -> Resident:
        """The version that answers those who name none; raises `Unavailable` where nothing serves yet."""
        if self.serving is None:
            raise Unavailable("No version serves yet: the first one does a moment after training has published it.")
        return self.serving

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
        postponed = self._postponed.get(number)
        return postponed.sentence if postponed is not None and time.monotonic() < postponed.until else ""

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
        self._postponed.pop(manifest.version, None)
        self._release(await self._wait_for(manifest, hold=True))

    def let_go(self, resident: Resident) -> None:
        """Does not hold a version any more."""
        resident.held = False
        self.drop_idle(resident)

    def part_with(self, resident: Resident) -> None:
        """Lets a version go whose registry is gone, even where it serves."""
        if resident is self.serving:
            self.serving = None
        self.report()
        self.let_go(resident)

    def drop_idle(self, resident: Resident) -> None:
        """Frees a version that nothing keeps."""
        number = resident.manifest.version
        if resident.streams or resident.held or resident is self.serving or self._residents.get(number) is not resident:
            return
        del self._residents[number]
        gone = self._engine.remove_version(number)
        self._leaving.add(gone)
        gone.add_done_callback(self._leaving.discard)
        self.report()
        self.changed.set()
        logger.info("version %d is freed", number)

    async def _acquire(self, manifest: VersionManifest | None) -> Resident:
        if manifest is None:
            return self._join(self.require_serving())
        self._catalogue.check_not_refused(manifest)
        resident = self.of(manifest)
        if resident is not None and (resident is self.serving or not self.lacks_room):
            return self._join(resident)
        if sentence := self.postponed(manifest.version):
            raise Unavailable(sentence)
        waiting = sum(len(wanted.waiters) for wanted in self._wanted.values())
        if waiting >= self._max_waiting:
            raise ResourceExhausted(f"{waiting} requests wait for versions already, which is the limit.", _ASK_AGAIN_S)
        return await self._wait_for(manifest)

    async def _wait_for(self, manifest: VersionManifest, *, hold: bool = False) -> Resident:
        waiter: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        wanted = self._wanted.setdefault(manifest.version, _Wanted(manifest))
        wanted.waiters.append(waiter)
        wanted.hold = wanted.hold or hold
        self.changed.set()
        try:
            return await waiter
        except asyncio.CancelledError:
            # It can have been handed over in the very turn in which the call was cancelled.
            if not waiter.cancelled() and waiter.exception() is None:
                self._release(waiter.result())
            raise

    def _join(self, resident: Resident) -> Resident:
        resident.streams += 1
        self._metrics.streams(resident.manifest.version, resident.streams)
        return resident

    def _release(self, resident: Resident) -> None:
        resident.streams -= 1
        self._metrics.streams(resident.manifest.version, resident.streams)
        self.drop_idle(resident)

    # How it comes in.

    def load_wanted(self) -> None:
        """Brings in, or hands over, what calls wait for; drops what nothing keeps."""
        for number, wanted in list(self._wanted.items()):
            wanted.waiters = [waiter for waiter in wanted.waiters if not waiter.done()]
            if not wanted.waiters:
                del self._wanted[number]
            elif self.lacks_room:
                continue
            elif not wanted.hold and (finding := self._catalogue.refusal(wanted.manifest)) is not None:
                self._disappoint(number, refused(number, finding.sentence))
            elif (resident := self.of(wanted.manifest)) is not None:
                self._hand_over(resident)
            else:
                self.load(wanted.manifest)
        for resident in list(self._residents.values()):
            self.drop_idle(resident)

    def load(self, manifest: VersionManifest, urgent: bool = False) -> None:
        """Begins to bring a version in where there is room, or where it is urgent; else notes that it lacks room."""
        number = manifest.version
        if number not in self._loads:
            self._make_room()
            full = len(self._residents) + len(self._loads) >= self._limit
            if number not in self._residents and (urgent or not full):
                self._loads[number] = asyncio.create_task(self._load(manifest))
        self.lacks_room = number not in self._loads

    def refuse(self, manifest: VersionManifest, loss: float | None, reason: str, sentence: str) -> None:
        """Notes that a version must not serve, and tells those who wait for it."""
        self._metrics.refused(reason)
        logger.error("version %d is refused, as %s: %s", manifest.version, reason, sentence)
        self._catalogue.note(manifest, loss, reason, sentence)
        self._disappoint(manifest.version, refused(manifest.version, sentence))

    def report(self) -> None:
        """Says in the metrics which versions are in memory."""
        self._metrics.resident(self.manifests, None if self.serving is None else self.serving.manifest.version)

    def _make_room(self) -> None:
        """Lets go what is held for operators and not used, where its room is needed."""
        for resident in list(self._residents.values()):
            if len(self._residents) + len(self._loads) >= self._limit and resident.held and resident.streams == 0:
                self.let_go(resident)

    async def _load(self, manifest: VersionManifest) -> None:
        """Brings a version into memory and hands it to those who wait for it, or tells them why it cannot be."""
        number, begin = manifest.version, time.monotonic()
        try:
            resident = await self._bring_in(manifest)
        except Refused as refusal:
            self.refuse(manifest, refusal.loss, refusal.reason, str(refusal))
        except (NotFound, FailedPrecondition) as error:
            self._disappoint(number, error)
        except Exception as error:
            # Nothing that the version is to blame for, as far as anybody can tell.
            logger.exception("version %d cannot be loaded now", number)
            self._disappoint(number, Unavailable(self._postpone(number, error)))
        else:
            self._postponed.pop(number, None)
            logger.info("version %d is ready after %.2f s", number, time.monotonic() - begin)
            self._residents[number] = resident
            self.report()
            self._hand_over(resident)
        finally:
            del self._loads[number]
            self.changed.set()

    def _postpone(self, number: int, error: Exception) -> str:
        times = self._postponed[number].times + 1 if number in self._postponed else 1
        until = time.monotonic() + min(_AGAIN_AFTER_S * 2 ** (times - 1), _AGAIN_AFTER_AT_MOST_S)
        sentence = f"Version {number} cannot be loaded now: {error or repr(error)}; it is tried again."
        self._postponed[number] = _Postponed(times, until, sentence)
        return sentence

    async def _bring_in(self, manifest: VersionManifest) -> Resident:
        number = manifest.version
        if leaving := [asyncio.wrap_future(gone) for gone in tuple(self._leaving)]:
            await asyncio.wait(leaving)
        known = self._catalogue.finding(manifest)
        if known is not None and known.refusal is not None:
            if number not in self._wanted or not self._wanted[number].hold:
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
            resident.held = resident.held or wanted.hold
            for waiter in wanted.waiters:
                if not waiter.done():
                    waiter.set_result(self._join(resident))

    def _disappoint(self, number: int, error: GptloopError) -> None:
        wanted = self._wanted.pop(number, None)
        for waiter in wanted.waiters if wanted is not None else ():
            if not waiter.done():
                waiter.set_exception(error)
