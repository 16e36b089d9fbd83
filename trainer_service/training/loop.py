"""The training loop: step, report, evaluate, checkpoint, until the schedule ends or a stop is requested."""

import math
import time
from collections.abc import Callable
from typing import Protocol

from shared.errors import TrainingDiverged
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss, evaluate
from trainer_service.training.overfitting import OverfittingWatch
from trainer_service.training.report import Report
from trainer_service.training.trainer import StepResult, Trainer, scalar

# The longest time between two reports, unless a single step takes longer.
_REPORT_AT_LATEST_S = 5.0


class Observer(Protocol):
    """Receives reports and stores checkpoints."""

    def report(self, report: Report) -> None:
        """Receives a report on the last steps."""

    def checkpoint(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        """Stores the state and a version after an evaluation, before the trainer records it: a state without a version
        is evaluated again."""

    def save(self, trainer: Trainer) -> None:
        """Stores the state when the loop stops early."""

    def notice(self, text: str) -> None:
        """Receives a sentence for the user."""


def train(
    trainer: Trainer, evaluation_set: EvaluationSet, observer: Observer, stop_requested: Callable[[], bool]
) -> bool:
    """Runs to the end of the schedule and returns True, or to the end of the step after which `stop_requested` returns
    True, and returns False.

    An interrupted evaluation is repeated when the run continues. Raises `TrainingDiverged` if a loss is not finite;
    nothing is written then, so the last checkpoint stays valid.
    """
    config = trainer.config
    meter = _Meter(trainer)
    watch = OverfittingWatch()

    def check_stop(_: float) -> None:
        if stop_requested():
            raise _Interrupted

    while True:
        if _is_due(trainer):
            try:
                held_out = evaluate(trainer.model, evaluation_set, config.batch_size, trainer.workers, check_stop)
            except _Interrupted:
                observer.save(trainer)
                return False
            _require_finite("held-out loss", held_out.nats_per_token, trainer.step)
            observer.checkpoint(trainer, held_out)
            trainer.record_evaluation(held_out.nats_per_token)
            if warning := watch.check(trainer.training_loss, held_out.nats_per_token):
                observer.notice(warning)
            meter.restart()
        if trainer.step >= config.max_steps:
            return True
        meter.add(trainer.take_step())
        stopping = stop_requested()
        if stopping or _is_due(trainer) or meter.due:
            observer.report(meter.report())
        if stopping:
            observer.save(trainer)
            return False


class _Interrupted(Exception):
    pass


def _is_due(trainer: Trainer) -> bool:
    step, config = trainer.step, trainer.config
    at_border = step % config.evaluation_interval == 0 or step == config.max_steps
    return at_border and step != trainer.evaluated_step


class _Meter:
    """Computes means and rates between reports."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._first_step = trainer.step + 1
        self._results: list[StepResult] = []
        self._window_began_s = time.monotonic()
        # When the first step ended.
        self._began_s: float | None = None

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    @property
    def due(self) -> bool:
        """Whether to report now: at the first step, every `report_interval` steps, and after a few seconds."""
        step = self._trainer.step
        long_ago = time.monotonic() - self._window_began_s >= _REPORT_AT_LATEST_S
        return step == self._first_step or step % self._trainer.config.report_interval == 0 or long_ago

    def report(self) -> Report:
        trainer, config = self._trainer, self._trainer.config
        norm = scalar(self._results[-1].gradient_norm)
        losses = [scalar(result.loss) for result in self._results]
        for step, loss in enumerate(losses, start=trainer.step - len(losses) + 1):
            _require_finite("training loss", loss, step)
        _require_finite("gradient norm", norm, trainer.step)
        now_s = time.monotonic()
        trainer.training_loss = math.fsum(losses) / len(losses)
        report = Report(
            step=trainer.step,
            loss=trainer.training_loss,
            learning_rate=trainer.learning_rate,
            gradient_norm=norm,
            tokens=trainer.tokens,
            tokens_per_second=len(losses) * config.tokens_per_step / (now_s - self._window_began_s),
            eta_s=self._eta_s(now_s),
            best_validation_loss=trainer.best_validation_loss,
        )
        self._results.clear()
        self.restart()
        return report

    def _eta_s(self, now_s: float) -> float | None:
        if self._began_s is None:
            self._began_s = now_s
            return None
        steps = self._trainer.step - self._first_step
        return (now_s - self._began_s) / steps * (self._trainer.config.max_steps - self._trainer.step)

    def restart(self) -> None:
        """Starts a new interval; earlier time does not count for rates."""
        self._window_began_s = time.monotonic()


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"The {what} is {value} at step {step}: training diverged. The last checkpoint is kept; continue from it "
            "with a lower learning_rate, more warmup_steps or a smaller max_gradient_norm."
        )
