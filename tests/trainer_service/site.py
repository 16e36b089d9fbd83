"""A folder with a registry and text, in which tests do the work of jobs without a queue."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shared.device.accelerator import Accelerator
from shared.registry.retention import Retention
from shared.service.settings import Directories
from tests.registries import disk_registry
from trainer_service.jobs.attempt import Attempt
from trainer_service.jobs.events import Event
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import TrainSpec
from trainer_service.run import TrainingRun

Told = TypeVar("Told", bound=Event)

TINY_RUN = {
    "vocabulary_size": "300",
    "layers": "1",
    "width": "16",
    "heads": "2",
    "hidden_width": "32",
    "context_length": "16",
    "batch_size": "2",
    "max_steps": "9",
    "warmup_steps": "1",
    "evaluation_interval": "3",
    "evaluation_windows": "4",
}


class Site:
    """A folder with a registry and text, the events that were emitted, and jobs."""

    def __init__(self, folder: Path) -> None:
        self.directories = Directories(folder / "var")
        self.registry = disk_registry(self.directories.registry)
        self.text = self.write(folder / "text.txt", 0)
        self.other_text = self.write(folder / "other.txt", 1000)
        self.told: list[Event] = []
        self._device = Accelerator("cpu", "cpu", "", memory_bytes=0, cache=folder / "cache")

    @staticmethod
    def write(path: Path, first: int) -> str:
        path.write_text("<|endoftext|>".join(f"Tale {n} of the {n * n} foxes." for n in range(first, first + 400)))
        return str(path)

    def spec(self, resume: int | None = None, dataset: str = "", **values: str) -> TrainSpec:
        text = dataset or (self.text if resume is None else "")
        overrides = values if resume is not None else TINY_RUN | values
        request = TrainRequest(dataset=(text,) if text else (), resume=resume, overrides=overrides)
        return request.resolve(self.registry)

    def attempt(
        self, stop_requested: Callable[[], bool] = lambda: False, retention: Retention | None = None
    ) -> Attempt:
        return Attempt(1, self.directories, retention or Retention(), self._device, self.told.append, stop_requested)

    def train(self, spec: TrainSpec, **given: object) -> bool:
        return TrainingRun(spec, self.attempt(**given)).train()  # type: ignore[arg-type]

    def all_told(self, kind: type[Told]) -> list[Told]:
        return [event for event in self.told if isinstance(event, kind)]
