import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import TrainingDiverged
from shared.gpt.model import parameters_of
from shared.gpt.tokenizer import Tokenizer
from trainer_service.training import loop
from trainer_service.training.batches import Tokens, TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss, evaluate
from trainer_service.training.loop import train
from trainer_service.training.overfitting import OverfittingWatch
from trainer_service.training.report import Report
from trainer_service.training.trainer import StepResult, Trainer
from trainer_service.training.workers import Workers

CONFIG = TrainingConfig(
    tokenizer="bpe",
    vocabulary_size=300,
    layers=1,
    width=16,
    heads=2,
    hidden_width=32,
    context_length=8,
    tied_head=True,
    dropout=0.5,
    max_steps=12,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    evaluation_interval=5,
    evaluation_windows=20,
    report_interval=4,
)
TOKENS: Tokens = (np.arange(5000) * 7 % 300).astype(np.uint16)
TEXT = TrainingText(TOKENS, end_token=0)


@dataclass
class Recorder:
    """An observer that records every call."""

    reports: list[Report] = field(default_factory=list)
    checkpoints: list[tuple[int, float, HeldOutLoss]] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def checkpoint(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        self.checkpoints.append((trainer.step, trainer.training_loss, held_out))

    def save(self, trainer: Trainer) -> None:
        self.saved.append(trainer.step)

    def notice(self, text: str) -> None:
        self.notices.append(text)


class TwoBytesEach:
    """Stands for a tokenizer whose tokens all have two bytes."""

    digest = "two"
    byte_lengths = np.full(300, 2, np.int32)


def evaluation_set(windows: int = 20, tokens: Tokens = TOKENS) -> EvaluationSet:
    return EvaluationSet.from_tokens(tokens, cast(Tokenizer, TwoBytesEach()), windows=windows, context_length=8)


def run(trainer: Trainer, stop_requested: Callable[[], bool] = lambda: False) -> tuple[bool, Recorder]:
    recorder = Recorder()
    return train(trainer, evaluation_set(), recorder, stop_requested), recorder


def test_reports_and_checkpoints_happen_at_their_intervals() -> None:
    trainer = Trainer(CONFIG, TEXT)
    completed, recorder = run(trainer)
    assert completed
    assert [report.step for report in recorder.reports] == [1, 4, 5, 8, 10, 12]
    assert [step for step, _, _ in recorder.checkpoints] == [5, 10, 12]
    assert recorder.saved == []
    assert recorder.reports[-1].tokens == 12 * 4 * 8
    assert recorder.reports[-1].eta_s == 0
    best = min(held_out.nats_per_token for _, _, held_out in recorder.checkpoints)
    assert trainer.best_validation_loss == best
    assert recorder.reports[0].best_validation_loss is None


def test_a_run_that_ends_at_an_earlier_step_is_evaluated_there_and_keeps_its_schedule() -> None:
    trainer, whole, recorder = Trainer(CONFIG, TEXT), Trainer(CONFIG, TEXT), Recorder()
    assert train(trainer, evaluation_set(), recorder, lambda: False, until=5)
    run(whole)
    assert [step for step, _, _ in recorder.checkpoints] == [5] == [trainer.step]
    assert trainer.learning_rate == CONFIG.learning_rate_at(4)
    assert train(trainer, evaluation_set(), recorder, lambda: False, until=12)
    assert [step for step, _, _ in recorder.checkpoints] == [5, 10, 12]
    for name, weights in parameters_of(whole.model).items():
        assert mx.array_equal(parameters_of(trainer.model)[name], weights)


def test_a_stop_finishes_the_step_and_saves_the_state() -> None:
    trainer = Trainer(CONFIG, TEXT)
    completed, recorder = run(trainer, lambda: trainer.step >= 7)
    assert not completed
    assert recorder.saved == [7] and recorder.reports[-1].step == 7


def test_no_step_is_expected_while_a_stopped_run_saves_its_state() -> None:
    trainer, paused = Trainer(CONFIG, TEXT), [False]

    class Pausing(Recorder):
        def save(self, trainer: Trainer) -> None:
            assert paused == [True]
            super().save(trainer)

    @contextmanager
    def pause() -> Iterator[None]:
        paused[0] = True
        yield
        paused[0] = False

    recorder = Pausing()
    assert not train(trainer, evaluation_set(), recorder, lambda: trainer.step >= 7, pause)
    assert recorder.saved == [7] and paused == [False]


@pytest.mark.parametrize("calls", [range(1, 2), range(2, 4)], ids=["in the last step", "in its evaluation"])
def test_a_resumed_run_makes_the_evaluation_that_a_stop_prevented(calls: range, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, TEXT)
    calls_at_end = 0

    def stop_requested() -> bool:
        nonlocal calls_at_end
        calls_at_end += trainer.step == 12
        return trainer.step == 12 and calls_at_end in calls

    completed, recorder = run(trainer, stop_requested)
    assert not completed and recorder.saved == [12]
    assert [step for step, _, _ in recorder.checkpoints] == [5, 10]
    trainer.save(tmp_path)
    resumed = Trainer(CONFIG, TEXT)
    resumed.restore(tmp_path)
    completed, recorder = run(resumed)
    assert completed
    assert [(step, loss) for step, loss, _ in recorder.checkpoints] == [(12, trainer.training_loss)]


def test_a_loss_that_is_not_finite_ends_training_before_anything_is_saved() -> None:
    trainer = Trainer(CONFIG, TEXT)
    trainer.model.load_weights([("final_norm.weight", mx.full((16,), math.nan))], strict=False)
    recorder = Recorder()
    with pytest.raises(TrainingDiverged, match="loss is nan at step 1"):
        train(trainer, evaluation_set(), recorder, lambda: False)
    assert recorder.checkpoints == [] and recorder.saved == []


def test_the_evaluation_set_is_the_first_adjacent_windows() -> None:
    chosen = evaluation_set(windows=3)
    np.testing.assert_array_equal(chosen.windows[:, 0], TOKENS[[0, 8, 16]])
    np.testing.assert_array_equal(chosen.windows[:-1, -1], chosen.windows[1:, 0])
    assert chosen.target_bytes == 3 * 8 * 2
    assert len(evaluation_set(windows=64, tokens=TOKENS[: 5 * 8 + 1]).windows) == 5
    assert chosen.digest == evaluation_set(windows=3).digest != evaluation_set(windows=4).digest


def test_the_held_out_loss_is_exact_for_any_number_of_rows_at_a_time() -> None:
    trainer = Trainer(CONFIG, TEXT)
    trainer.model.load_weights([("token_embedding.weight", mx.zeros((300, 16)))], strict=False)
    for rows in (1, 7, 64):
        held_out = evaluate(trainer.model, evaluation_set(), rows, Workers())
        # With a tied head of zeros, all tokens are equally likely.
        assert held_out.nats_per_token == pytest.approx(math.log(300), rel=1e-5)
        assert held_out.bits_per_byte == pytest.approx(math.log2(300) / 2, rel=1e-5)
        assert held_out.claimed == pytest.approx(math.log(300), rel=1e-5)


def test_evaluation_uses_no_dropout_and_restores_training_mode() -> None:
    trainer = Trainer(CONFIG, TEXT)
    assert evaluate(trainer.model, evaluation_set(), 4, Workers()) == evaluate(
        trainer.model, evaluation_set(), 4, Workers()
    )
    assert trainer.model.training


def test_overfitting_gives_one_warning() -> None:
    watch = OverfittingWatch()
    warnings = [
        watch.check(2.0 - 0.1 * step, held_out) for step, held_out in enumerate([1.9, 1.7, 1.8, 1.8, 1.9, 2.0, 2.1])
    ]
    assert [text is not None for text in warnings] == [False, False, False, False, True, False, False]
    assert warnings[4] is not None and "1.700" in warnings[4]


def test_noise_is_not_overfitting() -> None:
    watch = OverfittingWatch()
    assert [watch.check(1.8, held_out) for held_out in (1.7, 1.71, 1.72, 1.73, 1.74)] == [None] * 5


def test_the_estimate_of_the_remaining_time_ignores_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now_s))
    trainer = SimpleNamespace(
        step=0, config=CONFIG, training_loss=0.0, learning_rate=0.1, tokens=0, best_validation_loss=None
    )
    meter = loop._Meter(cast(Trainer, trainer))
    # The first step, which compiles, takes an hour; the others take a second.
    estimates = []
    for trainer.step, duration_s in ((1, 3600.0), (2, 1.0), (3, 1.0)):
        now_s += duration_s
        meter.add(StepResult(mx.array(1.0), mx.array(1.0), mx.array(0.0)))
        estimates.append(meter.report().eta_s)
    assert estimates == [None, 10.0, 9.0]
