"""Runs of several real processes over a ring, compared with the same run in one process."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.errors import FailedPrecondition, RankLost, Unavailable
from shared.gpt.tokenizer import Tokenizer
from tests.ring_processes import in_ranks
from tests.trainer_service.training.tiny_runs import END, MIXTURE, TEXT, TOKENS, teachers, tiny, tolerance, weights
from trainer_service.training import config as training_config
from trainer_service.training.batches import TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss
from trainer_service.training.loop import train
from trainer_service.training.ranks import Ranks
from trainer_service.training.report import Report
from trainer_service.training.trainer import Trainer, scalar
from trainer_service.training.workers import Workers

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray[Any, Any]]

# The text of a run, its number of teachers, and the tokens of a micro-batch: fewer than a rank has.
KINDS: list[tuple[TrainingText, int, int]] = [(TEXT, 0, 1024), (MIXTURE, 0, 16), (TEXT, 2, 1024), (MIXTURE, 1, 16)]
STEPS = 5


@dataclass(frozen=True)
class Outcome:
    """What a rank has after some steps: their losses and norms, the weights and the moments."""

    losses: list[float]
    norms: list[float]
    arrays: Arrays


def outcome(trainer: Trainer, steps: int) -> Outcome:
    results = [trainer.take_step() for _ in range(steps)]
    moments = {name: np.array(array) for name, array in dict(tree_flatten(trainer.optimizer.state)).items()}
    return Outcome(
        [scalar(result.loss) for result in results],
        [scalar(result.gradient_norm) for result in results],
        weights(trainer) | moments,
    )


def every_kind(config: TrainingConfig, ranks: Ranks) -> list[Outcome]:
    outcomes = []
    for text, count, tokens in KINDS:
        training_config.MICRO_BATCH_TOKENS = tokens
        outcomes.append(outcome(Trainer(config, text, teachers=teachers(count), ranks=ranks), STEPS))
    with Workers(2) as workers:
        outcomes.append(outcome(Trainer(config, MIXTURE, workers, ranks=ranks), STEPS))
    return outcomes


def every_kind_in_ranks(config: TrainingConfig) -> list[Outcome]:
    return every_kind(config, Ranks.join())


def weight_tolerance(steps: int) -> float:
    """In bf16 the gradient of a key's bias, which is 0, is rounded to either sign, and Adam follows the sign."""
    return tolerance(2e-5, 2 * steps * tiny().learning_rate)


