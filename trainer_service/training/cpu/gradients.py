"""The loss and the gradients of a step on a CPU.

Shapes: B rows, T tokens.
"""

import math

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from shared.gpt.model import GPT, parameters_of
from trainer_service.training.batches import Batch
from trainer_service.training.config import TrainingConfig, micro_batches
from trainer_service.training.cpu.library import Dropout, Dropouts, Floats, Scratch, Task, load_library
from trainer_service.training.cpu.model import CpuModel
from trainer_service.training.gradients import Gradients
from trainer_service.training.loss import Distillation
from trainer_service.training.workers import Workers


class _Part:
    """What a thread writes: the gradients of all weights, in one array and by name, and scratch memory."""

    def __init__(self, model: GPT) -> None:
        shapes = {name: array.shape for name, array in parameters_of(model).items()}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()
        self.whole = np.zeros(ends[-1], np.float32)
        self.named = {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), np.split(self.whole, ends[:-1]), strict=True)
        }
        self.model = CpuModel(model.config, model.final_norm.eps, self.named)
        self.scratch = Scratch()


class CpuGradients:
    """Computes the gradients in the library; each thread takes a part of the rows. The bits depend on the number of
    threads."""

    def __init__(
        self, config: TrainingConfig, model: GPT, distillation: Distillation | None, rank: int, workers: Workers
    ) -> None:
        self._config = config
        self._model = model
        self._distillation = distillation or Distillation()
        self._teachers = [CpuModel.of(teacher) for teacher in self._distillation.teachers]
        self._rank = rank
        self._workers = workers
        self._library = load_library()
        self._parts: list[_Part] = []

    @property
    def memory_bytes(self) -> int:
        """The memory of each thread's gradients and pass."""
        return sum(part.whole.nbytes + part.scratch.size for part in self._parts)

    def of(self, drawn: Batch, step: int) -> Gradients:
        """As `StepGradients.of`."""
        rows = len(drawn.inputs)
        count = min(self._workers.count, rows)
        while len(self._parts) < count:
            self._parts.append(_Part(self._model))
        weights = CpuModel.of(self._model)

        def work(number: int) -> float:
            some = drawn.part(*_span(rows, count, number))
            generator = np.random.default_rng((self._config.seed, step, number, self._rank))
            return self._compute(weights, some, self._parts[number], generator)

        loss = sum(self._workers.map(work, range(count)))
        first, *others = (part.whole for part in self._parts[:count])

        def join(number: int) -> None:
            some = slice(*_span(first.size, count, number))
            for other in others:
                first[some] += other[some]

        self._workers.map(join, range(count))
        named = {name: mx.array(array) for name, array in self._parts[0].named.items()}
        return mx.array(loss), tree_unflatten(list(named.items()))

    def _compute(self, weights: CpuModel, drawn: Batch, part: _Part, generator: np.random.Generator) -> float:
        """Stores the gradients of some rows; returns their share in the mean loss."""
        config, total = self._config, 0.0
        part.whole.fill(0)
        rows, tokens = drawn.inputs.shape
        count = micro_batches(rows, tokens)
        for number in range(count):
            some = drawn.part(*_span(rows, count, number))
            shares = np.ones(some.inputs.shape, np.float32) if some.weights is None else some.weights
            for masked in (False, True) if config.masked_loss else (False,):
                task = Task(
                    inputs=some.inputs,
                    targets=some.targets,
                    shares=shares * np.float32((config.masked_loss if masked else 1) / config.tokens_per_step),
                    kept=_kept_inputs(some.inputs.shape, generator) if masked else None,
                    dropouts=_dropouts(config, generator),
                    teachers=self._teachers,
                    alpha=self._distillation.alpha,
                    temperature=self._distillation.temperature,
                )
                loss = self._library.add_gradients(weights, task, part.model, part.scratch)
                # The loss of masked inputs does not compare with that of other runs.
                total += 0 if masked else loss
        return total


def _span(size: int, parts: int, number: int) -> tuple[int, int]:
    """Returns where a part of `size` things begins and ends."""
    return size * number // parts, size * (number + 1) // parts


def _kept_inputs(shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """Draws which of (B, T) inputs are not masked: in each row a random share of them, from half to all.

    Source: Xu et al. 2026, "Data-Constrained Language Model Pretraining: Improved Regularization and Scaling Laws".
    """
    masked_share = 0.5 * generator.random((shape[0], 1), np.float32)
    return (generator.random(shape, np.float32) >= masked_share).astype(np.float32)


def _dropouts(config: TrainingConfig, generator: np.random.Generator) -> "Dropouts | None":
    if not config.dropout:
        return None
    least, scale = round(config.dropout * 2**24), 1 / (1 - config.dropout)
    drawn = generator.integers(1 << 24, size=(1 + 3 * config.layers, 2))
    return (Dropout * len(drawn))(*(Dropout(*numbers, least, scale) for numbers in drawn.tolist()))
