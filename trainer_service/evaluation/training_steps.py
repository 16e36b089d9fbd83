"""Measures the speed and the memory of training steps by batch size, in a process that does nothing else.

Shapes: N windows, T tokens of context.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from shared.device.accelerator import Accelerator, release_memory
from shared.errors import FailedPrecondition
from shared.text import format_size
from trainer_service.evaluation.record import TrainingMemory
from trainer_service.plan import Machine, memory_bytes
from trainer_service.training.batches import Tokens
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
    """What training steps take; `threads` is None on a GPU.

    `rows` is the number of windows of the steps that were timed: the batch size, or the largest one that fits into
    memory. `memory` is that of several batch sizes.
    """

    threads: int | None
    rows: int
    tokens_per_s: float
    optimizer_bytes: int
    memory: tuple[TrainingMemory, ...]


def measure_steps(
    config: TrainingConfig, sizes: Sequence[int], device: Accelerator, show: Callable[[str], object]
) -> StepCosts:
    """Measures the memory of training with each batch size, in ascending order, and the speed with the last one.

    Leaves out sizes that are expected to need more memory than there is. Raises `FailedPrecondition` if none is left.
    """
    on_cpu = device.backend == "cpu"
    machine = Machine(device.memory_bytes, device.threads if on_cpu else None)
    estimates = {size: memory_bytes(replace(config, batch_size=size), machine) for size in sizes}
    fitting = [size for size, estimate in estimates.items() if (estimate or 0) <= device.memory_bytes]
    if not fitting:
        raise FailedPrecondition(
            f"Training is expected to need {format_size(estimates[sizes[0]] or 0)} with a batch size of {sizes[0]}, "
            f"but this machine has {format_size(device.memory_bytes)} of memory."
        )
    text = np.random.default_rng(0).integers(
        config.vocabulary_size, size=max(_TEXT_TOKENS, config.context_length + 1), dtype=np.uint16
    )
    memory = []
    with Workers(device.threads) as workers:
        for size in fitting:
            release_memory()
            trainer = Trainer(replace(config, batch_size=size), text, workers)
            before_bytes = mx.get_active_memory()
            mx.reset_peak_memory()
            _take_steps(trainer, 2)
            activations_bytes = mx.get_peak_memory() - before_bytes
            _evaluate(trainer, text)
            peak_bytes = _peak_resident_bytes() if on_cpu else mx.get_peak_memory()
            memory.append(TrainingMemory(size, activations_bytes, peak_bytes, estimates[size]))
            show(f"batch size {size}: {format_size(activations_bytes)} of activations")
        tokens_per_s = _tokens_per_s(trainer)
        show(f"training: {tokens_per_s:,.0f} tokens/s")
        moments: Any = tree_flatten(trainer.optimizer.state)
        optimizer_bytes = sum(array.nbytes for _, array in moments)
    return StepCosts(device.threads if on_cpu else None, fitting[-1], tokens_per_s, optimizer_bytes, tuple(memory))


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