def assert_close(one: Outcome, other: Outcome) -> None:
    np.testing.assert_allclose(one.losses, other.losses, atol=tolerance(1e-5, 1e-3))
    np.testing.assert_allclose(one.norms, other.norms, rtol=tolerance(1e-4, 0.02))
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], atol=weight_tolerance(STEPS), err_msg=name)


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses and one.norms == other.norms
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 5), (3, 3)])
def test_ranks_with_a_part_of_each_batch_train_as_one_process_with_the_whole(
    count: int, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(batch_size=batch_size, dropout=0.0, distillation_temperature=1.5)
    monkeypatch.setattr(training_config, "MICRO_BATCH_TOKENS", training_config.MICRO_BATCH_TOKENS)
    expected = every_kind(config, Ranks.alone())
    first, *others = in_ranks(count, every_kind_in_ranks, tmp_path, replace(config, world_size=count))
    for alone, together, *same in zip(expected, first, *others, strict=True):
        assert_close(together, alone)
        for each in same:
            assert_same(each, together)


# All rows hold the same tokens, so that only dropout can make their losses differ.
SAME_ROWS = TrainingText(np.full(9, 5, np.uint16), END)


def resumed(folder: Path, config: TrainingConfig) -> tuple[Outcome, Outcome, float]:
    """An uninterrupted run, the end of one whose first rank alone restored it, and the first loss of a text in which
    rows differ only by their dropout."""
    ranks = Ranks.join()
    whole, first, second = (Trainer(config, TEXT, ranks=ranks) for _ in range(3))
    uninterrupted = outcome(whole, STEPS)
    outcome(first, 2)
    if ranks.rank == 0:
        first.record_evaluation(3.25)
        first.save(folder)
        second.restore(folder)
    second.take_first_state()
    assert (second.step, second.tokens, second.best_validation_loss, second.evaluated_step) == (2, 64, 3.25, 2)
    end = outcome(second, STEPS - 2)
    dropped = Trainer(replace(config, dropout=0.5, batch_size=2), SAME_ROWS, ranks=ranks).take_step().loss
    return uninterrupted, end, scalar(dropped)


def test_dropout_differs_between_ranks_and_is_the_same_after_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    results = in_ranks(2, resumed, tmp_path, folder, tiny(world_size=2))
    for whole, end, _ in results:
        assert end.losses == whole.losses[2:]
        assert_same(end, replace(whole, losses=whole.losses[2:], norms=whole.norms[2:]))
    assert_same(results[0][0], results[1][0])
    one_row = Trainer(tiny(dropout=0.5, batch_size=1), SAME_ROWS).take_step().loss
    assert results[0][2] == results[1][2] != pytest.approx(scalar(one_row), abs=1e-4)


def test_the_windows_and_the_dropout_of_a_seed_do_not_change() -> None:
    # Any other way to draw them would change the runs that go on.
    trainer = Trainer(tiny(), TEXT)
    losses = [scalar(trainer.take_step().loss) for _ in range(2)]
    # MLX draws dropout in other ways than the library for CPUs.
    expected = [5.689430, 5.705716] if mx.default_device() == mx.cpu else [5.696092, 5.711396]
    assert losses == pytest.approx(expected, abs=tolerance(1e-6, 1e-3))


class TwoBytesEach:
    """Stands for a tokenizer whose tokens all have two bytes."""

    digest = "two"
    byte_lengths = np.full(300, 2, np.int32)


EVALUATION_SET = EvaluationSet.from_tokens(TOKENS, cast(Tokenizer, TwoBytesEach()), windows=20, context_length=8)


@dataclass
class Log:
    """An observer that writes down what it is told, and saves states."""

    folder: Path
    lines: list[str] = field(default_factory=list)

    def report(self, report: Report) -> None:
        self.lines.append(f"report {report.step}")

    def checkpoint(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        self.lines.append(f"checkpoint {trainer.step}")

    def save(self, trainer: Trainer) -> None:
        self.lines.append(f"save {trainer.step}")
        (self.folder / str(trainer.step)).mkdir()
        trainer.save(self.folder / str(trainer.step))

    def notice(self, text: str) -> None:
        raise AssertionError(text)


class Rank:
    """A rank of runs, one after another; only the first has an observer."""

    def __init__(self, folder: Path) -> None:
        self.ranks = Ranks.join() if folder.name == "together" else Ranks.alone()
        self.first = self.ranks.rank == 0
        self.log = Log(folder)
        self.pauses: list[int] = []

    def trainer(self, text: TrainingText = TEXT, **values: object) -> Trainer:
        config = tiny(
            dropout=0.0, max_steps=12, evaluation_interval=5, report_interval=6, world_size=self.ranks.count, **values
        )
        return Trainer(config, text, ranks=self.ranks)

    def train(self, trainer: Trainer, stop: Callable[[int], bool] = lambda _: False) -> tuple[bool, int, float | None]:
        """Trains until `stop`, which receives how often it was asked: after each step, and in evaluations."""
        asked = itertools.count(1)

        @contextmanager
        def pause() -> Iterator[None]:
            self.pauses.append(trainer.step)
            yield

        observer, evaluation_set = (self.log, EVALUATION_SET) if self.first else (None, None)
        completed = train(trainer, evaluation_set, observer, lambda: stop(next(asked)), pause)
        return completed, trainer.step, trainer.best_validation_loss


def runs_that_stop(folder: Path) -> dict[str, Any]:
    rank = Rank(folder)
    stopped = rank.train(rank.trainer(), lambda asked: not rank.first and asked == 7)
    # Five steps ask, then the first evaluation.
    interrupted = rank.train(rank.trainer(seed=2), lambda asked: rank.first and asked == 6)
    resumed = rank.trainer()
    if rank.first:
        resumed.restore(folder / "9")
    end = rank.train(resumed)
    return {
        "stopped": stopped,
        "interrupted": interrupted,
        "end": end,
        "weights": weights(resumed),
        "lines": rank.log.lines,
        "pauses": rank.pauses,
    }


def test_all_ranks_stop_after_the_same_step_and_go_on_with_another_world_size(tmp_path: Path) -> None:
    folder = tmp_path / "together"
    folder.mkdir()
    first, second = in_ranks(2, runs_that_stop, tmp_path, folder)
    assert first["stopped"][:2] == (False, 9) and first["interrupted"] == (False, 5, None)
    assert first["end"][:2] == (True, 12) and first["end"][2] is not None
    assert first["lines"] == [
        *("report 1", "report 5", "checkpoint 5", "report 6", "report 9", "save 9"),
        *("report 1", "report 5", "save 5"),
        *("report 10", "checkpoint 10", "report 12", "checkpoint 12"),
    ]
    assert second["lines"] == [] and first["pauses"] == second["pauses"] == [5, 9, 5, 10, 12]
    for what in ("stopped", "interrupted", "end"):
        assert first[what] == second[what]
    alone = Rank(tmp_path)
    whole, resumed = alone.trainer(), alone.trainer()
    resumed.restore(folder / "9")
    assert alone.train(whole)[2] == pytest.approx(first["end"][2], abs=tolerance(1e-5, 1e-3))
    alone.train(resumed)
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(first["weights"][name], second["weights"][name])
        np.testing.assert_allclose(first["weights"][name], array, atol=weight_tolerance(12))
        np.testing.assert_allclose(weights(resumed)[name], array, atol=weight_tolerance(12))


def runs_that_fail(folder: Path) -> list[str]:
    rank = Rank(folder)

    def train_to_error(trainer: Trainer, kind: type[Exception], stop: Callable[[int], bool]) -> str:
        with pytest.raises(kind) as error:
            rank.train(trainer, stop)
        return str(error.value)

    def drift(asked: int) -> bool:
        if not rank.first and asked == 3:
            drifting.model.load_weights([("final_norm.bias", mx.full((16,), 1e-4))], strict=False)
        return False

    def die(asked: int) -> bool:
        if not rank.first and asked == 3:
            os._exit(9)
        return False

    unfit = Trainer(tiny(world_size=3), TEXT, ranks=rank.ranks)
    drifting = rank.trainer()
    return [
        train_to_error(unfit, FailedPrecondition, bool),
        train_to_error(drifting, Unavailable, drift),
        train_to_error(rank.trainer(), RankLost, die),
    ]


def test_ranks_that_differ_or_are_lost_end_training_with_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "together"
    folder.mkdir()
    sentences, _ = in_ranks(2, runs_that_fail, tmp_path, folder, codes=[0, 9])
    assert sentences == [
        "The run has a world_size of 3, but 2 of its processes have started.",
        "The ranks have different weights after step 5. All need the same kind of device and version of MLX.",
        "Rank 0 of 2 has lost the connection to another rank.",
    ]


def train_on_other_text(folder: Path) -> None:
    rank = Rank(folder)
    rank.train(rank.trainer(TEXT if rank.first else TrainingText(TOKENS[::-1], END)))


def test_ranks_with_different_texts_do_not_train(tmp_path: Path) -> None:
    folder = tmp_path / "together"
    folder.mkdir()
    errors = "Rank 1 of 2 has other values, teachers or text than the first rank"
    assert in_ranks(2, train_on_other_text, tmp_path, folder, codes=[1, 1], error=errors) == [None, None]
