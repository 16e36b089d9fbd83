"""The training loss is measured as the held-out loss is, and the interval of their gap decides the verdict."""

import mlx.core as mx
import numpy as np
import pytest

from tests.fakes import byte_tokenizer, tiny_model
from trainer_service.evaluation.record import Interval, Overfit, TextQuality, TrainingLoss
from trainer_service.evaluation.text_quality import measure_text
from trainer_service.evaluation.training_loss import measure_training_loss, verdict
from trainer_service.training.workers import Workers

MODEL = tiny_model(0)


def text(size: int, highest: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, highest, size).astype(np.uint16)


def quality(tokens: np.ndarray) -> TextQuality:
    return measure_text(MODEL, tokens, byte_tokenizer(), window=32, stride=16, workers=Workers(), report=lambda _: None)


def training_loss(tokens: np.ndarray, held_out: TextQuality) -> TrainingLoss:
    return measure_training_loss(
        MODEL, tokens, held_out, byte_tokenizer(), window=32, stride=16, workers=Workers(), report=lambda _: None
    )


def test_as_many_training_tokens_as_held_out_ones_are_measured() -> None:
    tokens, held_out = text(2000), quality(text(500, seed=1))
    measured = training_loss(tokens, held_out)
    expected = quality(tokens[:500])
    assert measured.tokens == 500
    assert measured.nats_per_token == expected.nats_per_token
    assert measured.interval == expected.interval
    assert measured.gap == held_out.nats_per_token - expected.nats_per_token
    assert measured.gap_interval is not None
    assert measured.gap_interval.low < measured.gap < measured.gap_interval.high
    assert measured.overfit == Overfit.NONE


def test_a_short_training_text_is_measured_whole() -> None:
    assert training_loss(text(100), quality(text(500, seed=1))).tokens == 100


def test_held_out_text_that_costs_more_means_overfitting() -> None:
    """The greedy text of the model stands for text that it knows by heart."""
    row = [65]
    while len(row) < 96:
        row.append(int(MODEL(mx.array([row]))[0, -1].argmax()))
    measured = training_loss(np.tile(np.array(row, np.uint16), 6), quality(text(576)))
    assert measured.gap > 1
    assert measured.overfit == Overfit.STRONG


def test_a_single_unit_has_no_verdict() -> None:
    measured = training_loss(text(10), quality(text(500)))
    assert (measured.interval, measured.gap_interval, measured.overfit) == (None, None, Overfit.UNKNOWN)


@pytest.mark.parametrize(
    ("low", "expected"),
    [
        (-0.1, Overfit.NONE),
        (0.0, Overfit.NONE),
        (0.001, Overfit.SLIGHT),
        (0.2, Overfit.SLIGHT),
        (0.201, Overfit.STRONG),
    ],
)
def test_the_lower_end_of_the_gap_decides(low: float, expected: Overfit) -> None:
    assert verdict(2.0, Interval(low, 1.0)) == expected
