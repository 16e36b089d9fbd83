"""A model in training: its weights, optimizer and position, its steps, and its saved states.

Shapes: B rows, T tokens.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from shared.errors import CorruptCheckpoint, FailedPrecondition, InvalidArgument
from shared.gpt import cuda
from shared.gpt.model import GPT, parameters_of
from shared.gpt.operations import on_cpu
from shared.gpt.weights import load_arrays, save_arrays, save_model
from shared.version_format import MODEL_FILE, OPTIMIZER_FILE, POSITION_FILE
from trainer_service.training.batches import Batches, TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.cpu.gradients import CpuGradients
from trainer_service.training.cpu.optimizer import CpuOptimizer
from trainer_service.training.gradients import MlxGradients, StepGradients
from trainer_service.training.loss import Distillation
from trainer_service.training.optimizer import Optimizer
from trainer_service.training.ranks import Ranks
from trainer_service.training.workers import Workers

# What a saved state holds beside arrays and the configuration: attributes of a trainer.
_POSITION = ("step", "tokens", "training_loss", "evaluated_step", "best_validation_loss")


@dataclass(frozen=True)
class StepResult:
    """Scalars of a step, which may still be computing; `stops` is above 0 if a rank asked to stop before the step."""

    loss: mx.array
    gradient_norm: mx.array
    stops: mx.array


class Trainer:
    """Everything that a step changes. A step depends only on the state before it, the configuration, the text, the
    teachers and the numbers of ranks and workers: its windows and its dropout follow from (seed, step). So a restored
    run continues exactly, if it is given the same teachers.

    Each rank takes a part of every batch, and on a CPU each of its workers a part of that; the state is the same in all
    ranks. Gradients are summed over the ranks in fp32.
    Teachers have the student's vocabulary and at least its context; if there are none, or if `distillation_alpha` is 0,
    the loss is the plain one.
    """

    def __init__(
        self,
        config: TrainingConfig,
        text: TrainingText,
        workers: Workers | None = None,
        teachers: Sequence[GPT] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks.alone()
        self.workers = workers or Workers()
        self.step = 0
        self.tokens = 0
        self.training_loss = math.nan
        self.evaluated_step = 0
        self.best_validation_loss: float | None = None
        self._text = text
        self._batches = Batches(
            text,
            seed=config.seed,
            rows=config.batch_size,
            context_length=config.context_length,
            teacher_share=config.teacher_share,
        )
        self._distillation = _distillation(config, teachers)
        mx.random.seed(config.seed)
        self.model = GPT(config.gpt)
        parameters = self.model.trainable_parameters()
        if on_cpu():
            self.optimizer: Optimizer = CpuOptimizer(config, parameters, self.workers)
            self.gradients: StepGradients = CpuGradients(
                config, self.model, self._distillation, self.ranks.rank, self.workers
            )
        else:
            self.optimizer = Optimizer(config, parameters)
            self.gradients = MlxGradients(config, self.model, self._distillation, self.ranks.rank)
        mx.eval(self.model.parameters(), self.optimizer.state)
        self._start()

    def _start(self) -> None:
        """Compiles the update on a GPU. The compiled function holds the current arrays of the state, so it is compiled
        again when these are replaced."""

        def update(
            loss: mx.array, gradients: dict[str, Any], rate: mx.array, stops: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            loss, gradients, stops = self.ranks.sum(loss, gradients, stops)
            weights, norm = self.optimizer.update(self.model.trainable_parameters(), gradients, rate)
            self.model.update(weights)
            return loss, norm, stops

        self._captured = [self.model.state, self.optimizer.state]
        self._update = update if on_cpu() else mx.compile(update, inputs=self._captured, outputs=self._captured)
        # The last step, and the one before it.
        self._previous: StepResult | None = None
        self._before: StepResult | None = None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.config.learning_rate_at(max(self.step - 1, 0))

    def take_step(self, stop: bool = False) -> StepResult:
        """Starts the next step and waits for the one before it, so that the device always has work.

        `stop` is the wish of this rank that all stop; see `all_stop`.
        """
        config = self.config
        drawn = self._batches.at(self.step).part(*self.ranks.rows(config.batch_size))
        loss, gradients = self.gradients.of(drawn, self.step)
        rate = mx.array(config.learning_rate_at(self.step))
        result = StepResult(*self._update(loss, gradients, rate, mx.array(float(stop))))
        mx.async_eval(result.loss, result.gradient_norm, result.stops, self._captured)
        if self._previous is not None:
            mx.eval(self._previous.loss)
        self._before, self._previous = self._previous, result
        self.step += 1
        self.tokens += config.tokens_per_step
        return result

    def all_stop(self, wanted: bool) -> bool:
        """Whether all ranks stop after the last step; `wanted` is the wish of this one, which it gives `take_step` too.

        Several ranks stop two steps after one of them wished it: the wish travels with the gradients of the next step,
        and is read when that has ended, while the device computes the one after it.
        """
        if self.ranks.count == 1:
            return wanted
        return self._before is not None and scalar(self._before.stops) > 0

    def record_evaluation(self, validation_loss: float) -> None:
        """Records that this step was evaluated, and updates the best held-out loss."""
        self.evaluated_step = self.step
        if self.best_validation_loss is None or validation_loss < self.best_validation_loss:
            self.best_validation_loss = validation_loss

    def save(self, directory: Path) -> None:
        """Writes everything that a step depends on into an empty folder; raises `OSError` if that fails."""
        save_model(self.model, directory / MODEL_FILE)
        save_arrays(dict(tree_flatten(self.optimizer.state)), directory / OPTIMIZER_FILE)
        position = self._position() | {"config": self.config.to_dict()}
        (directory / POSITION_FILE).write_text(json.dumps(position, indent=2), encoding="utf-8")

    def restore(self, directory: Path) -> None:
        """Restores a saved state. Raises `InvalidArgument` if its model has another shape or its optimizer is another
        one, and `CorruptCheckpoint` if it cannot be read."""
        try:
            position = json.loads((directory / POSITION_FILE).read_text(encoding="utf-8"))
            restored = {name: position[name] for name in _POSITION}
            saved = TrainingConfig.from_dict(position["config"])
        except (OSError, ValueError, KeyError) as error:
            raise CorruptCheckpoint(f"{directory / POSITION_FILE} cannot be read: {error}.") from error
        if saved.gpt.to_dict() | {"dropout": 0} != self.config.gpt.to_dict() | {"dropout": 0}:
            raise InvalidArgument("The saved model has another shape: a run must keep the shape of its model.")
        if saved.optimizer != self.config.optimizer:
            raise InvalidArgument(
                f"The saved optimizer is {saved.optimizer}, but the run has {self.config.optimizer}: a run must keep "
                "its optimizer."
            )
        weights = load_arrays(directory / MODEL_FILE)
        moments = load_arrays(directory / OPTIMIZER_FILE)
        for name, loaded, current in (
            (MODEL_FILE, weights, parameters_of(self.model)),
            (OPTIMIZER_FILE, moments, dict(tree_flatten(self.optimizer.state))),
        ):
            if _shapes(loaded) != _shapes(current):
                raise CorruptCheckpoint(f"{directory / name} has not the arrays of the model in {POSITION_FILE}.")
        self._put(weights, moments, restored)

    def take_first_state(self) -> None:
        """Takes the state of the first rank, the only one that has to restore it.

        Raises `FailedPrecondition` if this rank has other values or another text, and `RankLost`.
        """
        ranks = self.ranks
        if ranks.count == 1:
            return
        own = {"data": self._digest(), "position": self._position()}
        first = json.loads(ranks.share(json.dumps(own)))
        if first["data"] != own["data"]:
            raise FailedPrecondition(
                f"Rank {ranks.rank} of {ranks.count} has other values, teachers or text than the first rank: all "
                "ranks need the same job, and the same files of its data."
            )
        weights, moments = (
            {name: ranks.share_array(arrays[name]) for name in sorted(arrays)}
            for arrays in (parameters_of(self.model), dict(tree_flatten(self.optimizer.state)))
        )
        self._put(weights, moments, first["position"])

    def _position(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _POSITION}

    def _put(self, weights: dict[str, mx.array], moments: dict[str, mx.array], position: dict[str, Any]) -> None:
        self.model.load_weights(list(weights.items()))
        self.optimizer.state = tree_unflatten(list(moments.items()))
        mx.eval(self.model.parameters(), self.optimizer.state)
        vars(self).update(position)
        self._start()

    def _digest(self) -> str:
        """Returns a digest of what steps depend on beside the state; of a text, of tokens at regular distances."""
        teacher = self._text.teacher
        texts = [self._text.tokens] if teacher is None else [self._text.tokens, teacher.tokens]
        digest = hashlib.sha256(json.dumps([self.config.to_dict(), self._distillation is None]).encode())
        for tokens in texts:
            digest.update(str(tokens.size).encode() + tokens[:: tokens.size // 4096 + 1].tobytes())
        return digest.hexdigest()

    def norms(self) -> mx.array:
        """Returns the square of the norm of each array of weights (N,), which differs if the weights do."""
        return mx.stack([mx.square(weight).sum() for _, weight in sorted(parameters_of(self.model).items())])


def _distillation(config: TrainingConfig, teachers: Sequence[GPT]) -> Distillation | None:
    """Returns how the run learns from its teachers: copies in the type that the device computes with, whose arrays no
    step changes."""
    if not teachers or config.distillation_alpha == 0:
        return None
    kind = mx.bfloat16 if cuda.is_default_device() else mx.float32
    copies = tuple(GPT(teacher.config) for teacher in teachers)
    for copy, teacher in zip(copies, teachers, strict=True):
        assert teacher.config.vocabulary_size == config.vocabulary_size, "Teachers have the student's vocabulary."
        copy.update(tree_map(lambda weight: mx.array(weight, kind), teacher.parameters()))
        copy.eval()
        mx.eval(copy.parameters())
    return Distillation(copies, config.distillation_alpha, config.distillation_temperature)


def _shapes(arrays: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def scalar(array: mx.array) -> float:
    """Evaluates an array of one number and returns the number."""
    value: Any = array.item()
    return float(value)
