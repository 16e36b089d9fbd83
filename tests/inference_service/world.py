"""A registry, an engine and a version manager without a server around them, for tests."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from inference_service.engine.engine import Engine
from inference_service.metrics import InferenceMetrics
from inference_service.settings import device_kind
from inference_service.versions import gate, loader
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.gate import Content
from inference_service.versions.loader import Loader
from inference_service.versions.manager import VersionManager
from inference_service.versions.residents import Residents
from inference_service.versions.status import VersionStatus
from shared.decoding.weight_format import DEFAULT_WEIGHTS, WeightFormat
from shared.device.accelerator import Memory
from shared.registry.decisions import BestBy
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from tests.decoders import make_decoder
from tests.fakes import publish_tiny_version
from tests.registries import disk_registry, root_of, version_folder
from tests.waiting import HANG_S, eventually


class World:
    """A registry, an engine and a version manager that polls often."""

    def __init__(
        self,
        root: Path,
        best_by: BestBy = BestBy.TRAINING,
        open_registry: Callable[[Path, BestBy], Registry] = disk_registry,
        weights: WeightFormat = DEFAULT_WEIGHTS,
    ) -> None:
        self.registry = open_registry(root, best_by)
        self.collectors = CollectorRegistry()
        self.metrics = InferenceMetrics(self.collectors, lambda: Memory(0, 0, 0, 0), lambda: 0, lambda: 0, {})
        self.engine = Engine(2, 64, 0, lambda outputs: None, lambda: None)
        self.catalogue = Catalogue(self.registry, device_kind("cpu", weights), self.metrics)
        decoders = partial(make_decoder, slots=2, weights=weights)
        loader = Loader(self.registry, self.catalogue, self.engine, decoders, lambda: None)
        self.residents = Residents(self.catalogue, loader, limit=2, max_waiting=16, metrics=self.metrics)
        self.manager = VersionManager(self.catalogue, self.residents, 0.05)

    @property
    def serving(self) -> int | None:
        return self.manager.serving.manifest.version if self.manager.serving is not None else None

    def resident(self) -> set[str]:
        return {
            sample.labels["version"]
            for family in self.collectors.collect()
            if family.name == "gptloop_inference_model_info"
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.collectors.get_sample_value(f"gptloop_inference_{name}", labels) or 0.0

    async def serves(self, number: int) -> None:
        """Waits until a version serves."""
        await eventually(lambda: self.serving == number)

    @asynccontextmanager
    async def running(self, serving: int | None = None) -> AsyncIterator[None]:
        """Runs inside the block, which begins once `serving` serves, if it is given."""
        self.engine.start()
        task = asyncio.create_task(self.manager.run(0.01))
        try:
            if serving is not None:
                await self.serves(serving)
            yield
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            await asyncio.wait([task])
            self.engine.stop()


@dataclass(frozen=True)
class HeldRead:
    """The reading of a version's files: it has begun when `entered` is set, and ends when `go_on` is."""

    entered: threading.Event
    go_on: threading.Event


def hold_read(monkeypatch: pytest.MonkeyPatch, number: int) -> HeldRead:
    """Holds up the reading of a version until the test lets it go on."""
    reading = HeldRead(threading.Event(), threading.Event())
    read = gate.read_content

    def slow(registry: Registry, manifest: VersionManifest) -> Content:
        if manifest.version == number:
            reading.entered.set()
            assert reading.go_on.wait(HANG_S)
        return read(registry, manifest)

    monkeypatch.setattr(loader, "read_content", slow)
    return reading


async def status(world: World, number: int) -> VersionStatus:
    """Returns the status of a version, if no version before it was removed."""
    return (await world.manager.statuses())[number - 1]


def served(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Returns the versions that served, in order."""
    messages = [record.getMessage() for record in caplog.records]
    return [int(message.split()[1]) for message in messages if " serves: " in message]


async def polls(world: World, count: int = 3) -> None:
    """Waits until the manager has looked at the registry `count` more times."""
    seen = 0
    versions = world.registry.versions

    def counted() -> list[VersionManifest]:
        nonlocal seen
        seen += 1
        return versions()

    world.registry.versions = counted  # type: ignore[method-assign]
    await eventually(lambda: seen >= count)
    world.registry.versions = versions  # type: ignore[method-assign]


def drop(registry: Registry, change: Callable[[Path], None]) -> VersionManifest:
    """Puts a version into a registry in one move, which was changed after its commit; it is the best one."""
    staged = disk_registry(root_of(registry).with_name("staged"))
    manifest = publish_tiny_version(staged, 0.1)
    while manifest.version <= len(registry.versions()):
        manifest = publish_tiny_version(staged, 0.1)
    directory = version_folder(staged, manifest.version)
    change(directory)
    directory.rename(version_folder(registry, manifest.version))
    return manifest
