"""A model in training: weights, optimizer, position; one compiled step; states in and out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from shared.errors import CorruptCheckpoint, InvalidArgument
from shared.gpt.model import GPT
from shared.gpt.weights import load_arrays, save_model
from trainer_service.training.batches import Tokens, batch
from trainer_service.training.config import TrainingConfig
from trainer_service.training.loss import mean_loss
from trainer_service.training.optimizer import learning_rate, make_optimizer


@dataclass(frozen=True)
class StepResult:
    """Two scalars of a step that may still be computing."""

    loss: mx.array
    gradient_norm: mx.array


class Trainer:
    """Everything that a step changes. A step depends on the state before it, the configuration and the text alone:
    its windows and its dropout follow from (seed, step), so a restored state goes on exactly."""

    def __init__(self, config: TrainingConfig, tokens: Tokens) -> None:
        self.config = config
        self.step = 0
        self.tokens = 0
        self.best_validation_loss: float | None = None
        self._text = tokens
        mx.random.seed(config.seed)
        self.model = GPT(config.gpt)
        self.optimizer = make_optimizer(config)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        self._start()

    def _start(self) -> None:
        """Compiles the step over the state that stands now; a state that is put in place later would not be seen."""
        self.model.train()
        captured = [self.model.state, self.optimizer.state, mx.random.state]
        loss_and_gradients = nn.value_and_grad(self.model, mean_loss)

        def take(inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
            loss, gradients = loss_and_gradients(self.model, inputs, targets)
            gradients, norm = optim.clip_grad_norm(gradients, self.config.max_gradient_norm)
            self.optimizer.update(self.model, gradients)
            return loss, norm

        self._take = mx.compile(take, inputs=captured, outputs=captured)
        self._captured = captured
        self._previous: mx.array | None = None

    @property
    def learning_rate(self) -> float:
        """The rate of the step that was taken last."""
        return scalar(learning_rate(self.config, mx.array(max(self.step - 1, 0))))

    def take_step(self) -> StepResult:
        """Starts the next step and waits for the one before it, so that the device always has work."""
        config = self.config
        drawn = batch(
            self._text, seed=config.seed, step=self.step, rows=config.batch_size, context_length=config.context_length
        )
        mx.random.seed((config.seed << 32) | self.step)
        loss, norm = self._take(mx.array(drawn.inputs), mx.array(drawn.targets))
        mx.async_eval(loss, norm, self._captured)
        if self._previous is not None:
            mx.eval(self._previous)
        self._previous = loss
        self.step += 1
        self.tokens += config.tokens_per_step
        return StepResult(loss, norm)

    def record_evaluation(self, validation_loss: float) -> None:
        """Remembers the best held-out loss."""
        if self.best_validation_loss is None or validation_loss < self.best_validation_loss:
            self.best_validation_loss = validation_loss

    def save(self, directory: Path) -> None:
        """Writes everything that a step depends on into an empty folder."""
        save_model(self.model, directory / "model.safetensors")
        mx.save_safetensors(str(directory / "optimizer.safetensors"), dict(tree_flatten(self.optimizer.state)))
        position = {
            "step": self.step,
            "tokens": self.tokens,
            "best_validation_loss": self.best_validation_loss,
            "config": self.config.to_dict(),
        }
        (directory / "position.json").write_text(json.dumps(position, indent=2), encoding="utf-8")

    def restore(self, directory: Path) -> None:
        """Puts a saved state in place. Raises `InvalidArgument` where it is of another shape, `CorruptCheckpoint`
        where it cannot be read."""
        try:
            position = json.loads((directory / "position.json").read_text(encoding="utf-8"))
            saved = TrainingConfig.from_dict(position["config"])
        except (OSError, ValueError, KeyError) as error:
            raise CorruptCheckpoint(f"{directory / 'position.json'} cannot be read: {error}.") from error
        if saved.gpt.to_dict() | {"dropout": 0} != self.config.gpt.to_dict() | {"dropout": 0}:
            raise InvalidArgument("A run can only be continued with the model's shape that it began with.")
        self.model.load_weights(list(load_arrays(directory / "model.safetensors").items()))
        self.optimizer.state = tree_unflatten(list(load_arrays(directory / "optimizer.safetensors").items()))
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.step, self.tokens = position["step"], position["tokens"]
        self.best_validation_loss = position["best_validation_loss"]
        self._start()


def scalar(array: mx.array) -> float:
    """The value of an array of one number, computed now."""
    value: Any = array.item()
    return float(value)
