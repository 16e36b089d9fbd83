"""Times of a training step without a teacher and with one of the same shape."""

import statistics
import time
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from shared.gpt.model import GPT
from tests.benchmarks.material import Material
from trainer_service.training.batches import TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers

_WARM_UP_STEPS = 5


@dataclass(frozen=True)
class StepTimes:
    """The median milliseconds of a step, plain and with a teacher, the range of the ratio of each round, and the most
    memory in bytes that a step takes beside weights, moments and teachers."""

    COLUMNS: ClassVar = ["batch", "plain", "with a teacher", "ratio", "rounds", "memory plain", "memory with a teacher"]

    batch: str
    plain_ms: float
    taught_ms: float
    ratios: tuple[float, ...]
    plain_bytes: int
    taught_bytes: int

    @property
    def cells(self) -> list[str]:
        """A row of the table with `COLUMNS`."""
        return [
            self.batch,
            f"{self.plain_ms:,.2f} ms",
            f"{self.taught_ms:,.2f} ms",
            f"{statistics.median(self.ratios):.2f}",
            f"{min(self.ratios):.2f} to {max(self.ratios):.2f}",
            f"{self.plain_bytes / 2**30:.2f} GiB",
            f"{self.taught_bytes / 2**30:.2f} GiB",
        ]

    def __str__(self) -> str:
        return ", ".join(f"{name}: {cell}" for name, cell in zip(self.COLUMNS, self.cells, strict=True))


def measure_steps(config: TrainingConfig, material: Material, workers: Workers, rounds: int, steps: int) -> StepTimes:
    """Times `steps` steps of each trainer in turn, in each round."""
    teacher = GPT(config.gpt)
    teacher.eval()
    mx.eval(teacher.parameters())
    text = TrainingText(material.train, material.tokenizer.end_token)
    trainers = [Trainer(config, text, workers, each) for each in ([], [teacher])]
    for trainer in trainers:
        _seconds(trainer, _WARM_UP_STEPS)
    times: list[list[float]] = [[], []]
    memory = [0, 0]
    for _ in range(rounds):
        for number, trainer in enumerate(trainers):
            at_rest = mx.get_active_memory()
            mx.reset_peak_memory()
            times[number].append(_seconds(trainer, steps) / steps)
            peak = mx.get_peak_memory() - at_rest + trainer.gradients.memory_bytes
            memory[number] = max(memory[number], peak)
    ratios = tuple(taught / plain for plain, taught in zip(*times, strict=True))
    plain_ms, taught_ms = (statistics.median(each) * 1e3 for each in times)
    return StepTimes(f"{config.batch_size}x{config.context_length}", plain_ms, taught_ms, ratios, *memory)


def _seconds(trainer: Trainer, steps: int) -> float:
    start_s = time.perf_counter()
    for _ in range(steps):
        loss = trainer.take_step().loss
    mx.eval(loss, trainer.model.parameters(), trainer.optimizer.state)
    return time.perf_counter() - start_s
