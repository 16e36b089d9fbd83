"""Measures the speed and the memory of training steps, in a process that does nothing else.

Shapes: N windows, T tokens of context.
"""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from shared.device.accelerator import Accelerator
from trainer_service.training.batches import Tokens, TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.evaluate import EvaluationSet, evaluate
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers

# The tokens of the text; they are random, because speed and memory hardly depend on them.
_TEXT_TOKENS = 1 << 18
# Steps are timed for this long.
_LEAST_S = 3.0


@dataclass(frozen=True)
class StepCosts:
    """What training steps take; `threads` is None on a GPU, and `tokens_per_s` if the steps were not timed.

    `activations_bytes` is what a step takes at most besides weights and moments. `peak_bytes` is the peak of the
    process with an evaluation; on a GPU, of its memory there.
    """

    threads: int | None
    tokens_per_s: float | None
    optimizer_bytes: int
    activations_bytes: int
    peak_bytes: int


def measure_steps(config: TrainingConfig, device: Accelerator, *, timed: bool) -> StepCosts:
    """Takes steps of a training run on random text, and evaluates it once; times more steps if asked to."""
    on_cpu = device.backend == "cpu"
    text = np.random.default_rng(0).integers(
        config.vocabulary_size, size=max(_TEXT_TOKENS, config.context_length + 1), dtype=np.uint16
    )
    with Workers(device.threads) as workers:
        trainer = Trainer(config, TrainingText(text, end_token=0), workers)
        moments: Any = tree_flatten(trainer.optimizer.state)
        optimizer_bytes = sum(array.nbytes for _, array in moments)
        del moments
        before_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        _take_steps(trainer, 2)
        activations_bytes = mx.get_peak_memory() - before_bytes + trainer.gradients.memory_bytes
        _evaluate(trainer, text)
        return StepCosts(
            threads=device.threads if on_cpu else None,
            tokens_per_s=_tokens_per_s(trainer) if timed else None,
            optimizer_bytes=optimizer_bytes,
            activations_bytes=activations_bytes,
            peak_bytes=_peak_resident_bytes() if on_cpu else mx.get_peak_memory(),
        )


def _take_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        result = trainer.take_step()
    mx.eval(result.loss, trainer.model.parameters(), trainer.optimizer.state)


def _evaluate(trainer: Trainer, text: Tokens) -> None:
    """Evaluates the model as a run does, on as many windows as it computes at once."""
    config = trainer.config
    windows = min(config.evaluation_windows, config.batch_size)
    starts = np.arange(windows) % (text.size - config.context_length)
    chosen = np.stack([text[start : start + config.context_length + 1] for start in starts])  # (N, T+1)
    evaluate(trainer.model, EvaluationSet(chosen, 1, ""), config.batch_size, trainer.workers)


def _tokens_per_s(trainer: Trainer) -> float:
    begin_s, begin_tokens, steps = time.monotonic(), trainer.tokens, 1
    while True:
        _take_steps(trainer, steps)
        took_s = time.monotonic() - begin_s
        if took_s >= _LEAST_S:
            return (trainer.tokens - begin_tokens) / took_s
        # Waiting for the device after each short step would cost time.
        steps *= 2


def _peak_resident_bytes() -> int:
    """Returns the most resident memory that this process has had."""
    if sys.platform == "linux":
        # Unlike `getrusage`, without that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    else:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
