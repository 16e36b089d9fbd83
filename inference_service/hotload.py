"""From the registry into the engine: which versions are in memory, and which one answers new requests.

Everything here belongs to the event loop; only `load_version` runs on the helper thread.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from inference_service.engine.engine import Engine
from inference_service.metrics import InferenceMetrics
from shared.errors import CorruptCheckpoint, FailedPrecondition, GptloopError, InvalidArgument, NotFound, Unavailable
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from shared.gpt.weights import load_model
from shared.registry import policy
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Resident:
    """A version in memory, and how many streams run on it."""

    manifest: VersionManifest
    tokenizer: Tokenizer
    streams: int = 0

    @property
    def context_length(self) -> int:
        """The length of its context, in tokens."""
        return int(self.manifest.model["context_length"])


@dataclass
class _Wanted:
    """A version that requests wait for."""

    manifest: VersionManifest
    waiters: list[asyncio.Future[Resident]] = field(default_factory=list)


@dataclass(frozen=True)
class _Refusal:
    """Why a version cannot serve, as long as its manifest stays the same."""

    manifest: VersionManifest
    kind: type[GptloopError]
    sentence: str


class HotLoader:
    """Follows the best version, and keeps each version in memory until its last stream has ended.

    At most `limit` versions are resident; with all of them busy a better one waits, and a still better one takes its
    place in the wait. A version that cannot serve is refused once, and the one before it stays.
    """

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        limit: int,
        metrics: InferenceMetrics,
        on_serving: Callable[[], Awaitable[None]],
    ) -> None:
        self.serving: Resident | None = None
        self._registry = registry
        self._engine = engine
        self._limit = limit
        self._metrics = metrics
        self._on_serving = on_serving
        self._residents: dict[int, Resident] = {}
        self._leaving: list[Future[None]] = []
        self._wanted: dict[int, _Wanted] = {}
        self._refused: dict[int, _Refusal] = {}
        self._wake = asyncio.Event()
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="hotload")

    async def run(self, poll_interval_s: float) -> None:
        """Works until it is cancelled."""
        try:
            while True:
                self._wake.clear()
                await self._follow_best()
                await self._load_wanted()
                with suppress(TimeoutError):
                    async with asyncio.timeout(poll_interval_s):
                        await self._wake.wait()
        finally:
            self._helper.shutdown(wait=False, cancel_futures=True)

    def resident(self, number: int) -> Resident | None:
        """A version that is in memory."""
        return self._residents.get(number)

    @asynccontextmanager
    async def stream(self, manifest: VersionManifest | None) -> AsyncIterator[Resident]:
        """Keeps a version in memory meanwhile, the serving one for None; waits until it is loaded.

        Raises `Unavailable` where nothing serves yet, and why where the version was refused.
        """
        resident = await self._acquire(manifest)
        try:
            yield resident
        finally:
            self._release(resident)

    async def _acquire(self, manifest: VersionManifest | None) -> Resident:
        resident = self.serving if manifest is None else self._residents.get(manifest.version)
        if resident is not None:
            resident.streams += 1
            return resident
        if manifest is None:
            raise Unavailable("No version serves yet: the first one does a moment after training has published it.")
        if (refusal := self._refusal(manifest)) is not None:
            raise refusal.kind(refusal.sentence)
        waiter: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(manifest.version, _Wanted(manifest)).waiters.append(waiter)
        self._wake.set()
        try:
            return await waiter
        except asyncio.CancelledError:
            # It can have been handed over in the very turn in which the call was cancelled.
            if not waiter.cancelled() and waiter.exception() is None:
                self._release(waiter.result())
            raise

    def _release(self, resident: Resident) -> None:
        resident.streams -= 1
        self._drop_idle(resident)

    def _drop_idle(self, resident: Resident) -> None:
        if resident.streams == 0 and resident is not self.serving:
            number = resident.manifest.version
            del self._residents[number]
            self._leaving.append(self._engine.remove_version(number))
            self._report()
            self._wake.set()
            logger.info("version %d is freed", number)

    async def _follow_best(self) -> None:
        try:
            versions = await asyncio.to_thread(self._registry.versions)
        except OSError as error:
            logger.warning("the registry cannot be read now: %s", error)
            return
        manifest = self._target(versions)
        if manifest is None or (self.serving is not None and self.serving.manifest == manifest):
            return
        resident = self._residents.get(manifest.version) or await self._load(manifest)
        if resident is None:
            return
        before, self.serving = self.serving, resident
        self._report()
        logger.info(
            "version %d serves: step %d, %.4f bits per byte", manifest.version, manifest.step, manifest.bits_per_byte
        )
        if before is not None:
            self._metrics.swaps.inc()
            self._drop_idle(before)
        await self._on_serving()

    def _target(self, versions: list[VersionManifest]) -> VersionManifest | None:
        """The best version that was not refused. As long as nothing serves, any version is better than none."""
        candidates = policy.ranking(versions)
        if self.serving is None:
            candidates += [manifest for manifest in reversed(versions) if manifest not in candidates]
        return next((manifest for manifest in candidates if self._refusal(manifest) is None), None)

    def _refusal(self, manifest: VersionManifest) -> _Refusal | None:
        refusal = self._refused.get(manifest.version)
        return refusal if refusal is not None and refusal.manifest == manifest else None

    async def _load_wanted(self) -> None:
        for number, wanted in list(self._wanted.items()):
            wanted.waiters = [waiter for waiter in wanted.waiters if not waiter.done()]
            if not wanted.waiters:
                del self._wanted[number]
            elif (resident := await self._load(wanted.manifest)) is not None:
                self._drop_idle(resident)

    async def _load(self, manifest: VersionManifest) -> Resident | None:
        """Brings a version into memory and hands it to those who wait for it; None while there is no room, and where it
        is refused."""
        if len(self._residents) >= self._limit:
            return None
        number = manifest.version
        while self._leaving:
            await asyncio.wrap_future(self._leaving.pop())
        begin = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            model, tokenizer = await loop.run_in_executor(self._helper, load_version, self._registry, manifest)
            await asyncio.wrap_future(self._engine.add_version(number, model, tokenizer))
        except Exception as error:
            self._refuse(manifest, error)
            return None
        logger.info("version %d is loaded after %.2f s", number, time.monotonic() - begin)
        resident = self._residents[number] = Resident(manifest, tokenizer)
        for waiter in self._waiters(number):
            resident.streams += 1
            waiter.set_result(resident)
        self._report()
        return resident

    def _refuse(self, manifest: VersionManifest, error: Exception) -> None:
        number = manifest.version
        if not self._registry.version_directory(number).is_dir():
            refusal = _Refusal(manifest, NotFound, f"Version {number} was removed from the registry.")
        else:
            kind = type(error) if isinstance(error, GptloopError) else FailedPrecondition
            refusal = _Refusal(manifest, kind, f"Version {number} cannot serve: {error}")
            self._metrics.refused("corrupt" if kind is CorruptCheckpoint else "unfit")
            unexpected = None if isinstance(error, GptloopError) else error
            logger.error("version %d is refused: %s", number, error, exc_info=unexpected)
            # Only the words are kept: the error's frames would keep the weights in memory.
            self._refused[number] = refusal
        for waiter in self._waiters(number):
            waiter.set_exception(refusal.kind(refusal.sentence))
        # There may be another candidate.
        self._wake.set()

    def _waiters(self, number: int) -> list[asyncio.Future[Resident]]:
        wanted = self._wanted.pop(number, None)
        return [waiter for waiter in wanted.waiters if not waiter.done()] if wanted is not None else []

    def _report(self) -> None:
        manifests = [resident.manifest for resident in self._residents.values()]
        self._metrics.resident(manifests, None if self.serving is None else self.serving.manifest.version)


def load_version(registry: Registry, manifest: VersionManifest) -> tuple[GPT, Tokenizer]:
    """A version whose files are what its manifest says, every array evaluated.

    Raises `CorruptCheckpoint` where they are not, and `FailedPrecondition` where they cannot serve.
    """
    registry.verify(manifest)
    directory = registry.version_directory(manifest.version)
    try:
        config = GPTConfig.from_dict(manifest.model)
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
    except InvalidArgument as error:
        raise FailedPrecondition(str(error)) from None
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise FailedPrecondition(
            f"its tokenizer has {tokenizer.vocabulary_size} tokens, but its model has {config.vocabulary_size}."
        )
    return load_model(directory / "model.safetensors", config), tokenizer
