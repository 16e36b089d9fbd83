"""Trains models with and without teachers, and keeps what came of each run.

A run that is finished is not repeated: its outcome and its best weights stay in a folder, so that a benchmark which
reached its time limit goes on where it stopped.
"""

import gc
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from shared.atomic_file import replacing
from shared.gpt.weights import load_model, save_model
from shared.version_format import MODEL_FILE
from tests.benchmarks.material import Material
from trainer_service.evaluation.record import Interval, TextQuality
from trainer_service.evaluation.statistics import paired_interval
from trainer_service.evaluation.text_quality import measure_text
from trainer_service.training.batches import TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers


class OutOfTime(Exception):
    """The time limit is reached, or the next run would not end before it."""


@dataclass(frozen=True)
class Run:
    """A model to train: a name, its values, and the runs whose best models teach it."""

    name: str
    config: TrainingConfig
    teachers: tuple["Run", ...] = ()

    def key(self, material: Material) -> str:
        """Returns a digest of everything that the outcome depends on."""
        values = self.config.to_dict()
        if not self.teachers:
            values = {name: value for name, value in values.items() if not name.startswith("distillation_")}
        parts = [json.dumps(values), material.digest, *(each.key(material) for each in self.teachers)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Outcome:
    """What came of a run. Losses are those of the judge: on the whole held-out text, in windows that overlap by half.

    nats, bits_per_byte, step: at the evaluation with the lowest loss, whose weights are kept.
    last_nats: at the end of the run.
    seconds: of training, without evaluations.
    unit_nats, unit_tokens: of each document at the best evaluation.
    """

    name: str
    step: int
    nats: float
    bits_per_byte: float
    last_nats: float
    seconds: float
    unit_nats: tuple[float, ...]
    unit_tokens: tuple[int, ...]

    def difference_from(self, other: "Outcome") -> tuple[float, Interval | None]:
        """Returns the difference of the losses in nats per token, below 0 if this one is better, and its paired
        interval over documents."""
        assert self.unit_tokens == other.unit_tokens
        return self.nats - other.nats, paired_interval(other.unit_nats, self.unit_nats, self.unit_tokens)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Outcome":
        """The inverse of `asdict` after JSON."""
        return cls(**values | {name: tuple(values[name]) for name in ("unit_nats", "unit_tokens")})


class Runs:
    """Does runs on one text, until the monotonic clock shows `end_s`.

    The folder `work` keeps weights and outcomes; the outcomes are also written to the file `copy`.
    """

    def __init__(self, material: Material, workers: Workers, work: Path, copy: Path | None, end_s: float) -> None:
        self._material = material
        self._workers = workers
        self._work = work
        self._files = [work / "outcomes.json", *([copy] if copy else [])]
        self._end_s = end_s
        self._longest_s = 0.0
        work.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self._files[0].read_text()) if self._files[0].exists() else {}
        self._outcomes = {key: Outcome.from_dict(values) for key, values in stored.items()}

    def outcome(self, run: Run) -> Outcome:
        """Returns the outcome of a run, which is done first if it is new.

        Raises `OutOfTime` if it reaches the limit, or would reach it if it took as long as the longest one so far.
        """
        key = run.key(self._material)
        if key not in self._outcomes:
            for teacher in run.teachers:
                self.outcome(teacher)
            start_s = time.monotonic()
            if start_s + self._longest_s > self._end_s:
                raise OutOfTime
            self._outcomes[key] = self._train(run, self._work / key)
            self._longest_s = max(self._longest_s, time.monotonic() - start_s)
            self._write()
        return self._outcomes[key]

    def _train(self, run: Run, folder: Path) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        teachers = [
            load_model(self._work / each.key(self._material) / MODEL_FILE, each.config.gpt) for each in run.teachers
        ]
        text = TrainingText(self._material.train, self._material.tokenizer.end_token)
        trainer = Trainer(run.config, text, self._workers, teachers)
        best: TextQuality | None = None
        best_step, seconds = 0, 0.0
        while trainer.step < run.config.max_steps:
            start_s = time.perf_counter()
            self._take_steps(trainer)
            seconds += time.perf_counter() - start_s
            quality = self._measure(trainer)
            print(f"{run.name}: step {trainer.step}, {quality.nats_per_token:.4f} nats, {seconds:.0f} s", flush=True)
            if best is None or quality.nats_per_token < best.nats_per_token:
                best, best_step = quality, trainer.step
                save_model(trainer.model, folder / MODEL_FILE)
        assert best is not None
        del trainer, teachers
        gc.collect()
        mx.clear_cache()
        return Outcome(
            name=run.name,
            step=best_step,
            nats=best.nats_per_token,
            bits_per_byte=best.bits_per_byte,
            last_nats=quality.nats_per_token,
            seconds=seconds,
            unit_nats=best.unit_nats,
            unit_tokens=best.unit_tokens,
        )

    def _take_steps(self, trainer: Trainer) -> None:
        """Takes the steps up to the next evaluation, and waits for them."""
        while True:
            if time.monotonic() > self._end_s:
                raise OutOfTime
            trainer.take_step()
            if trainer.step % trainer.config.evaluation_interval == 0 or trainer.step == trainer.config.max_steps:
                mx.eval(trainer.model.parameters())
                return

    def _measure(self, trainer: Trainer) -> TextQuality:
        window = trainer.config.context_length
        return measure_text(
            trainer.model,
            self._material.held_out,
            self._material.tokenizer,
            window=window,
            stride=window // 2,
            workers=self._workers,
            report=lambda _: None,
        )

    def _write(self) -> None:
        text = json.dumps({key: asdict(outcome) for key, outcome in self._outcomes.items()})
        for path in self._files:
            with replacing(path) as file:
                file.write(text.encode())
