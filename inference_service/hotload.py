"""From the registry into the engine: which versions are in memory, and which one answers new requests.

Everything here belongs to the event loop; only files are read on other threads.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from inference_service.catalogue import Catalogue, refused
from inference_service.engine.engine import Engine
from inference_service.gate import Refused, check_loss, check_progress, read_content
from inference_service.metrics import InferenceMetrics
from shared.errors import FailedPrecondition, GptloopError, NotFound, Unavailable
from shared.gpt.decoder import Decoder
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from shared.registry.decisions import pinned
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry

logger = logging.getLogger(__name__)

# A version that could not be read, for lack of memory or because of its disk, is tried again after so long, then after
# twice as long, and so on.
_AGAIN_AFTER_S = 10.0
_AGAIN_AFTER_AT_MOST_S = 600.0
# A version of which so much has failed within such a time must not serve any more.
_MAX_FAILURES = 3
_FAILURES_WITHIN_S = 60.0


class State(Enum):
    """Where a version stands. WAITING is for room in memory; a RESIDENT one is in memory, and answers those who name
    it."""

    AVAILABLE = auto()
    WAITING = auto()
    LOADING = auto()
    RESIDENT = auto()
    SERVING = auto()
    REFUSED = auto()


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


@dataclass(frozen=True)
class Standing:
    """All that there is to say of a version: `reason` is why it is refused or could not be loaded, else empty.

    `loss` is that of its carried windows in nats a token, as it was served.
    """

    manifest: VersionManifest
    state: State
    reason: str
    streams: int
    held: bool
    memory_bytes: int
    loss: float | None
    labels: tuple[str, ...]


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


@dataclass(frozen=True)
class _Failure:
    """That of a stream or a step. The error itself would keep its call in memory."""

    version: int
    at: float
    error: weakref.ref[GptloopError]


class HotLoader:
    """Lets the version of a label serve, and keeps each version in memory until its last stream has ended.

    Every version is examined before it serves, while those before it go on. At most `limit` versions are in memory;
    with all of them busy the next one waits, and a still newer one takes its place in the wait. A version that must not
    serve is refused, which stands in the registry until somebody asks for it to be loaded again. `margin` is the nats a
    token by which a version may be worse than the one whose place it takes.
    """

    def __init__(
        self,
        registry: Registry,
        catalogue: Catalogue,
        engine: Engine,
        make_decoder: Callable[[GPT], Decoder],
        *,
        limit: int,
        margin: float,
        metrics: InferenceMetrics,
    ) -> None:
        self.serving: Resident | None = None
        self._registry = registry
        self._catalogue = catalogue
        self._engine = engine
        self._make_decoder = make_decoder
        self._limit = limit
        self._margin = margin
        self._metrics = metrics
        # Versions that could not be read.
        self._postponed: dict[int, _Postponed] = {}
        self._residents: dict[int, Resident] = {}
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._leaving: set[Future[None]] = set()
        self._wanted: dict[int, _Wanted] = {}
        # Since when versions should serve, and whether anybody waits for room.
        self._awaited: dict[int, float] = {}
        self._lacks_room = False
        # The versions that served, the last one last.
        self._served: list[int] = []
        self._failures: list[_Failure] = []
        self._wake = asyncio.Event()
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="hotload")

    async def run(self, poll_interval_s: float) -> None:
        """Works until it is cancelled."""
        try:
            while True:
                self._wake.clear()
                await self._catalogue.look()
                self.follow()
                self._load_wanted()
                for resident in list(self._residents.values()):
                    self._drop_idle(resident)
                with suppress(TimeoutError):
                    async with asyncio.timeout(poll_interval_s):
                        await self._wake.wait()
        finally:
            for load in self._loads.values():
                load.cancel()
            self._helper.shutdown(wait=False, cancel_futures=True)

    # What calls ask for.

    def resident(self, number: int) -> Resident | None:
        """A version that is in memory."""
        return self._residents.get(number)

    @asynccontextmanager
    async def stream(self, manifest: VersionManifest | None) -> AsyncIterator[Resident]:
        """Keeps a version in memory meanwhile, the serving one for None; waits until it is loaded.

        Raises `Unavailable` where nothing serves yet, and `FailedPrecondition` where the version was refused.
        """
        resident = await self._acquire(manifest)
        try:
            yield resident
        finally:
            self._release(resident)

    def failed(self, number: int, error: GptloopError) -> None:
        """A stream of a version ended with an error of the version or of its step: too many, and it is rolled back."""
        if any(error is failure.error() for failure in self._failures):
            return  # one step, several streams
        now = time.monotonic()
        self._failures = [failure for failure in self._failures if now - failure.at < _FAILURES_WITHIN_S]
        self._failures.append(_Failure(number, now, weakref.ref(error)))
        count = sum(failure.version == number for failure in self._failures)
        resident = self._residents.get(number)
        if count < _MAX_FAILURES or resident is None or self._is_refused(resident):
            return
        last = str(error).removesuffix(".")
        sentence = f"{count} failures within {_FAILURES_WITHIN_S:g} s, at last: {last}"
        if resident is self.serving and next(self._candidates(without=number), None) is None:
            logger.error("version %d should not serve any more, but there is no other: %s", number, sentence)
        else:
            self._give_up(resident, "failing", sentence)

    # What operators ask for.

    async def standings(self) -> list[Standing]:
        """How every version stands now, by ascending number."""
        await self._catalogue.look()
        labels = self._catalogue.labels()
        manifests = {manifest.version: manifest for manifest in self._catalogue.versions}
        # What is in memory may have been removed from the registry.
        manifests |= {number: resident.manifest for number, resident in self._residents.items()}
        return [self._standing(manifests[number], labels) for number in sorted(manifests)]

    async def load(self, number: int) -> None:
        """Brings a version into memory and keeps it there, even one that was refused: it is examined again, unless it
        is in memory still."""
        manifest = await self._catalogue.manifest(number)
        self._failures = [failure for failure in self._failures if failure.version != number]
        resident = self._resident_of(manifest)
        if resident is not None:
            resident.held = True
            if self._is_refused(resident):
                self._catalogue.note(manifest, resident.loss)
                self._wake.set()
            return
        self._postponed.pop(number, None)
        self._release(await self._wait_for(manifest, hold=True))

    async def unload(self, number: int) -> None:
        """Lets a version go once its streams have ended; raises `FailedPrecondition` where it serves."""
        resident = self._residents.get(number)
        if resident is None:
            await self._catalogue.manifest(number)
            raise FailedPrecondition(f"Version {number} is not in memory.")
        if resident is self.serving:
            raise FailedPrecondition(f"Version {number} serves: pin another one, or roll back.")
        resident.held = False
        self._drop_idle(resident)

    async def promote(self, number: int) -> None:
        """Makes a version the stable one; raises `NotFound`, and `FailedPrecondition` where it was refused."""
        await self._catalogue.make_stable(number)
        self.follow()

    async def let_serve(self, label: str) -> None:
        """Lets the version of a label serve from now on; raises as `Catalogue.set_policy` does."""
        await self._catalogue.set_policy(label)
        self.follow()

    async def roll_back(self, number: int | None = None) -> int:
        """Refuses the serving version, so that the policy's next one serves, or one that is named and pinned then; the
        number of that version.

        Raises `FailedPrecondition` where there is no other version.
        """
        if self.serving is None:
            raise FailedPrecondition("No version serves.")
        bad = self.serving
        if number == bad.manifest.version:
            raise FailedPrecondition(f"Version {number} serves already.")
        if number is not None:
            if self._is_postponed(number):
                raise Unavailable(self._postponed[number].sentence)
            await self._catalogue.set_policy(pinned(number))
        else:
            await self._catalogue.look()
        following = next(self._candidates(without=bad.manifest.version), None)
        if following is None:
            raise FailedPrecondition(f"There is no other version than {bad.manifest.version} that could serve.")
        self._give_up(bad, "rolled_back", "an operator rolled it back")
        return following.version

    # What serves.

    def _candidates(self, without: int | None = None) -> Iterator[VersionManifest]:
        """The versions that may serve now, the one that should first; `without` one of them."""
        serving = self.serving
        stays = serving is not None and serving.manifest.version != without and not self._is_refused(serving)
        for manifest in self._catalogue.candidates(None if stays else self._served):
            if manifest.version != without and not self._is_postponed(manifest.version):
                yield manifest

    def follow(self) -> None:
        """Lets the first candidate serve that is in memory, and brings in the first one that is not."""
        self._lacks_room = False
        before = self._awaited
        self._awaited = {number: since for number, since in before.items() if number in self._loads}
        loads = False
        for manifest in self._candidates():
            number = manifest.version
            resident = self._residents.get(number)
            if resident is not None and resident.manifest != manifest:
                # Another registry stands in the place of the one before, and counts from 1 again.
                self._part_with(resident)
                return
            if resident is not None and resident is self.serving:
                return
            if resident is None and loads:
                continue
            self._awaited[number] = before.get(number, time.monotonic())
            if resident is None:
                loads = True
                self._begin_to_load(manifest)
            elif self._deserves(resident):
                self._serve(resident)
                return

    def _begin_to_load(self, manifest: VersionManifest) -> None:
        """Loads the version that is to serve next: at once where the one that serves was refused."""
        number = manifest.version
        if number not in self._loads:
            self._make_room()
        self._start_load(manifest, urgent=self.serving is not None and self._is_refused(self.serving))
        self._lacks_room = number not in self._loads

    def _deserves(self, resident: Resident) -> bool:
        """Whether a version may take the place of the one that serves, where nobody but the policy asks for it."""
        serving = self.serving
        if serving is None or self._is_refused(serving) or self._catalogue.policy not in ("best", "latest"):
            return True
        try:
            check_progress(resident.manifest, resident.loss, serving.manifest, serving.loss, self._margin)
        except Refused as refusal:
            # Somebody who holds it can still pin it.
            if not resident.held:
                self._refuse(resident.manifest, resident.loss, refusal.reason, str(refusal))
            return False
        return True

    def _serve(self, resident: Resident) -> None:
        manifest, before = resident.manifest, self.serving
        first = manifest.version not in self._served
        self.serving = resident
        self._served = [number for number in self._served if number != manifest.version] + [manifest.version]
        self._report()
        logger.info(
            "version %d serves: step %d, %.4f bits per byte", manifest.version, manifest.step, manifest.bits_per_byte
        )
        seconds = time.monotonic() - self._awaited.pop(manifest.version)
        self._metrics.serves(manifest, seconds, swap=before is not None, first=first)
        if before is not None:
            self._drop_idle(before)

    def _give_up(self, resident: Resident, reason: str, sentence: str) -> None:
        """Refuses a version that serves or served."""
        number = resident.manifest.version
        resident.held = False
        self._failures = [failure for failure in self._failures if failure.version != number]
        self._refuse(resident.manifest, resident.loss, reason, sentence)
        self._disappoint(number, refused(number, sentence))
        self.follow()
        self._wake.set()

    def _refuse(self, manifest: VersionManifest, loss: float | None, reason: str, sentence: str) -> None:
        self._metrics.refused(reason)
        logger.error("version %d is refused, as %s: %s", manifest.version, reason, sentence)
        self._catalogue.note(manifest, loss, reason, sentence)

    def _part_with(self, resident: Resident) -> None:
        if resident is self.serving:
            self.serving = None
        resident.held = False
        self._report()
        self._drop_idle(resident)

    def _is_refused(self, resident: Resident) -> bool:
        return self._catalogue.refusal(resident.manifest) is not None

    def _is_postponed(self, number: int) -> bool:
        postponed = self._postponed.get(number)
        return postponed is not None and time.monotonic() < postponed.until

    def _resident_of(self, manifest: VersionManifest) -> Resident | None:
        """A version in memory, and not one of another registry with the same number."""
        resident = self._residents.get(manifest.version)
        return resident if resident is not None and resident.manifest == manifest else None

    # What is in memory.

    async def _acquire(self, manifest: VersionManifest | None) -> Resident:
        resident = self.serving if manifest is None else self._resident_of(manifest)
        if manifest is None and resident is None:
            raise Unavailable("No version serves yet: the first one does a moment after training has published it.")
        if manifest is not None:
            self._catalogue.check_not_refused(manifest)
            # As long as another version waits for room, none that is to leave gets new streams.
            if resident is None or (resident is not self.serving and self._lacks_room):
                if self._is_postponed(manifest.version):
                    raise Unavailable(self._postponed[manifest.version].sentence)
                return await self._wait_for(manifest)
        assert resident is not None
        return self._join(resident)

    async def _wait_for(self, manifest: VersionManifest, *, hold: bool = False) -> Resident:
        waiter: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        wanted = self._wanted.setdefault(manifest.version, _Wanted(manifest))
        wanted.waiters.append(waiter)
        wanted.hold = wanted.hold or hold
        self._wake.set()
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
        self._drop_idle(resident)

    def _drop_idle(self, resident: Resident) -> None:
        number = resident.manifest.version
        if resident.streams or resident.held or resident is self.serving or self._residents.get(number) is not resident:
            return
        del self._residents[number]
        gone = self._engine.remove_version(number)
        self._leaving.add(gone)
        gone.add_done_callback(self._leaving.discard)
        self._report()
        self._wake.set()
        logger.info("version %d is freed", number)

    def _make_room(self) -> None:
        """Lets go what is held for operators and not used, where its room is needed."""
        for resident in list(self._residents.values()):
            if len(self._residents) + len(self._loads) >= self._limit and resident.held and resident.streams == 0:
                resident.held = False
                self._drop_idle(resident)

    def _load_wanted(self) -> None:
        for number, wanted in list(self._wanted.items()):
            wanted.waiters = [waiter for waiter in wanted.waiters if not waiter.done()]
            if not wanted.waiters:
                del self._wanted[number]
            elif self._lacks_room:
                continue
            elif (resident := self._resident_of(wanted.manifest)) is not None:
                self._hand_over(resident)
            elif number not in self._loads:
                self._make_room()
                self._start_load(wanted.manifest)
                self._lacks_room = number not in self._loads

    def _start_load(self, manifest: VersionManifest, urgent: bool = False) -> None:
        """Begins to load a version where there is room, or where it is urgent."""
        number = manifest.version
        if number in self._loads or number in self._residents:
            return
        if urgent or len(self._residents) + len(self._loads) < self._limit:
            self._loads[number] = asyncio.create_task(self._load(manifest))

    async def _load(self, manifest: VersionManifest) -> None:
        """Brings a version into memory and hands it to those who wait for it, or tells them why it cannot be."""
        number, begin = manifest.version, time.monotonic()
        try:
            resident = await self._bring_in(manifest)
        except Refused as refusal:
            self._refuse(manifest, refusal.loss, refusal.reason, str(refusal))
            self._disappoint(number, refused(number, str(refusal)))
        except NotFound as error:
            self._disappoint(number, error)
        except Exception as error:
            # Nothing that the version is to blame for, as far as anybody can tell.
            logger.exception("version %d cannot be loaded now", number)
            self._postpone(number, f"Version {number} cannot be loaded now: {error or repr(error)}; it is tried again.")
            self._disappoint(number, Unavailable(self._postponed[number].sentence))
        else:
            self._postponed.pop(number, None)
            logger.info("version %d is ready after %.2f s", number, time.monotonic() - begin)
            self._residents[number] = resident
            self._report()
            self._hand_over(resident)
        finally:
            del self._loads[number]
            self._wake.set()

    def _postpone(self, number: int, sentence: str) -> None:
        times = self._postponed[number].times + 1 if number in self._postponed else 1
        until = time.monotonic() + min(_AGAIN_AFTER_S * 2 ** (times - 1), _AGAIN_AFTER_AT_MOST_S)
        self._postponed[number] = _Postponed(times, until, sentence)

    async def _bring_in(self, manifest: VersionManifest) -> Resident:
        number = manifest.version
        if leaving := [asyncio.wrap_future(gone) for gone in tuple(self._leaving)]:
            await asyncio.wait(leaving)
        known = self._catalogue.finding(manifest)
        if known is not None and known.refusal is not None:
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

    # What is told of it.

    def _report(self) -> None:
        manifests = [resident.manifest for resident in self._residents.values()]
        self._metrics.resident(manifests, None if self.serving is None else self.serving.manifest.version)

    def _standing(self, manifest: VersionManifest, labels: dict[str, int]) -> Standing:
        number = manifest.version
        resident, finding = self._residents.get(number), self._catalogue.finding(manifest)
        reason = ""
        if finding is not None and finding.refusal is not None:
            reason = f"{finding.refusal}: {finding.sentence}"
        if resident is not None and resident is self.serving:
            state = State.SERVING
        elif reason:
            state = State.REFUSED
        elif resident is not None:
            state = State.RESIDENT
        elif number in self._loads:
            state = State.LOADING
        elif number in self._wanted or number in self._awaited:
            state = State.WAITING
        else:
            state = State.AVAILABLE
        if not reason and self._is_postponed(number):
            reason = self._postponed[number].sentence
        return Standing(
            manifest,
            state,
            reason,
            streams=0 if resident is None else resident.streams,
            held=resident is not None and resident.held,
            memory_bytes=0 if resident is None else resident.memory_bytes,
            loss=None if finding is None else finding.loss,
            labels=tuple(label for label, named in labels.items() if named == number),
        )
