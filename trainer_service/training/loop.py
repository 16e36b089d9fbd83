"""The training loop: step, report, evaluate, checkpoint, until the schedule ends or a stop is requested."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from shared.errors import FailedPrecondition, TrainingDiverged, Unavailable
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
    trainer: Trainer,
    evaluation_set: EvaluationSet | None,
    observer: Observer | None,
    stop_requested: Callable[[], bool],
    pause: Callable[[], AbstractContextManager[object]] = nullcontext,
    until: int | None = None,
) -> bool:
    """Runs to the step `until`, by default the end of the schedule, and returns True, or to the end of the step after
    which `stop_requested` returns True, and returns False.

    All ranks of a run call it. Only the first has an observer and an evaluation set: it evaluates and writes, and the
    others wait, all of them inside a `pause`. Evaluating takes a third of a step for as many rows, so sharing it would
    save less than a thousandth of the time at the usual intervals.

    An interrupted evaluation is repeated when the run continues. Raises `TrainingDiverged` in the first rank if a loss
    is not finite; nothing is written then, so the last checkpoint stays valid. Raises `RankLost` if another rank is
    lost, `Unavailable` if the ranks have come to differ, and `FailedPrecondition` if they do not belong together.
    """
    ranks, config = trainer.ranks, trainer.config
    last_step = config.max_steps if until is None else until
    if ranks.count != config.world_size:
        raise FailedPrecondition(
            f"The run has a world_size of {config.world_size}, but {ranks.count} of its processes have started."
        )
    with ranks.guard():
        trainer.take_first_state()
        meter = _Meter(trainer)
        watch = OverfittingWatch()
        wanted = False
        while True:
            if _is_due(trainer):
                with pause():
                    if not _evaluate(trainer, evaluation_set, observer, watch, stop_requested):
                        return False
                meter.restart()
            if trainer.step >= last_step:
                return True
            result = trainer.take_step(wanted)
            wanted = stop_requested()
            stopping = trainer.all_stop(wanted)
            if observer:
                meter.add(result)
                if stopping or _is_due(trainer) or meter.due:
                    observer.report(meter.report())
            if stopping:
                # The others wait for the state: some launchers kill all ranks once one has ended.
                with pause():
                    if observer:
                        observer.save(trainer)
                    ranks.share()
                return False


def _evaluate(
    trainer: Trainer,
    evaluation_set: EvaluationSet | None,
    observer: Observer | None,
    watch: OverfittingWatch,
    stop_requested: Callable[[], bool],
) -> bool:
    """Evaluates and stores a checkpoint in the first rank; returns False in all ranks if that was interrupted."""
    ranks = trainer.ranks
    if ranks.count > 1 and not ranks.agree(trainer.norms()):
        raise Unavailable(
            f"The ranks have different weights after step {trainer.step}. All need the same kind of device and version "
            "of MLX."
        )
    held_out = None
    if observer:
        assert evaluation_set is not None
        held_out = _held_out(trainer, evaluation_set, stop_requested)
        if held_out is None:
            observer.save(trainer)
        else:
            _require_finite("held-out loss", held_out.nats_per_token, trainer.step)
            observer.checkpoint(trainer, held_out)
    loss = ranks.share(repr(held_out.nats_per_token) if held_out else "")
    if not loss:
        return False
    trainer.record_evaluation(float(loss))
    if observer and (warning := watch.check(trainer.training_loss, float(loss))):
        observer.notice(warning)
    return True


def _held_out(
    trainer: Trainer, evaluation_set: EvaluationSet, stop_requested: Callable[[], bool]
) -> HeldOutLoss | None:
    """Returns the held-out loss, or None if a stop was requested; computes as many rows at a time as a step does."""

    def check_stop(_: float) -> None:
        if stop_requested():
            raise _Interrupted

    first, end = trainer.ranks.rows(trainer.config.batch_size)
    try:
        return evaluate(trainer.model, evaluation_set, end - first, trainer.workers, check_stop)
    except _Interrupted:
        return None


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
