"""Intervals cover the truth as often as they say."""

import numpy as np
import pytest

from trainer_service.evaluation import statistics
from trainer_service.evaluation.record import Interval
from trainer_service.evaluation.statistics import (
    FEWEST_UNITS,
    paired_interval,
    ratio_interval,
    unpaired_interval,
    wilson_interval,
)

SIMULATIONS = 400
# Of nats per token; documents of a model differ more than the two models.
TRUTH, DIFFERENCE = 2.0, 0.02


def documents(generator: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nats and the tokens of documents whose lengths and losses differ, (U,) each; the loss is `TRUTH`."""
    tokens = generator.geometric(1 / 200, units).astype(np.float64)
    # The noise of a document is independent of its length, so the ratio of the expectations is TRUTH.
    return tokens * (TRUTH + generator.normal(0, 0.4, units)), tokens


def coverage(intervals: list[Interval | None], truth: float) -> float:
    return float(np.mean([each is not None and each.low <= truth <= each.high for each in intervals]))


@pytest.mark.slow
def test_the_interval_of_a_loss_covers_the_truth_in_95_percent_of_cases() -> None:
    generator = np.random.default_rng(1)
    intervals = [ratio_interval(*documents(generator, 100)) for _ in range(SIMULATIONS)]
    assert 0.92 <= coverage(intervals, TRUTH) <= 0.98


@pytest.mark.slow
def test_the_interval_of_a_paired_difference_covers_the_truth_in_95_percent_of_cases() -> None:
    generator = np.random.default_rng(2)
    intervals = []
    for _ in range(SIMULATIONS):
        nats, tokens = documents(generator, 100)
        better = nats - tokens * (DIFFERENCE + generator.normal(0, 0.05, tokens.size))
        intervals.append(paired_interval(nats, better, tokens))
    assert 0.92 <= coverage(intervals, -DIFFERENCE) <= 0.98
    # The documents alone would hide a difference of this size.
    assert coverage(intervals, 0.0) < 0.2


@pytest.mark.slow
def test_the_interval_of_an_unpaired_difference_covers_the_truth_in_95_percent_of_cases() -> None:
    generator = np.random.default_rng(3)
    intervals = []
    for _ in range(SIMULATIONS):
        nats, tokens = documents(generator, 60)
        intervals.append(unpaired_interval(nats + DIFFERENCE * tokens, tokens, *documents(generator, 100)))
    assert 0.92 <= coverage(intervals, -DIFFERENCE) <= 0.98


def test_an_interval_is_as_wide_as_the_formula_for_many_units() -> None:
    """The standard error of a ratio by the delta method: that of nats - ratio x tokens, divided by the mean tokens."""
    nats, tokens = documents(np.random.default_rng(4), 5000)
    ratio = nats.sum() / tokens.sum()
    error = (nats - ratio * tokens).std() / tokens.mean() / 5000**0.5
    interval = ratio_interval(nats, tokens)
    assert interval is not None
    assert interval.low == pytest.approx(ratio - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(ratio + 1.96 * error, abs=0.15 * error)


def test_many_units_are_grouped_and_give_nearly_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    nats, tokens = documents(np.random.default_rng(5), 2001)
    every = ratio_interval(nats, tokens)
    monkeypatch.setattr(statistics, "_MOST_UNITS", 500)
    grouped = ratio_interval(nats, tokens)
    assert every is not None and grouped is not None and grouped != every
    width = every.high - every.low
    assert grouped.low == pytest.approx(every.low, abs=0.1 * width)
    assert grouped.high == pytest.approx(every.high, abs=0.1 * width)


def test_memory_limits_only_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    nats, tokens = documents(np.random.default_rng(6), 300)
    monkeypatch.setattr(statistics, "_DRAWN", 7)
    assert ratio_interval(nats, tokens) == ratio_interval(nats.tolist(), tokens.tolist())


@pytest.mark.parametrize("units", [1, FEWEST_UNITS - 1])
def test_few_units_have_no_interval(units: int) -> None:
    few, enough = [float(number) for number in range(units)], [float(number) for number in range(FEWEST_UNITS)]
    ones, all_ones = [1] * units, [1] * FEWEST_UNITS
    assert ratio_interval(enough, all_ones) and paired_interval(enough, enough[::-1], all_ones)
    assert ratio_interval(few, ones) is None
    assert paired_interval(few, few, ones) is None
    assert unpaired_interval(few, ones, enough, all_ones) is None
    assert unpaired_interval(enough, all_ones, few, ones) is None


def test_equal_versions_differ_by_exactly_nothing() -> None:
    nats, tokens = documents(np.random.default_rng(7), 50)
    assert paired_interval(nats, nats, tokens) == Interval(0.0, 0.0)


def test_the_two_sides_of_an_unpaired_difference_are_drawn_independently() -> None:
    nats, tokens = documents(np.random.default_rng(8), 50)
    interval = unpaired_interval(nats, tokens, nats, tokens)
    assert interval is not None and interval.low < -0.02 and interval.high > 0.02


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_equal_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, trials)
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=5e-5)


def test_a_wilson_interval_stays_within_0_and_1() -> None:
    for trials in range(1, 200):
        assert wilson_interval(0, trials).low >= 0
        assert wilson_interval(trials, trials).high <= 1
